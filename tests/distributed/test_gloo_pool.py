"""The pool of processes that the distributed tests use: results, failures, and that no process is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.gloo_pool import RankError, run
from tests.helpers import CHECKOUT, have_ended

INTERRUPTED = """
import sys
from pathlib import Path
from tests.distributed.test_gloo_pool import hang
from tests.gloo_pool import run
run(hang, 2, Path(sys.argv[1]))
"""


def ranks_sum(rank: int, world: int, factor: float) -> tuple[int, torch.Tensor]:
    dist.init_process_group("gloo")
    value = torch.tensor(rank * factor)
    dist.all_reduce(value)
    return rank, value


def fail_on_rank_1(rank: int, world: int) -> None:
    dist.init_process_group("gloo")
    if rank == 1:
        raise ZeroDivisionError("by rank 1")
    dist.barrier()


def end_by_signal(rank: int, world: int) -> None:
    dist.init_process_group("gloo")
    if rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    dist.barrier()


def hang(rank: int, world: int, folder: Path) -> None:
    """Write the process id, then hang in a collective that the other ranks do not enter."""
    (folder / str(rank)).write_text(str(os.getpid()))
    dist.init_process_group("gloo")
    if rank == 0:
        dist.barrier()
    time.sleep(600)


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.iterdir()]


@pytest.mark.parametrize("world", [1, 4])
def test_results_are_returned_by_rank(world):
    results = run(ranks_sum, world, 0.5)
    assert results == [(rank, sum(range(world)) / 2) for rank in range(world)]


@pytest.mark.parametrize(
    "case, message",
    [
        (fail_on_rank_1, r"rank 1 raised an error(.|\n)*in fail_on_rank_1\n(.|\n)*ZeroDivisionError: by rank 1"),
        (end_by_signal, "rank 0 was killed by signal 15"),
    ],
    ids=["error", "signal"],
)
def test_failing_rank_is_reported_and_the_next_case_runs(case, message):
    with pytest.raises(RankError, match=message):
        run(case, 2)
    assert run(ranks_sum, 2, 1.0) == [(0, 1.0), (1, 1.0)]


def test_hanging_ranks_are_killed(tmp_path):
    with pytest.raises(RankError, match=r"ranks \[0, 1\] took more than 1 seconds"):
        run(hang, 2, tmp_path, timeout=1)
    assert len(pids(tmp_path)) == 2 and have_ended(pids(tmp_path))
    assert run(ranks_sum, 2, 1.0) == [(0, 1.0), (1, 1.0)]


def test_function_without_a_name_is_rejected():
    with pytest.raises(ValueError, match=r"<lambda> has no name in its module"):
        run(lambda rank, world: None, 2)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_the_test_process(signum, tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    process = subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.PIPE, start_new_session=True)
    while process.poll() is None and len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    process.send_signal(signum)
    _, errors = process.communicate()
    assert process.returncode != 0 and len(pids(tmp_path)) == 2, errors.decode()
    assert have_ended(pids(tmp_path))
