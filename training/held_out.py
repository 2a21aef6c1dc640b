"""What a finished run is evaluated on."""

import math
import time
from collections.abc import Iterator

import numpy as np
from rich.console import Console

from data import Batch, Sequences
from training.progress import SECONDS_BETWEEN_LINES


class HeldOut:
    """The held-out sequences in batches, in order, once.

    Args:
        sequences: to evaluate.
        batch_size: sequences in a batch.
        most_tokens: so many sequences are taken as these tokens make up, one at least; `None`: all.
        console: told now and then how far it is.
    """

    def __init__(self, sequences: Sequences, batch_size: int, most_tokens: float | None, console: Console) -> None:
        most = len(sequences) if most_tokens is None else max(1, int(most_tokens) // sequences.length)
        self.sequences = sequences
        self.batch_size = batch_size
        self.count = min(len(sequences), most)
        self.tokens = self.count * sequences.length
        self.console = console

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        said = time.monotonic()
        for first in range(0, self.count, self.batch_size):
            if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                self.console.print(f"evaluated {first / self.count:.0%}")
            rows = np.arange(first, min(first + self.batch_size, self.count))
            yield Batch(self.sequences.batch(rows))
