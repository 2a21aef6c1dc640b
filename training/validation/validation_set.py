"""What a run is evaluated on: held-out text, while it trains and at its end."""

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from rich.console import Console

from common.text import SECONDS_BETWEEN_LINES
from data import Batch, TokenDataset, Tokenizer


class Share(NamedTuple):
    """What one process evaluates at once.

    Attributes:
        batch: of held-out sequences.
        tokens: of it that count; 0 if another process counts them, and this one computes them to keep pace.
    """

    batch: Batch
    tokens: int


class ValidationSet:
    """The held-out sequences in batches, in order, once; dealt out to the processes of a run.

    Each process gets as many batches as any other, which sharded models need.

    Args:
        sequences: to evaluate.
        batch_size: sequences in a batch.
        most_tokens: so many sequences are taken as these tokens make up, one at least; `None`: all.
        console: told now and then how far it is.
        rank: of this process.
        processes: how many there are.
    """

    def __init__(
        self,
        sequences: TokenDataset,
        batch_size: int,
        most_tokens: float | None,
        console: Console,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        most = len(sequences) if most_tokens is None else max(1, int(most_tokens) // sequences.length)
        self.sequences = sequences
        self.batch_size = batch_size
        self.count = min(len(sequences), most)
        self.tokens = self.count * sequences.length
        self.console = console
        self.rank = rank
        self.processes = processes

    def __len__(self) -> int:
        """Batches of this process."""
        return math.ceil(math.ceil(self.count / self.batch_size) / self.processes)

    def __iter__(self) -> Iterator[Share]:
        said = time.monotonic()
        for number in range(len(self)):
            if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                self.console.print(f"evaluated {number / len(self):.0%}")
            first = (number * self.processes + self.rank) * self.batch_size
            counts = first < self.count
            first = first if counts else 0
            rows = np.arange(first, min(first + self.batch_size, self.count))
            yield Share(Batch(self.sequences.batch(rows)), len(rows) * self.sequences.length if counts else 0)

    def bytes(self, tokenizer: Tokenizer) -> int:
        """Return the length of the text of the tokens that are predicted, in UTF-8.

        A sequence begins where the one before ends, within a character maybe: whole documents are decoded.
        """
        length, size = self.sequences.length, 0
        ids: list[int] = []
        for row in range(self.count):
            ids += self.sequences.batch(np.array([row]))[0, 1 : length + 1].tolist()
            last = row == self.count - 1
            while ids and (last or tokenizer.end in ids):
                end = ids.index(tokenizer.end) + 1 if tokenizer.end in ids else len(ids)
                size += len(tokenizer.tokenizer.decode(ids[:end], skip_special_tokens=True).encode())
                del ids[:end]
        return size


def bits_per_byte(loss: float, tokens: int, size: int) -> float:
    """Return what a text costs, in bits per byte of it: comparable between tokenizers.

    Args:
        loss: mean, in nats per token.
        tokens: of the text.
        size: of the text, in bytes.
    """
    return loss * tokens / size / math.log(2)
