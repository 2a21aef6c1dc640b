"""What the benchmarks share: the device, rounds in which contenders take turns, and tables of numbers."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

GPU = torch.cuda.is_available()
DEVICE: Literal["cpu", "cuda"] = "cuda" if GPU else "cpu"


def device_name(device: str = DEVICE) -> str:
    """Return the name of the GPU, or the number of threads on the CPU."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def median_seconds(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    description: str = "",
    warm_up: int = 1,
    cpu_time: bool = False,
) -> dict[str, float]:
    """Return the median seconds of each contender; all run once in each round, and in the warm-up rounds before.

    The GPU finishes their work before the clock stops. `description` labels the progress bar; without it there is none.
    With `cpu_time` the clock runs while this process does, so other processes matter less.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in contenders}
    console = Console(stderr=True)
    for number in track(range(warm_up + rounds), description, console=console, disable=not description):
        for name, contender in contenders.items():
            start = clock()
            contender()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if number >= warm_up:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def numbers_table(title: str, *columns: str) -> Table:
    """Return an empty table with a column of names and columns of numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table
