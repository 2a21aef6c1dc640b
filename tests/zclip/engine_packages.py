"""Engines that tests download with pip, and the processes in which they train: none of them is a requirement."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers import CHECKOUT
from tests.process_pool import rank_environments

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--retries", "1"]
#: A file that says why a package could not be downloaded.
ERROR = "error"


def pip(folder: Path, *arguments: str) -> bool:
    """Run pip for a folder of `once`; if it fails, write why into the folder. Return whether it succeeded."""
    done = subprocess.run([*PIP, *arguments], capture_output=True, text=True, timeout=300)
    if done.returncode:
        (folder / ERROR).write_text(str(done.stderr.strip().splitlines()[-1:]))
    return not done.returncode


def install(folder: Path, *requirements: str) -> bool:
    """Install packages without what they depend on into a folder; return whether it succeeded."""
    return pip(folder, "install", "--no-deps", "--target", str(folder), *requirements)


def skip_without(folder: Path, engine: str) -> Path:
    """Return a folder with an engine; skip the test if it could not be downloaded."""
    if (folder / ERROR).exists():
        pytest.skip(f"{engine} cannot be downloaded: {(folder / ERROR).read_text()}")
    return folder


def run_ranks(module: str, paths: Sequence[Path], out: Path, world: int) -> None:
    """Run a module of the tests in so many processes that find packages in these paths; it saves its results in out."""
    path = os.pathsep.join(map(str, (*paths, CHECKOUT)))
    command = [sys.executable, "-m", module, str(out)]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **rank, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}, cwd=CHECKOUT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in rank_environments(world, store.port)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(outputs)[-5000:]


def code_of(page: str, number: int = 0) -> str:
    """Return a block of code of a page in docs/how-to, which needs an engine: `{code-block} python`."""
    text = (CHECKOUT / "docs" / "how-to" / page).read_text()
    return text.split("```{code-block} python\n")[number + 1].partition("\n```")[0]
