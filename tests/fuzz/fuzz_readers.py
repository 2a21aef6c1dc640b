"""Feed hostile files to every reader of the project: run folders, checkpoints, models, tokens, texts, states, traces.

    make fuzz ARGS="inputs=2500 seed=0 reader='run folder'"

Each input is a copy of what the programs write with one or two changes, read in a process of its own: values of other
kinds, bytes that are cut or swapped, pickles with code, links, FIFOs and devices. A reader must refuse it with a
sentence, or accept it, and what is accepted is used: weights are loaded, tables rendered, steps clipped. Prints a
table, and exits with 1 after any traceback, hang, crash, executed code, or change of a file outside of the folder.
The folder of an input that failed is kept.
"""

from scripts import _entry  # first: it installs the signal handlers

# isort: split

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from rich.table import Table

from common.console import make_console
from common.errors import ConfigError
from common.settings import Allowed, Count, Folder, Settings, parse
from tests.fuzz.attempts import Attempt, Outcome, attempt
from tests.fuzz.readers import READERS
from tests.fuzz.run_readers import evaluate_config, load_evaluated
from tests.helpers import CHECKOUT

#: Modules that take long to import, and do so in the process that makes all others.
PRELOADED = ("training.run", "training.launch.plan", "experiments.run.plot", "experiments.paper.claims", "datasets",
             "torch.distributed.checkpoint", "evaluation.language_model", "transformers",
             "pyarrow.parquet")  # fmt: skip
#: Seconds after which an input has hung its reader, and the bytes of memory that a reader may take.
SECONDS, MEMORY = 30.0, 6 << 30


class FuzzConfig(Settings):
    """Settings of the command line."""

    inputs: Count = 2500
    """Number of inputs over all readers."""
    seed: int = 0
    """Seed of the changes."""
    reader: str | None = None
    """The only reader to feed; null: all."""
    input: Annotated[int | None, Allowed("the number of an input, or null")] = None
    """The only input to read; null: all."""
    processes: Count = 2
    """Inputs that are read at a time."""
    out: Folder = "cache/fuzz"
    """Folder in which inputs that failed are kept."""


class Child(NamedTuple):
    """A process that reads one input, and where it is."""

    reader: str
    number: int
    folder: Path
    deadline: float


def start(reader: str, number: int, seed: int, bases: Path, folder: Path) -> int:
    """Fork a process that reads one input, and return its id. It leaves `attempt.json` in the folder."""
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        attempted = attempt(READERS[reader], bases, folder, f"{seed} {reader}", number)
        (folder / "attempt.json").write_text(json.dumps(attempted.__dict__))
    finally:
        os._exit(0)


def finished(children: dict[int, Child], wait: bool) -> Iterator[tuple[Child, Attempt]]:
    """Yield what became of the inputs whose processes have ended, or take too long."""
    while children:
        ended = False
        for pid, child in list(children.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done and time.monotonic() < child.deadline:
                continue
            if not done:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            del children[pid]
            ended = True
            file = child.folder / "attempt.json"
            if not done:
                yield child, Attempt(Outcome("a hang"), "", f"no answer after {SECONDS} s")
            elif not file.is_file():
                yield child, Attempt(Outcome("a crash"), "", f"status {status}")
            else:
                content = json.loads(file.read_text())
                yield child, Attempt(Outcome(content["outcome"]), content["change"], content["detail"])
        if ended and not wait:
            return
        time.sleep(0.002)


def shares(inputs: int, names: list[str]) -> dict[str, int]:
    """Return the number of inputs of each reader."""
    total = sum(READERS[name].share for name in names)
    return {name: -(-int(inputs * READERS[name].share * 1000) // int(total * 1000)) for name in names}


def preload(bases: Path) -> None:
    """Do what is slow the first time, without starting a thread: imports, and the composition of settings."""
    from hydra import compose, initialize_config_dir

    for module in PRELOADED:
        import_module(module)
    evaluate_config()
    load_evaluated(bases / "stopped" / "runs" / "main" / "run")
    with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
        compose("train", ["lr=1e-3", "clip.alpha='x'"])
    gc.collect()
    gc.freeze()  # memory stays shared with forks


def main(values: _entry.Values) -> None:
    """Feed all readers, and print what they did."""
    config = parse(FuzzConfig, values)
    console = make_console(width=130)
    if config.reader not in (None, *READERS):
        raise ConfigError("reader", config.reader, f"one of {', '.join(READERS)}")
    names = list(READERS) if config.reader is None else [config.reader]
    numbers = {name: range(count) for name, count in shares(config.inputs, names).items()}
    if config.input is not None:
        numbers = {name: range(config.input, config.input + 1) for name in names}
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        bases = Path(temporary, "bases")
        done = subprocess.run([sys.executable, "-m", "tests.fuzz.bases", str(bases)], cwd=CHECKOUT,
                              capture_output=True, text=True)  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr)
        preload(bases)
        children: dict[int, Child] = {}

        def record(wait: bool) -> None:
            for child, attempted in finished(children, wait):
                outcomes[child.reader][attempted.outcome] += 1
                if attempted.outcome.failed or config.input is not None:
                    kept = keep(child, attempted, Path(config.out), config.seed)
                    lines = attempted.detail.strip().splitlines() or [""]
                    console.print(f"{attempted.outcome}: {kept}: {attempted.change[:200]}: {lines[-1][:200]}")
                shutil.rmtree(child.folder, ignore_errors=True)

        for name, range_ in numbers.items():
            for number in range_:
                folder = Path(temporary, f"{name.replace(' ', '-').replace(',', '')}-{number}")
                pid = start(name, number, config.seed, bases, folder)
                children[pid] = Child(name, number, folder, time.monotonic() + SECONDS)
                if len(children) >= config.processes:
                    record(wait=False)
        record(wait=True)
    console.print(summary(outcomes), soft_wrap=False)
    if any(Outcome(outcome).failed for counts in outcomes.values() for outcome in counts):
        sys.exit(1)


def keep(child: Child, attempted: Attempt, out: Path, seed: int) -> Path:
    """Copy the folder of an input that failed, with what became of it, and return the copy."""
    kept = out / f"{child.folder.name}-seed-{seed}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    if child.folder.is_dir():
        subprocess.run(["cp", "-a", str(child.folder), str(kept / "input")], check=False)
    text = f"{attempted.outcome}\n{attempted.change}\n\n{attempted.detail}\n"
    (kept / "failure.txt").write_text(text, errors="backslashreplace")
    return kept


def summary(outcomes: dict[str, Counter[str]]) -> Table:
    """Return a table of the inputs by reader and outcome."""
    table = Table(title="hostile inputs", title_justify="left")
    for column in ("reader", "inputs", "accepted", "refused", "failed", "failures"):
        table.add_column(column, justify="left" if column in ("reader", "failures") else "right")
    total: Counter[Any] = Counter()
    for name, counts in outcomes.items():
        failures = {outcome: count for outcome, count in counts.items() if Outcome(outcome).failed}
        words = ", ".join(f"{count} {outcome}" for outcome, count in failures.items())
        numbers = (counts.total(), counts["accepted"], counts["refused"], sum(failures.values()))
        total.update(dict(enumerate(numbers)))
        table.add_row(name, *map(str, numbers), words)
    table.add_section()
    table.add_row("all", *(str(total[i]) for i in range(4)), "")
    return table


if __name__ == "__main__":
    _entry.run(main)
