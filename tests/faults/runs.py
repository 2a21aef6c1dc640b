"""The runs that are interrupted and disturbed, and how their ends are compared."""

import json
import os
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.helpers import FSDP, TINY, only_run, read_jsonl, same, train_command
from training.checkpoint.format import load_full
from training.run_dir import RunDir

STEPS = 240
SETTINGS = (
    *TINY, "data.path=text", "name=run", f"trainer.max_steps={STEPS}", "trainer.micro_batch_size=4",
    "trainer.checkpoint_every=7", "trainer.log_every=3",
)  # fmt: skip
ASYNC_SAVE = "trainer.async_save=true"
MODES = {"one": (), "one, async save": (ASYNC_SAVE,), "two": FSDP, "two, async save": (*FSDP, ASYNC_SAVE)}

#: Columns of metrics.jsonl that differ from run to run, besides the times.
MEASURED = ("tokens_per_second", "mfu", "peak_memory_gib")


class Run:
    """A run in a new folder, which can be started again and again; `outside` is a folder beside it."""

    def __init__(self, folder: Path, text: Path, mode: str) -> None:
        folder.mkdir()
        (folder / "text").symlink_to(text)
        self.folder = folder
        self.outside = folder.with_name(f"outside-{folder.name}")
        self.outside.mkdir()
        self.command = train_command(*SETTINGS, *MODES[mode])
        self.run_dir = RunDir(folder / "runs" / "main" / "run")
        self.leftovers: set[Path] = set()

    def start(self, file_size: int = -1) -> subprocess.Popen[bytes]:
        """Start the run, with its output in log.txt and files of at most so many bytes."""

        def prepare() -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if file_size >= 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                preexec_fn=prepare,
            )
        return self.process

    def finish(self) -> None:
        """Start the run and wait for its end; raise `RuntimeError` if it failed."""
        if self.start().wait() != 0:
            raise RuntimeError(self.log())

    def log(self) -> str:
        """Return what the run has printed so far."""
        return (self.folder / "log.txt").read_text()

    def steps(self) -> int:
        """Return the number of lines of metrics.jsonl."""
        file = self.run_dir.metrics_file
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def temporary_checkpoints(self) -> set[Path]:
        """Return the checkpoints that are being written, or that an interruption has left."""
        return set(self.run_dir.checkpoints.glob(".saving-*"))


def end_state(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], float]:
    """Return the newest checkpoint, the metrics without what is measured, and the test loss of the only run."""
    path = only_run(folder)
    newest = max((path / "checkpoints").glob("step-*.ckpt"))
    rows = [
        {name: value for name, value in row.items() if name not in MEASURED and not name.endswith("_seconds")}
        for row in read_jsonl(path / "metrics.jsonl")
    ]
    return load_full(newest), rows, json.loads((path / "result.json").read_text())["test_loss"]


def differences(run: Run, reference: Run) -> str:
    """Return in what the end of a run differs from that of the undisturbed one; empty if in nothing."""
    if not run.run_dir.result_file.exists():
        return "the result, which is missing"
    parts = ("the last checkpoint", "metrics.jsonl", "the test loss")
    ends = zip(end_state(run.folder), end_state(reference.folder), strict=True)
    differing = [part for part, both in zip(parts, ends, strict=True) if not same(*both)]
    names, other_names = ({str(path.relative_to(r.folder)) for path in r.folder.rglob("*")
                           if not path.name.startswith(".text-")}  # named after the place of the text
                          for r in (run, reference))  # fmt: skip
    if names != other_names:
        differing.append(f"the files: {', '.join(sorted(names ^ other_names)[:3])}")
    return ", ".join(differing)
