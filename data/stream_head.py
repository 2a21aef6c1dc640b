"""Prepares what a streamed text needs: the tokenizer and the held-out documents."""

import itertools
import math
from pathlib import Path

from rich.console import Console

from common.errors import UserError
from common.files import make_dir, remove_leftovers
from data.corpus import ALL_THE_SAME, HEAD_BYTES, HELD_OUT_BYTES, MAX_HELD_OUT, ONE_MORE, Corpus, corpus_tokenizer
from data.sources import Document, Mixture
from data.tokenizer import load_tokenizer
from data.writing import write_manifest, write_part


def prepare_head(corpus: Corpus, folder: Path, console: Console) -> None:
    """Write the tokenizer and the held-out documents of a streamed corpus.

    The documents are chosen from the first 32 MiB of text. Those with a `hash_fraction` below a threshold are held out.
    The threshold is `val_fraction`, or if that holds out less than half a MiB, a larger one of at most 0.1. If no
    document is below the limit, reading continues up to the first that is. A text that ends within the 32 MiB is split
    as by `prepare`, unless `max_tokens` ends it earlier there.
    """
    console.print("reading the first documents, to hold some out")
    cache_key, commits = corpus.cache_key(), corpus.commits()
    pinned = corpus.pinned_to(commits)
    held_out, threshold = _choose_held_out(pinned)
    if corpus.tokenizer is None:
        tokenizer = corpus_tokenizer(pinned, console, HEAD_BYTES, threshold)
    else:
        tokenizer = load_tokenizer(corpus.tokenizer)
    pinned.check_content()
    make_dir(folder)
    remove_leftovers(folder)
    tokenizer.save(folder)
    ids = tokenizer.encode([document.text for document in held_out])
    encoded = {"train": [], "test": list(zip(held_out, ids, strict=True))}
    part, files = write_part(folder, 0, encoded, tokenizer)
    write_manifest(folder, cache_key, corpus.paths(), tokenizer, [part], files, threshold=threshold, commits=commits)
    console.print(
        f"holding out {len(held_out):,} document{'s' * (len(held_out) != 1)}, {sum(map(len, ids)):,} tokens, "
        f"and {threshold:.2%} of the documents to come"
    )


def _choose_held_out(corpus: Corpus) -> tuple[list[Document], float]:
    """Return the held-out documents of the head, in their order, and the threshold below which they lie."""
    limit = max(corpus.val_fraction, MAX_HELD_OUT)
    candidates: list[Document] = []
    count, size, lowest, highest = 0, 0, 1.0, 0.0
    documents = iter(Mixture(corpus.sources))
    while (size < HEAD_BYTES or lowest >= limit) and (document := next(documents, None)):
        count, size = count + 1, size + document.size
        fraction = document.hash_fraction
        lowest, highest = min(lowest, fraction), max(highest, fraction)
        if fraction < limit or fraction == lowest:
            candidates.append(document)
    if size < HEAD_BYTES or next(documents, None) is None:  # the text has ended
        if lowest >= highest:
            raise UserError(ALL_THE_SAME if count > 1 else f"the text is one document: {ONE_MORE}")
        threshold = min(max(corpus.val_fraction, math.nextafter(lowest, 1)), highest)
    else:
        by_fraction = sorted((d.hash_fraction, d.size) for d in candidates if d.hash_fraction < limit)
        sizes = itertools.accumulate(size for _, size in by_fraction)
        sufficient = (f for (f, _), size in zip(by_fraction, sizes, strict=True) if size >= HELD_OUT_BYTES)
        threshold = max(corpus.val_fraction, math.nextafter(next(sufficient, limit), 1))
    return [document for document in candidates if document.hash_fraction < threshold], threshold
