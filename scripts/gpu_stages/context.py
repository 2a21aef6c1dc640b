"""What a stage knows: its folders, its time and its earlier results; and the file in which its results are kept."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.files import write_atomic

CHECKOUT = Path(__file__).resolve().parents[2]


#: A program that runs train.py with algorithms that give the same bits each time, where torch has them.
DETERMINISTIC = """
import os, runpy, torch
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
torch.use_deterministic_algorithms(True, warn_only=True)
runpy.run_path("train.py", run_name="__main__")
"""


@dataclass
class Context:
    """A stage in progress. `results` are those of this call and of calls before, by names."""

    name: str
    out: Path
    carried: Path
    dry_run: bool
    deadline: float  # of time.time()
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """The file with the state and the results of the stage."""
        return self.out / f"{self.name}.json"

    @property
    def cache(self) -> Path:
        """Folder with prepared tokens: the carried one if there is one. Others are added to it."""
        carried = self.carried / "cache"
        return carried if carried.is_dir() else self.out / "cache"

    def seconds_left(self) -> float:
        """Return the seconds after which the stage is ended."""
        return self.deadline - time.time()

    def save(self, **results: Any) -> None:
        """Add results to the file at once."""
        self.results.update(results)
        write_state(self.file, "running", self.results)

    def call(self, *command: str, log: str, check: bool = True) -> int:
        """Run a Python program of this checkout, with its output in a log file, and return its status.

        Raises:
            RuntimeError: it failed, with its last line.
        """
        path = self.out / f"{log}.log"
        with path.open("w") as file:
            done = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, cwd=CHECKOUT)
        if check and done.returncode:
            raise RuntimeError(f"{log} failed: {(path.read_text().strip().splitlines() or ['no output'])[-1]}")
        return done.returncode

    def train(self, name: str, *overrides: str, deterministic: bool = False) -> Path:
        """Run or resume train.py under a name, and return its run folder."""
        runs = self.out / "runs"
        places = (f"paths.runs={runs}", f"paths.cache={self.cache}", "experiment=main", f"name={name}")
        program = ("-c", DETERMINISTIC) if deterministic else ("train.py",)
        self.call(*program, *places, *overrides, log=f"{self.name}-{name}")
        return runs / "main" / name

    def model(self, name: str = "60m") -> Sequence[str]:
        """Return the settings of a compiled model of this size on the GPU; of a tiny one in a dry run."""
        if self.dry_run:
            return ("model=nano", "model.vocab_size=512", "data.sequence_length=32", "data.max_tokens=2e4",
                    "data.max_val_tokens=256", "trainer.global_batch_size=2", "trainer.micro_batch_size=2")  # fmt: skip
        return (f"model={name}", "trainer=gpu", "trainer.compile=true", "data.max_val_tokens=65536")


def read_state(file: Path) -> dict[str, Any]:
    """Return the state of a stage, its results and its seconds; empty if it never ran."""
    return json.loads(file.read_text()) if file.exists() else {}


def write_state(file: Path, state: str, results: dict[str, Any], **more: Any) -> None:
    """Write the state of a stage and its results."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps({"state": state, **more, "results": results}, indent=1))


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of a run folder."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def environment_for_children(out: Path) -> None:
    """Make the processes that a stage starts share what torch compiles, and find the packages of this process."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((out / "inductor").resolve()))
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
