"""What tests run in processes that read datasets from a hub; results are printed as JSON in the last line."""

import json
from pathlib import Path
from typing import Any

from data import Corpus, StreamingDataset, load_tokenizer, prepare

#: Sequences that `stream` takes before its state is saved, and after.
BEFORE, AFTER = 40, 60


def prepare_and_stream(corpora: list[Corpus], streamed: Corpus, cache: Path) -> None:
    """Print fingerprints and facts of prepared corpora; the sequences of a stream, and its state within them."""
    prepared = [prepare(corpus, cache, 16) for corpus in corpora]
    print(
        json.dumps({"prepared": [[tokens.fingerprint, tokens.facts] for tokens in prepared], **stream(streamed, cache)})
    )


def resume(streamed: Corpus, cache: Path, state: dict[str, Any]) -> None:
    """Print the sequences of a stream that follow a saved state."""
    print(json.dumps(stream(streamed, cache, state)))


def stream(corpus: Corpus, cache: Path, state: dict[str, Any] | None = None) -> dict[str, Any]:
    head = prepare(corpus, cache, 16)
    pinned = corpus.pinned_to(head.facts["commits"])
    tokenizer = load_tokenizer(str(head.folder))
    dataset = StreamingDataset(pinned, tokenizer, head.facts["threshold"], 16, 7, block_tokens=400)
    if state is None:
        dataset.take(0, BEFORE)
        state = dataset.state()
    else:
        dataset.load_state(state)
    rows = dataset.take(BEFORE, AFTER).tolist()
    dataset.close()
    return {"rows": rows, "state": state, "commits": head.facts["commits"]}
