"""Processes of a run that a test signals one by one, and steps at which a run waits for the test."""

import time
from pathlib import Path

from tests.process_pool import Job, start_ranks

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
        self._store, self.jobs = start_ranks("train.py", *settings, processes=processes, cwd=cwd, env=env)

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
