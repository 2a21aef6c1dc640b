"""The processes of one run, as each of them sees it: its rank, its process group, and decisions of rank 0.

They are started by torchrun, by srun, or by `training.launch.processes`. Only rank 0 writes files and prints; a failure
is reported by the process in which it happens.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from common.errors import UserError
from training.runtime.stdio import flush_stdio

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether this process is one of several that a launcher has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def check_environment() -> None:
    """Raise `UserError` if the variables of a launcher are not as it sets them: some may be left over in a shell."""
    if not is_distributed():
        return
    numbers = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    given = ", ".join(f"{name}={value or 'not set'}" for name, value in numbers.items())
    is_whole = all(value.isdecimal() for value in numbers.values()) and bool(os.environ.get("MASTER_ADDR"))
    if not is_whole or int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]):
        raise UserError(
            f"the environment is not that of a launcher ({given}, MASTER_ADDR={os.environ.get('MASTER_ADDR')}): start "
            "the processes with torchrun or srun, or unset RANK and WORLD_SIZE"
        )


def rank() -> int:
    """Return this process's rank in the run."""
    return int(os.environ["RANK"]) if is_distributed() else 0


def init_process_group(gpu: bool) -> None:
    """Connect the processes of the run, if there are several and they are not connected. NCCL connects GPUs."""
    if not is_distributed() or dist.is_initialized():
        return
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Python's handlers do not run while torch waits for other processes, which may never arrive.
    previous = {signum: signal.signal(signum, signal.SIG_DFL) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def end_process(status: int) -> NoReturn:
    """End this process with an exit status, whatever the threads of its process group do.

    Such a thread may still release the tensors of the last collective, and needs the interpreter's lock for that. If
    it asks for the lock while the interpreter shuts down, the process ends with SIGABRT. So the group is destroyed
    first. After an error its threads may wait for other processes: this process then ends without exit handlers.
    """
    if dist.is_initialized():
        if status:
            flush_stdio()
            os._exit(status)
        dist.destroy_process_group()
    sys.exit(status)


def gather_from_all(value: T) -> list[T]:
    """Return what each rank gives, in the order of ranks, on all ranks. They must be connected."""
    if not is_distributed():
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def broadcast_from_rank0(decide: Callable[[], T]) -> T:
    """Return the result of `decide` on rank 0, on all ranks. They must be connected.

    Whatever depends on files is decided by rank 0: over a network file system, others may see an older state.
    """
    if not is_distributed():
        return decide()
    decisions = [decide() if rank() == 0 else None]
    dist.broadcast_object_list(decisions)
    return decisions[0]  # type: ignore[return-value]
