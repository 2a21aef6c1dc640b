"""What tests share: `train.py` and the scripts as real processes, and what their run folders hold."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from common.files import remove
from tests.process_pool import CHECKOUT, Job, run, run_ranks

if TYPE_CHECKING:
    from training.config.schema import Config

#: Settings of a run of a second or two; the fixture `corpus` is its text.
TINY = (
    "model.vocab_size=512",
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=2",
    "data.sequence_length=64",
    "trainer.max_steps=40",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=8",
    "clip.warmup_steps=5",
)

#: Settings of two processes, and of two that share the model.
TWO = ("trainer.devices=2", "trainer.micro_batch_size=4")
FSDP = (*TWO, "trainer.strategy=fsdp")

#: What the fixture `once` returns.
Once = Callable[[str, Callable[[Path], object]], Path]

#: A result.json with as few fields as it may have.
RESULT = {
    "steps": 8,
    "tokens": 512,
    "train_loss": 5.0,
    "test_loss": 5.0,
    "unigram_entropy": 5.2,
    "test_tokens": 256,
    "parameters": 1000,
    "data_fingerprint": "0123",
    "spikes": 0,
    "spike_definition": "none",
    "clipped_share": 0.0,
    "tokens_per_second": 100.0,
}

#: A case that only `make test-all` runs.
SLOW = partial(pytest.param, marks=pytest.mark.slow)


def compose_config(*overrides: str) -> "Config":
    """Return the configuration of train.py with these overrides."""
    from hydra import compose, initialize_config_dir

    from training.config.compose import load_config

    with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
        return load_config(compose("train", overrides=list(overrides)), overrides)


@contextmanager
def same_handlers() -> Iterator[None]:
    """Restore the handlers of the signals that the programs handle."""
    from training.runtime.signals import SIGNALS

    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def train_command(*overrides: str, program: str = "train.py") -> list[str]:
    """Return the command of a new process."""
    return [sys.executable, str(CHECKOUT / program), *overrides]


def train(
    *overrides: str, cwd: Path, processes: int = 1, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run train.py to its end in the folder `cwd`; in several processes as torchrun does, without our launcher."""
    if processes > 1:
        return run_ranks("train.py", *overrides, processes=processes, cwd=cwd, env=env, timeout=timeout)
    return run("train.py", *overrides, cwd=cwd, env=env, timeout=timeout)


def train_to_end(*overrides: str, cwd: Path, processes: int = 1, env: dict[str, str] | None = None) -> str:
    """Run train.py, which must succeed, and return its output."""
    done = train(*overrides, cwd=cwd, processes=processes, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def script(name: str, *arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a file of scripts/ to its end in the folder `cwd`."""
    return run(f"scripts/{name}", *arguments, cwd=cwd, env=env)


def start(*settings: str, cwd: Path, program: str = "train.py", **env: str) -> Job:
    """Start a program whose slow imports are done."""
    return Job(program, settings, cwd, env)


def start_from_nothing(*settings: str, cwd: Path, program: str = "train.py", **env: str) -> subprocess.Popen[str]:
    """Start a program as a terminal does, with all of its imports to do and no signal ignored."""
    return subprocess.Popen(
        train_command(*settings, program=program),
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGHUP)],
    )


def kill_after(steps: int, *settings: str, cwd: Path) -> None:
    """Start training, and send SIGKILL a moment after the run has written the metrics of so many steps."""
    job = start(*settings, cwd=cwd)
    wait_for_steps(job, cwd, steps)
    time.sleep(random.random() * 0.05)
    job.kill()
    assert job.wait() == -signal.SIGKILL, f"the run ended before it could be killed: {job.output()}"


def wait_for_steps(job: Job, cwd: Path, steps: int) -> None:
    """Wait until the run has written the metrics of so many steps."""
    while job.poll() is None:
        files = list(cwd.glob("runs/main/*/metrics.jsonl"))
        if files and len(files[0].read_text().splitlines()) >= steps:
            return
        time.sleep(0.002)
    raise AssertionError(job.communicate())


def ranks(job: Job) -> dict[str, int]:
    """Return the process ids of a run by rank."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    pids = {}
    for pid in map(int, children):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        pids.update({os.fsdecode(v[5:]): pid for v in variables if v.startswith(b"RANK=")})
    return pids


def is_running(pid: int | str) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # the second comes if it ends between opening and reading
        return False


def have_ended(pids: Iterable[int | str], seconds: float = 60) -> bool:
    """Wait until these processes have ended, since a signal takes a while to end a process. Return whether they did."""
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def make(*arguments: str) -> str:
    """Run make in the checkout without the variables of the make that runs the tests; return its output."""
    variables = ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")
    env = {name: value for name, value in os.environ.items() if name not in variables}
    command = ["make", "--no-print-directory", *arguments]
    done = subprocess.run(command, cwd=CHECKOUT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def only_run(folder: Path) -> Path:
    """Return the only run folder below `folder`."""
    (path,) = (folder / "runs" / "main").iterdir()
    return path


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nobody write in a folder until the block ends. Where root cannot have that, the test is skipped."""
    if os.geteuid():
        folder.chmod(0o555)
    else:  # permissions do not bind root
        for command in (["--bind", folder, folder], ["-o", "remount,bind,ro", folder]):
            if subprocess.run(["mount", *map(str, command)], capture_output=True).returncode:
                pytest.skip("root cannot mount here")
    try:
        yield
    finally:
        if os.geteuid():
            folder.chmod(0o755)
        else:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def copy_run(run: Path, folder: Path) -> Path:
    """Copy a run's folder to `folder`, where the command that trained it finds it; return the copy."""
    return shutil.copytree(run, folder / "runs" / "main" / run.name)


def interrupt(run: Path, step: int) -> None:
    """Remove what a run has written after a step, as if it had been interrupted there."""
    (run / "result.json").unlink(missing_ok=True)
    for checkpoint in (run / "checkpoints").glob("step-*.ckpt"):  # a file, or a folder if it is sharded
        if int(checkpoint.stem.split("-")[1]) > step:
            remove(checkpoint)


def interrupted(run: Path, folder: Path, step: int) -> Path:
    """Return a copy of a run as it was after a step, see `copy_run`."""
    path = copy_run(run, folder)
    interrupt(path, step)
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file with one JSON object per line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def final_state(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], float]:
    """Return the newest checkpoint, the metrics without times and memory, and the test loss of the only run."""
    from training.checkpoint.format import load_full

    path = only_run(folder)
    newest = max((path / "checkpoints").glob("step-*.ckpt"))
    rows = read_jsonl(path / "metrics.jsonl")
    for row in rows:
        for name in [name for name in row if name.endswith("_seconds")] + ["tokens_per_second", "peak_memory_gib"]:
            assert row.pop(name) >= 0
    result = json.loads((path / "result.json").read_text())
    return load_full(newest), rows, result["test_loss"]


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
