"""Training on text that is tokenized while training and not kept: for a first look at a large dataset.

The tokens of an epoch are cut into blocks of sequences, and the sequences of each block are shuffled. The remainder at
the end of an epoch, shorter than a sequence, is dropped. A block can be recomputed from the state of the sources where
it starts, so a checkpoint holds that state. Every rank computes all blocks, without communication. A text that fits in
one block has the same order as if it were prepared.
"""

import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.reading import check_record
from data.content import ContentIndex
from data.corpus import Corpus, text_too_short
from data.encoding import document_batches, prefetch
from data.sequences import ShuffledDataset, TokenDataset
from data.shapes import StreamState
from data.sources import Mixture, Source, SourceError
from data.tokenizer import Tokenizer
from data.tokens import TokenArray

#: Maximum number of document batches, of about 4 MiB of text each, that are encoded ahead.
MAX_PREFETCH = 16


class BlockStart(NamedTuple):
    """Where a block starts, as plain values for a checkpoint.

    Attributes:
        block: number of the block in the run.
        first_sequence: sequences of the run before the block.
        mixture: state of the sources before the documents in which the block starts; `None` at their beginning.
        epoch_tokens: training tokens of the epoch before these documents.
        skipped_tokens: tokens of these documents that belong to earlier blocks.
    """

    block: int = 0
    first_sequence: int = 0
    mixture: dict[str, Any] | None = None
    epoch_tokens: int = 0
    skipped_tokens: int = 0


class _Block(NamedTuple):
    """Sequences that are shuffled together, in the order of the epoch with the block's number."""

    start: BlockStart
    shuffled: ShuffledDataset

    @property
    def first(self) -> int:
        return self.start.first_sequence

    @property
    def end(self) -> int:
        return self.first + len(self.shuffled)


class _EncodedDocuments(NamedTuple):
    """Training tokens of documents that were encoded together; `mixture` and `epoch_tokens` as in `BlockStart`."""

    mixture: dict[str, Any] | None
    epoch_tokens: int
    ids: np.ndarray


class StreamingDataset:
    """The training sequences of a streamed corpus, each of `length` inputs, in the order of a run.

    Documents with a `hash_fraction` below the threshold are held out. A block has at most `block_tokens` tokens, but at
    least one sequence; about four times as many are in memory.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, threshold: float, length: int, seed: int, block_tokens: int
    ) -> None:
        self.corpus = corpus.with_content(ContentIndex())
        self.tokenizer = tokenizer
        self.threshold = threshold
        self.length = length
        self.seed = seed
        self.block_sequences = max(1, block_tokens // length)
        self._restart(BlockStart())

    def take(self, first: int, rows: int) -> Tensor:
        """Return the sequences at positions first to first + rows - 1 of the run, from the current block on."""
        batches = []
        while rows:
            block = self._block_at(first)
            count = min(rows, block.end - first)
            position = block.start.block * len(block.shuffled) + first - block.first
            batches.append(block.shuffled.take(position, count))
            first, rows = first + count, rows - count
        return torch.cat(batches)

    def state(self) -> dict[str, Any]:
        """Return the start of the current block, as plain values for JSON."""
        start = self._block.start if self._block else self._start
        return {"stream": {**start._asdict(), "block_sequences": self.block_sequences, "length": self.length}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a saved state; raise `ValueError` if it is none, or has other block or sequence lengths."""
        check_record(StreamState, state.get("stream"))
        start = {name: state["stream"][name] for name in StreamState.model_fields}
        sequences, length = start.pop("block_sequences"), start.pop("length")
        if (sequences, length) != (self.block_sequences, self.length):
            raise UserError(
                f"the checkpoint was trained on blocks of {sequences} sequences of {length} tokens, but these are "
                f"blocks of {self.block_sequences} of {self.length}"
            )
        self._restart(BlockStart(**start))

    def close(self) -> None:
        """Stop the threads that read ahead, and wait for their end."""
        self._blocks.close()
        for pool in self._pools:
            pool.shutdown()

    def _restart(self, start: BlockStart) -> None:
        self._start = start
        self._block: _Block | None = None
        self._pools: list[ThreadPoolExecutor] = []
        self._blocks = self._make_blocks(start)

    def _block_at(self, position: int) -> _Block:
        """Make the block with a position of the run the current one, and return it."""
        while self._block is None or position >= self._block.end:
            block = next(self._blocks, None)
            if block is None:
                raise RuntimeError("the stream is closed, or has failed")
            self._check_unchanged()
            self._block = block
        if position < self._block.first:
            raise ValueError(f"sequence {position} of the run is before the block that is in memory")
        return self._block

    def _make_blocks(self, start: BlockStart) -> Generator[_Block]:
        """Yield the blocks of the run, beginning with the one at `start`."""
        block_tokens = self.block_sequences * self.length
        depth = min(max(1, block_tokens >> 20), MAX_PREFETCH)
        buffer: deque[_EncodedDocuments] = deque()
        number, first, skipped = start.block, start.first_sequence, start.skipped_tokens
        available, first_of_epoch = -skipped, number  # tokens in the buffer that are in no block yet
        for encoded in prefetch(self._encode(start), depth, self._pools):
            if encoded is not None:
                buffer.append(encoded)
                available += len(encoded.ids)
                while available > block_tokens:
                    yield self._cut(buffer, block_tokens, number, first, skipped)
                    number, first = number + 1, first + self.block_sequences
                    skipped, available = skipped + block_tokens, available - block_tokens
                    while skipped >= len(buffer[0].ids):
                        skipped -= len(buffer.popleft().ids)
                continue
            if available > self.length:  # the last block of an epoch is shorter
                sequences = (available - 1) // self.length
                yield self._cut(buffer, sequences * self.length, number, first, skipped)
                number, first = number + 1, first + sequences
            if number == first_of_epoch:
                raise text_too_short(self.length, f"the training text has {available:,} tokens")
            buffer.clear()
            skipped, available, first_of_epoch = 0, 0, number

    def _cut(self, buffer: deque[_EncodedDocuments], tokens: int, number: int, first: int, skipped: int) -> _Block:
        """Return the block of `tokens` inputs that follow the skipped tokens of the buffer."""
        start = BlockStart(number, first, buffer[0].mixture, buffer[0].epoch_tokens, skipped)
        ids = np.concatenate([encoded.ids for encoded in buffer])[skipped : skipped + tokens + 1]
        return _Block(start, ShuffledDataset(TokenDataset(TokenArray.in_memory(ids), self.length), self.seed))

    def _encode(self, start: BlockStart) -> Iterator[_EncodedDocuments | None]:
        """Yield the training tokens from the documents at `start` on, and `None` at the end of each epoch."""
        mixture, epoch_tokens = start.mixture, start.epoch_tokens
        while True:
            yield from self._encode_epoch(mixture, epoch_tokens)
            yield None
            mixture, epoch_tokens = None, 0

    def _encode_epoch(self, mixture: dict[str, Any] | None, epoch_tokens: int) -> Iterator[_EncodedDocuments]:
        limit = self.corpus.max_tokens or math.inf
        for documents, state in prefetch(document_batches(self._open(mixture)), pools=self._pools):
            texts = [document.text for document in documents if document.hash_fraction >= self.threshold]
            arrays = self.tokenizer.encode(texts)
            ends = np.cumsum([len(ids) for ids in arrays], dtype=np.int64)
            count = int(np.searchsorted(ends, limit - epoch_tokens)) + 1  # up to the document that reaches the limit
            arrays, ends = arrays[:count], ends[:count]
            if arrays:
                yield _EncodedDocuments(mixture, epoch_tokens, np.concatenate(arrays))
                epoch_tokens += int(ends[-1])
            if epoch_tokens >= limit:
                return
            mixture = state

    def _open(self, state: dict[str, Any] | None) -> Mixture:
        self._check_unchanged()
        with _as_source_error(self.corpus.sources):
            return Mixture(self.corpus.sources, state)

    def _check_unchanged(self) -> None:
        """Raise `SourceError` if a text is not the one that the corpus is pinned to, or was when this was made."""
        with _as_source_error(self.corpus.sources):
            self.corpus.check_content()


@contextmanager
def _as_source_error(sources: Sequence[Source]) -> Iterator[None]:
    """Raise errors about files that have been removed as `SourceError`."""
    try:
        yield
    except SourceError:
        raise
    except (ValueError, OSError) as error:
        raise SourceError("sources", [source.name for source in sources], problem=f"cannot be read: {error}") from error
