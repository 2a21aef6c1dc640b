"""Training on text that is tokenized on the way and not kept: for a first look at a large dataset.

The tokens of an epoch are cut into blocks of sequences, and the sequences of a block are shuffled; the rest at the end
of an epoch, shorter than a sequence, is left out. A block is made again from the place in the sources where it
begins, so a position is that place and the number of sequences consumed. Every rank makes all blocks and takes its
rows of each batch: they read and tokenize the same text, but none has to know of the others, and a run may continue
on another number of them. A text that fits one block is dealt out in the order in which it would be if prepared.
"""

import itertools
import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

from common.errors import UserError
from data.batch import Batch
from data.corpus import (
    ALL_THE_SAME,
    HEAD_BYTES,
    HELD_OUT_BYTES,
    MOST_HELD_OUT,
    ONE_MORE,
    Corpus,
    corpus_tokenizer,
    too_long,
)
from data.encoding import ahead, batches
from data.sequences import ShuffledDataset, TokenDataset
from data.sources import Document, Mixture, Source, SourceError
from data.tokenizer import TextEncoder, load_tokenizer
from data.tokens import TokenArray
from data.writing import keep_tokenizer, write_manifest, write_part

#: Lots of documents, of some 4 MiB of text, that are encoded before they are needed.
MOST_AHEAD = 16


def prepare_head(corpus: Corpus, folder: Path, console: Console) -> None:
    """Prepare what must be there before a text can be streamed: the tokenizer and the held-out documents.

    The held-out documents are those among the first 32 MiB of text whose draw is below `val_fraction`, or below a
    greater number, at most 0.1, that makes them half a MiB; if there is none, reading goes on to the first. Of a text
    that ends sooner they are those that `prepare` would hold out, if `max_tokens` does not end it sooner still.

    Raises:
        ValueError: a source cannot be read, or none of its documents can be held out.
    """
    console.print("reading the first documents, to hold some out")
    recipe, commits = corpus.recipe(), corpus.commits()
    most = max(corpus.val_fraction, MOST_HELD_OUT)
    candidates: list[Document] = []  # what could be held out
    seen, size, least, greatest = 0, 0, 1.0, 0.0
    mixture = iter(Mixture(corpus.at(commits).sources))
    while (size < HEAD_BYTES or least >= most) and (document := next(mixture, None)):
        seen, size = seen + 1, size + document.size
        least, greatest = min(least, document.draw), max(greatest, document.draw)
        if document.draw < most or document.draw == least:
            candidates.append(document)
    ended = size < HEAD_BYTES or next(mixture, None) is None
    if ended and least >= greatest:
        raise UserError(ALL_THE_SAME if seen > 1 else f"the text is one document: {ONE_MORE}")
    by_draw = sorted((d.draw, d.size) for d in candidates if d.draw < most)
    sizes = itertools.accumulate(size for _, size in by_draw)
    enough = next((draw for (draw, _), size in zip(by_draw, sizes, strict=True) if size >= HELD_OUT_BYTES), most)
    threshold = max(corpus.val_fraction, math.nextafter(least if ended else enough, 1))
    threshold = min(threshold, greatest) if ended else threshold
    if corpus.tokenizer is None:
        encoder = corpus_tokenizer(corpus.at(commits), console, HEAD_BYTES, threshold)
    else:
        encoder = load_tokenizer(corpus.tokenizer)
    folder.mkdir(exist_ok=True)
    keep_tokenizer(encoder, folder)
    held_out = [document for document in candidates if document.draw < threshold]
    ids = encoder.encode([document.text for document in held_out])
    part, files = write_part(folder, 0, {"train": [], "test": list(zip(held_out, ids, strict=True))}, encoder)
    write_manifest(folder, recipe, encoder, [part], files, threshold=threshold, commits=commits)
    console.print(
        f"holding out {len(held_out):,} document{'s' * (len(held_out) != 1)}, {sum(map(len, ids)):,} tokens, "
        f"and {threshold:.2%} of the documents to come"
    )


class _Block(NamedTuple):
    """TokenDataset that are shuffled together.

    Attributes:
        place: where it begins, as a checkpoint holds it: `block`, its number; `first`, the sequences of the run before
            it; and how it is made: `source`, the place in the sources before some documents, `given`, the training
            tokens of the epoch before those, and `skip`, how many of theirs belong to the block before.
        shuffled: its sequences, in the order of the epoch whose number is the block's.
    """

    place: dict[str, Any]
    shuffled: ShuffledDataset

    @property
    def number(self) -> int:
        return self.place["block"]

    @property
    def first(self) -> int:
        return self.place["first"]


class StreamingDataset:
    """The training sequences of a streamed corpus, in the order of a run.

    Args:
        corpus: what to read.
        encoder: its tokenizer.
        threshold: documents whose draw is below are held out.
        length: inputs per sequence.
        seed: of the order.
        block_tokens: tokens in a block, about; they are in memory some four times.
    """

    def __init__(
        self, corpus: Corpus, encoder: TextEncoder, threshold: float, length: int, seed: int, block_tokens: int
    ) -> None:
        self.corpus = corpus
        self.encoder = encoder
        self.threshold = threshold
        self.length = length
        self.seed = seed
        self.block = max(1, block_tokens // length)
        self._identity = {source.name: source.identity() for source in corpus.sources}
        self._go_to({"block": 0, "first": 0, "source": None, "given": 0, "skip": 0})

    def take(self, first: int, rows: int, documents: bool = False) -> Batch:
        """Return the sequences at positions first to first + rows - 1 of the run, see `ShuffledDataset.take`.

        Raises:
            SourceError: a source cannot be read, or was not what it was when the block was made.
            ValueError: the position is before the block that was last taken from.
        """
        pieces = []
        while rows:
            block = self._block_of(first)
            here = min(rows, block.first + len(block.shuffled) - first)
            pieces.append(
                block.shuffled.take(block.number * len(block.shuffled) + first - block.first, here, documents)
            )
            first, rows = first + here, rows - here
        if len(pieces) == 1:
            return pieces[0]
        numbers = [piece.documents for piece in pieces if piece.documents is not None]
        return Batch(torch.cat([piece.tokens for piece in pieces]), documents=torch.cat(numbers) if documents else None)

    def state(self) -> dict[str, Any]:
        """Return where the block begins that was last taken from, as JSON holds it."""
        place = self._block.place if self._block else self._start
        return {"stream": {**place, "sequences": self.block, "length": self.length}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a saved place; what can be taken next is of that block or a later one.

        Raises:
            ValueError: it is a place among other blocks.
        """
        place = dict(state["stream"])
        theirs, ours = (place.pop("sequences"), place.pop("length")), (self.block, self.length)
        if theirs != ours:
            raise ValueError(
                f"the checkpoint was trained on blocks of {theirs[0]} sequences of {theirs[1]} tokens, but these are "
                f"blocks of {ours[0]} of {ours[1]}"
            )
        self._go_to(place)

    def close(self) -> None:
        """Stop reading ahead."""
        self._blocks.close()

    def _go_to(self, place: dict[str, Any]) -> None:
        self._start = place
        self._block: _Block | None = None
        self._blocks = self._make_blocks(place)

    def _block_of(self, position: int) -> _Block:
        while self._block is None or position >= self._block.first + len(self._block.shuffled):
            block = next(self._blocks, None)
            if block is None:
                raise RuntimeError("the stream is closed, or has failed")
            self._check_unchanged()
            self._block = block
        if position < self._block.first:
            raise ValueError(f"sequence {position} of the run is before the block that is in memory")
        return self._block

    def _make_blocks(self, place: dict[str, Any]) -> Generator[_Block]:
        """Yield the blocks of the run from a place on."""
        size, number, first = self.block * self.length, place["block"], place["first"]
        held: deque[_Encoded] = deque()
        skip, there, begun = place["skip"], -place["skip"], number
        for encoded in ahead(self._encoded(place), depth=min(max(1, size >> 20), MOST_AHEAD)):
            if encoded is not None:
                held.append(encoded)
                there += len(encoded.ids)
                while there > size:
                    yield self._cut(held, skip, size, number, first)
                    number, first = number + 1, first + self.block
                    skip, there = skip + size, there - size
                    while skip >= len(held[0].ids):
                        skip -= len(held.popleft().ids)
                continue
            if there > self.length:
                count = (there - 1) // self.length
                yield self._cut(held, skip, count * self.length, number, first)
                number, first = number + 1, first + count
            if number == begun:
                raise too_long(self.length, f"the training text has {there:,} tokens")
            held.clear()
            skip, there, begun = 0, 0, number

    def _cut(self, held: "deque[_Encoded]", skip: int, tokens: int, number: int, first: int) -> _Block:
        """Make a block of so many inputs."""
        begins = held[0]
        ids = np.concatenate([encoded.ids for encoded in held])[skip : skip + tokens + 1]
        starts = itertools.accumulate((len(encoded.ids) for encoded in held), initial=0)
        ends = np.concatenate([encoded.ends + start for encoded, start in zip(held, starts, strict=False)]) - skip
        array = TokenArray.in_memory(ids, ends[(ends > 0) & (ends <= len(ids))])
        place = {"block": number, "first": first, "source": begins.source, "given": begins.given, "skip": skip}
        return _Block(place, ShuffledDataset(TokenDataset(array, self.length), self.seed))

    def _encoded(self, place: dict[str, Any]) -> "Iterator[_Encoded | None]":
        """Yield the training tokens from the documents on at which a block begins, and `None` where an epoch ends."""
        source, given = place["source"], place["given"]
        while True:
            yield from self._epoch(source, given)
            yield None
            source, given = None, 0

    def _epoch(self, source: dict[str, Any] | None, given: int) -> "Iterator[_Encoded]":
        limit = self.corpus.max_tokens or math.inf
        for batch in ahead(batches(self._mixture(source))):
            texts = [document.text for document in batch.documents if document.draw >= self.threshold]
            arrays = self.encoder.encode(texts)
            ends = np.cumsum([len(ids) for ids in arrays], dtype=np.int64)
            whole = int(np.searchsorted(ends, limit - given)) + 1  # documents up to the one that reaches the limit
            arrays, ends = arrays[:whole], ends[:whole]
            if arrays:
                yield _Encoded(source, given, np.concatenate(arrays), ends)
                given += int(ends[-1])
            if given >= limit:
                return
            source = batch.state

    def _mixture(self, source: dict[str, Any] | None) -> Mixture:
        """Return the documents from a place on."""
        self._check_unchanged()
        with _as_source_error(self.corpus.sources):
            return Mixture(self.corpus.sources, source)

    def _check_unchanged(self) -> None:
        """Raise `SourceError` unless the sources are what they were."""
        with _as_source_error(self.corpus.sources):
            for own in self.corpus.sources:
                if own.identity() != self._identity[own.name]:
                    raise own.error("has changed since the stream was opened: it must stay as it is")


@contextmanager
def _as_source_error(sources: Sequence[Source]) -> Iterator[None]:
    """Raise what files that are gone cause as `SourceError`."""
    try:
        yield
    except SourceError:
        raise
    except (ValueError, OSError) as error:
        raise SourceError("sources", [source.name for source in sources], problem=f"cannot be read: {error}") from error


class _Encoded(NamedTuple):
    """Training tokens of documents encoded together.

    Attributes:
        source: place in the sources before the documents; `None`: at their beginning.
        given: training tokens of the epoch before these.
        ids: (tokens,).
        ends: (documents,) where each ends.
    """

    source: dict[str, Any] | None
    given: int
    ids: np.ndarray
    ends: np.ndarray
