"""Batches of documents on their way to the tokenizer, each stage in its own thread."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from data.sources import Document, Mixture

#: Bytes of text per call of the tokenizer: enough to use all cores, and few enough to show progress.
BATCH_BYTES = 4 << 20

Item = TypeVar("Item")


def document_batches(
    mixture: Mixture, batch_bytes: int = BATCH_BYTES
) -> Iterator[tuple[list[Document], dict[str, Any]]]:
    """Yield the documents of a mixture in batches of at least `batch_bytes`, but for the last; each with its state."""
    documents: list[Document] = []
    size = 0
    for document in mixture:
        documents.append(document)
        size += document.size
        if size >= batch_bytes:
            yield documents, mixture.state()
            documents, size = [], 0
    if documents:
        yield documents, mixture.state()


def prefetch(items: Iterable[Item], depth: int = 1, pools: list[ThreadPoolExecutor] | None = None) -> Iterator[Item]:
    """Yield the items while a thread computes up to `depth` more. Its pool is added to `pools`, to wait for its end."""
    iterator, end = iter(items), object()  # a sentinel, because a future cannot raise StopIteration
    pool = ThreadPoolExecutor(1)
    if pools is not None:
        pools.append(pool)
    try:
        futures = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := futures.popleft().result()) is not end:
            futures.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]
    finally:
        # Without waiting: the garbage collector may close a generator while it holds the locks that waiting needs.
        pool.shutdown(wait=False, cancel_futures=True)
