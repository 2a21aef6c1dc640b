"""The held-out sequences on which a run is evaluated, while it trains and at its end."""

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from rich.console import Console

from common.text import SECONDS_BETWEEN_LINES
from data import Batch, TokenDataset, Tokenizer


class ValidationBatch(NamedTuple):
    """Held-out sequences that one process evaluates at once.

    Attributes:
        batch: the sequences.
        tokens: number of its tokens that count. It is 0 if another process counts them, and this process evaluates them
            only to make as many forward passes.
    """

    batch: Batch
    tokens: int


class ValidationSet:
    """The held-out sequences in batches, in order, once; distributed over the processes of a run.

    Each process gets the same number of batches, as sharded models need.

    Args:
        sequences: held-out sequences.
        batch_size: sequences in a batch.
        max_tokens: number of tokens that are evaluated, rounded down to sequences, but at least one; `None`: all.
        console: reports the progress now and then.
        rank: rank of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        sequences: TokenDataset,
        batch_size: int,
        max_tokens: float | None,
        console: Console,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        limit = len(sequences) if max_tokens is None else max(1, int(max_tokens) // sequences.length)
        self.sequences = sequences
        self.batch_size = batch_size
        self.count = min(len(sequences), limit)
        self.tokens = self.count * sequences.length
        self.console = console
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Batches of this process."""
        return math.ceil(math.ceil(self.count / self.batch_size) / self.world_size)

    def __iter__(self) -> Iterator[ValidationBatch]:
        last_line = time.monotonic()
        for number in range(len(self)):
            if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                self.console.print(f"evaluated {number / len(self):.0%}")
            first = (number * self.world_size + self.rank) * self.batch_size
            counts = first < self.count
            first = first if counts else 0
            rows = np.arange(first, min(first + self.batch_size, self.count))
            tokens = len(rows) * self.sequences.length if counts else 0
            yield ValidationBatch(Batch(self.sequences.batch(rows)), tokens)

    def bytes(self, tokenizer: Tokenizer) -> int:
        """Return the length in UTF-8 of the text of the predicted tokens.

        A sequence begins where the one before ends, which may be within a character: whole documents are decoded.
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
    """Return the bits per byte of a text, which can be compared between tokenizers.

    Args:
        loss: mean loss in nats per token.
        tokens: number of tokens of the text.
        size: number of its bytes.
    """
    return loss * tokens / size / math.log(2)
