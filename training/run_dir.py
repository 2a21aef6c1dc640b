"""The run folder: what a run leaves behind, and how it is read again.

    config.yaml        resolved settings with which the run began
    environment.json   one entry per start: commit, versions, device, command line, changed settings
    tokenizer/         as Hugging Face's libraries load it
    metrics.jsonl      one line per optimizer step
    checkpoints/       step-*.ckpt, complete or absent
    val_metrics.jsonl  losses on held-out text during training, if `trainer.val_every` is set
    task_scores.json   scores on tasks, of scripts/evaluate.py or during training
    rewinds.json       where the run was rewound and which batches it skips, if it was
    rewound-N.jsonl    the lines that the Nth rewind removed from metrics.jsonl
    result.json        written last: its presence means that the run is finished
    plots/
    failure.txt        what ended the last start: the traceback of a fault, or why the run cannot continue
    job.json, log.txt  of a run that a sweep started in a process or job of its own; logs/ of its tasks under SLURM
    wandb/             of a run with logger=wandb

One process owns the folder at a time (a lock that the system releases however that process ends).
"""

import json
import math
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import RunError, UserError, shown
from common.files import hold_lock, is_locked, make_dir, refuse_link, remove_leftovers, sha256, write_atomic
from common.reading import check_record, damage, parse_json, parse_record, read_bytes, read_json, read_lines
from common.run_files import (
    Environment,
    MetricsLine,
    Result,
    Rewinds,
    SlurmJob,
    as_dict,
    read_validation,
    setting_changes,
)
from data import TOKENIZER_FILES, Tokens, changes
from evaluation.scores import SCORES
from training.config.compose import read_config, to_yaml
from training.config.live import live_changes, with_changes, without_changes
from training.config.schema import Config
from training.runtime.environment import environment
from training.runtime.slurm import restart_count

#: A SLURM job that starts this many times at the same step is not requeued any more.
MAX_RESTARTS = 5

#: Seconds to wait for the lock of a folder, and of a requeued job, whose lost node may hold it for a while.
LOCK_SECONDS, LOCK_SECONDS_REQUEUED = 2.0, 120.0


class RunDir:
    """Paths of a run folder, which need not exist, and the files that are written in one piece."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.environment_file = path / "environment.json"
        self.tokenizer = path / "tokenizer"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.val_metrics_file = path / "val_metrics.jsonl"
        self.scores_file = path / SCORES
        self.rewinds_file = path / "rewinds.json"
        self.result_file = path / "result.json"
        self.failure_file = path / "failure.txt"
        self.log_file = path / "log.txt"
        self.lock_file = path / ".lock"
        self.job_file = path / "job.json"
        self.plot = path / "plots" / "run.png"

    @contextmanager
    def acquire(self, config: Config, tokens: Tokens) -> Iterator[None]:
        """Make the folder, record this start, and hold the folder's lock until the block ends.

        Raises:
            UserError: another process holds the folder, or the run was started on other tokens.
            RunError: the SLURM job of this process makes no progress.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                seconds = LOCK_SECONDS_REQUEUED if restart_count() else LOCK_SECONDS
                stack.enter_context(hold_lock(self.lock_file, seconds))
            except TimeoutError as error:
                raise UserError(f"another process is training {self.path}: wait for it, or stop it") from error
            remove_leftovers(self.path)
            make_dir(self.checkpoints)
            refuse_link(self.plot.parent)  # before training rather than after it
            starts = self._starts()
            if starts and (starts[-1].get("data_fingerprint") or tokens.fingerprint) != tokens.fingerprint:
                other = changes(tokens, starts[-1].get("data_folder") or "") or ["the text or the tokenizer"]
                have = "have" if len(other) > 1 else "has"
                raise UserError(
                    f"{' and '.join(other)} {have} changed (data.path={shown(config.data.path)}, "
                    f"data.tokenizer={shown(config.data.tokenizer)}): {self.path} was started on tokens "
                    f"{starts[-1]['data_fingerprint']}, these are {tokens.fingerprint}; restore it, or choose a name"
                )
            make_dir(self.tokenizer)
            for name in TOKENIZER_FILES:
                if not _holds(self.tokenizer / name, content := (tokens.folder / name).read_bytes()):
                    write_atomic(self.tokenizer / name, content)
            recorded = setting_changes(starts)
            if not self.config_file.is_file():
                write_atomic(self.config_file, to_yaml(without_changes(config, recorded)))
            changed = live_changes(with_changes(read_config(self.config_file), recorded), config)
            start = environment() | {
                "data_fingerprint": tokens.fingerprint,
                "data_folder": tokens.folder.name,
                "tokenizer": {name: sha256(self.tokenizer / name) for name in TOKENIZER_FILES},
                "step": max(self.checkpoint_steps(), default=0),
                "slurm_job": os.environ.get("SLURM_JOB_ID"),
                **({"changes": changed} if changed else {}),
            }
            self._check_progress([*starts, start])
            write_atomic(self.environment_file, json.dumps({"starts": [*starts, start]}, indent=1))
            self.failure_file.unlink(missing_ok=True)
            yield

    def is_owned(self) -> bool:
        """Whether a process on this machine, or on one that shares locks with it, holds the folder."""
        return is_locked(self.lock_file)

    def _check_progress(self, starts: list[dict[str, Any]]) -> None:
        """Raise `RunError` if requeued starts of one SLURM job stay at the same step."""
        step, job = starts[-1]["step"], starts[-1]["slurm_job"]
        last = [(start.get("step"), start.get("slurm_job")) for start in starts[-MAX_RESTARTS:]]
        if restart_count() >= MAX_RESTARTS - 1 and last == [(step, job)] * MAX_RESTARTS:
            raise RunError(
                f"job {job} has started {MAX_RESTARTS} times after step {step} of {self.path} without progress: its "
                "time limit is too short, or its nodes fail; a new job continues"
            )

    def max_steps(self) -> int | None:
        """Return the steps of the whole run; `None` if it has not begun."""
        return read_config(self.config_file).trainer.max_steps if self.config_file.exists() else None

    def read_result(self) -> dict[str, Any] | None:
        """Return the final numbers; `None` while the run is not finished. A damaged file is a `UserError`."""
        if not self.result_file.exists():
            return None
        return as_dict(read_json(self.result_file, Result))

    def slurm_job(self) -> str | None:
        """Return the number of the SLURM job that was last submitted for the run; `None` if none was."""
        return read_json(self.job_file, SlurmJob).slurm if self.job_file.exists() else None

    def write_slurm_job(self, number: str) -> None:
        """Record the number of the run's SLURM job."""
        write_atomic(self.job_file, json.dumps({"slurm": number}))

    def write_failure(self, error: BaseException) -> None:
        """Record what ended this start, unless another process of the run has done so; of faults the traceback."""
        text = f"{error}\n" if isinstance(error, RunError) else "".join(traceback.format_exception(error))
        with suppress(OSError), self.failure_file.open("x", encoding="utf-8") as file:
            file.write(text)

    def failure_reason(self) -> str | None:
        """Return in one line what ended the last start; `None` if nothing is recorded."""
        content = read_bytes(self.failure_file) if self.failure_file.exists() else b""
        lines = content.decode(errors="replace").splitlines()
        return lines[-1] if lines else None

    def _starts(self) -> list[dict[str, Any]]:
        if not self.environment_file.exists():
            return []
        return [as_dict(start) for start in read_json(self.environment_file, Environment).starts]

    def setting_changes(self) -> list[dict[str, Any]]:
        """Return the changes of settings while the run trained: `step`, `setting`, `from` and `to` of each."""
        return setting_changes(self._starts())

    def _last_start(self) -> dict[str, Any]:
        """Return the entry of the last start; an empty one if there was none."""
        return (self._starts() or [{}])[-1]

    def data_folder(self) -> str | None:
        """Return the name of the tokens' folder at the last start; `None` if it is not known."""
        return self._last_start().get("data_folder")

    def check_tokenizer(self) -> None:
        """Raise `UserError` if a file of the tokenizer is not the one that the last start recorded, if it did."""
        recorded = self._last_start().get("tokenizer", {})
        for file in (self.tokenizer / name for name in TOKENIZER_FILES if name in recorded):
            if file.is_file() and sha256(file) != recorded[file.name]:  # a missing one is reported when it is read
                problem = "is not the tokenizer that the run was trained with: restore it"
                raise UserError(f"{file} {problem} (its SHA-256 was {recorded[file.name]})")

    def metrics_rows(self) -> dict[int, dict[str, Any]]:
        """Return the lines of metrics.jsonl by their steps; damaged ones, and further ones of a step, do not count."""
        rows: dict[int, dict[str, Any]] = {}
        with suppress(OSError):  # nothing, or something else, may have its name
            for line in read_lines(self.metrics_file):
                with suppress(ValueError):
                    row = parse_json(line)
                    check_record(MetricsLine, row)
                    rows.setdefault(row["step"], row)
        return rows

    def val_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of val_metrics.jsonl, see `read_validation`."""
        return read_validation(self.val_metrics_file)

    def checkpoint(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or would be."""
        return self.checkpoints / f"step-{step:08d}.ckpt"

    def checkpoint_steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in order; files of other names are none.

        Raises:
            OSError: the folder is there, and cannot be read.
        """
        with suppress(FileNotFoundError, NotADirectoryError):  # others may remove the folder while it is read
            # A glob would take a folder that cannot be read for an empty one.
            names = [path.name for path in self.checkpoints.iterdir()]
            steps = [int(name[5:-5]) for name in names if re.fullmatch(r"step-[0-9]+\.ckpt", name)]
            return sorted(step for step in steps if self.checkpoint(step).name in names)
        return []

    def rewinds(self, last: float = math.inf) -> list[dict[str, int]]:
        """Return the rewinds to steps up to `last`: `from_step`, `to_step`, and `skipped_batches` in all so far."""
        if not self.rewinds_file.exists():
            return []
        try:
            rewinds = parse_record(Rewinds, read_bytes(self.rewinds_file)).rewinds
        except (OSError, ValueError) as error:
            advice = "restore it, as it says which batches the run skips"
            raise RunError(damage(self.rewinds_file, error, advice)) from error
        return [as_dict(rewind) for rewind in rewinds if rewind.to_step <= last]

    def write_rewinds(self, rewinds: list[dict[str, int]]) -> None:
        """Record the rewinds of the run, if there are any."""
        if rewinds != self.rewinds():
            write_atomic(self.rewinds_file, json.dumps({"rewinds": rewinds}, indent=1))

    def skipped_batches(self, step: int) -> int:
        """Return how many global batches the run has skipped before it begins the step after this one."""
        rewinds = self.rewinds(step)
        return rewinds[-1]["skipped_batches"] if rewinds else 0


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file has this content; a link, whose target others may change, has not."""
    with suppress(OSError, ValueError):
        return not path.is_symlink() and read_bytes(path, len(content)) == content
    return False
