"""Processes of a run that a test signals one by one, and steps at which a run waits for the test."""

import time
from pathlib import Path

import torch.distributed as dist

from tests.helpers import start
from tests.process_pool import Job

#: A clipper that waits at some steps of this process until the test lets it continue; see `Gates`.
GATED = """
import os
import time
from pathlib import Path

from zclip import ZClip


class Gated(ZClip):
    steps = 0

    def step(self, *args, **kwargs):
        self.steps += 1
        gates = Path(os.environ["GATES"])
        if (gates / f"closed-{self.steps}").exists():
            (gates / f"reached-{self.steps}").touch()
            while (gates / f"closed-{self.steps}").exists():
                time.sleep(0.005)
        return super().step(*args, **kwargs)
"""


class Gates:
    """Steps at which a run waits, in the middle of the step.

    Attributes:
        overrides: settings of a run that waits at the gates.
        env: environment variables of that run.
    """

    def __init__(self, folder: Path, *steps: int) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "gated.py").write_text(GATED)
        for step in steps:
            (folder / f"closed-{step}").touch()
        self.overrides = ("clip._target_=gated.Gated",)
        self.env = {"PYTHONPATH": str(folder), "GATES": str(folder)}

    def wait(self, step: int, *jobs: Job) -> None:
        """Wait until the run is at a gate."""
        while not (self.folder / f"reached-{step}").exists():
            assert all(job.poll() is None for job in jobs), [job.output() for job in jobs]
            time.sleep(0.005)

    def open(self, step: int) -> None:
        """Let the run continue."""
        (self.folder / f"closed-{step}").unlink()


class Ranks:
    """The connected processes of a run, as torchrun starts them; `jobs` has them by rank."""

    def __init__(self, *settings: str, cwd: Path, processes: int = 2, **env: str) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        shared = {
            **env,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
        }
        self.jobs = [
            start(*settings, cwd=cwd, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)
        ]

    def kill(self) -> None:
        """Kill all that run."""
        for job in self.jobs:
            job.kill()
            assert job.wait() is not None

    def wait(self, timeout: float = 60) -> list[int]:
        """Return the exit statuses by rank once all have ended; kill all and return those after `timeout`."""
        deadline = time.monotonic() + timeout
        while any(job.poll() is None for job in self.jobs) and time.monotonic() < deadline:
            time.sleep(0.005)
        self.kill()
        return [job.wait() for job in self.jobs]

    def errors(self) -> list[str]:
        """Return what each has written on stderr since the last call."""
        return [job.output()[1] for job in self.jobs]
