"""Documents in batches on their way through the tokenizer, each stage in a thread of its own."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from data.sources import Document, Mixture

#: Text given to the tokenizer at once: enough to keep all cores busy, little enough to see progress.
BATCH_BYTES = 4 << 20

Item = TypeVar("Item")


class Documents(NamedTuple):
    """Documents to be encoded together, and the place in the sources after them."""

    documents: list[Document]
    state: dict[str, Any]


def batches(mixture: Mixture, batch_bytes: int = BATCH_BYTES) -> Iterator[Documents]:
    """Yield the documents of a mixture, about so many bytes at a time."""
    documents: list[Document] = []
    size = 0
    for document in mixture:
        documents.append(document)
        size += document.size
        if size >= batch_bytes:
            yield Documents(documents, mixture.state())
            documents, size = [], 0
    if documents:
        yield Documents(documents, mixture.state())


def ahead(items: Iterable[Item], depth: int = 1) -> Iterator[Item]:
    """Yield the items, up to `depth` more being made in a thread meanwhile."""
    iterator, end = iter(items), object()  # a StopIteration cannot come out of a future
    pool = ThreadPoolExecutor(1)
    try:
        futures = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := futures.popleft().result()) is not end:
            futures.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)
