"""One run in several processes: which this is, and starting them.

`python train.py` starts them itself on one machine; under torchrun they are there already. Rank 0 alone writes, and
speaks.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence

import torch

from training.config import ConfigError


class AlreadyReported(ConfigError):
    """A mistake that a process of the run has reported."""


class ProcessFailed(RuntimeError):
    """A process of the run has failed; the message is empty if it has said why itself."""


class Stopped(KeyboardInterrupt):
    """A signal has ended the processes of the run, and they have said so."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def launched() -> bool:
    """Whether this process is one of several that torchrun, or `launch`, has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Return this process's number in the run."""
    return int(os.environ["RANK"]) if launched() else 0


def launch(processes: int, arguments: Sequence[str]) -> None:
    """Run this program with other arguments in several processes on this machine, until all have ended.

    Raises:
        AlreadyReported: they have reported a mistake of the user's.
        ProcessFailed: one has failed, or was killed; the others were stopped.
        Stopped: a signal ended them.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # the process itself says what is wrong
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="run",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // processes))
    try:
        elastic_launch(config, sys.executable)("-u", sys.argv[0], *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == 2:
            raise AlreadyReported from error
        said = ""
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            said = f"process {rank} of the run was ended by {name}: the same command continues"
        raise ProcessFailed(said) from error
    except SignalException as stop:
        raise Stopped(stop.sigval) from stop
