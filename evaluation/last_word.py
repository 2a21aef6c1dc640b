"""The task `last_word`: the last word of passages that runs on `data=sotu` hold out.

LAMBADA (arXiv 1606.06031) asks for the last word of passages, too. Its passages were chosen so that people find the
word. These are not chosen: a passage is whole sentences of one State of the Union address, in their order. Models that
are at chance in other tasks differ here, because the score is a loss.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from data.sources import Document, Source, Stream

NAME = "last_word"

#: Share of the addresses that are held out, by the hash of their text: the default of `data.val_fraction`.
HELD_OUT = 0.05
#: Minimum number of words in a passage, its last one included.
MIN_WORDS = 20
#: The last word of a passage ends a sentence. A capital or fewer letters may be part of an abbreviation.
LAST_WORD = re.compile(r"([a-z]{4,})[.!?]")


def passages(text: str) -> Iterator[dict[str, str]]:
    """Yield the `context` and the `word` of each passage of a text. They do not overlap, and all spaces are single."""
    words: list[str] = []
    for word in text.split():
        words.append(word)
        if len(words) >= MIN_WORDS and (last := LAST_WORD.fullmatch(word)):
            yield {"context": " ".join(words[:-1]), "word": last[1]}
            words = []


def held_out_documents() -> Iterator[Document]:
    """Yield the held-out addresses; raise `SourceError` if the package `sotu` is not installed."""
    return (document for document in Stream(Source(name="text", sotu=True)) if document.hash_fraction < HELD_OUT)


def write_task(folder: Path) -> Path:
    """Write the items of the task and its definition for lm-eval to a folder, and return the definition's path.

    Raises:
        SourceError: the package `sotu` is not installed.
        ValueError: it has no held-out passage.
    """
    items = [item for document in held_out_documents() for item in passages(document.text)]
    if not items:
        raise ValueError("the package sotu has no held-out passage")
    file, definition = folder / f"{NAME}.jsonl", folder / f"{NAME}.yaml"
    file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    text = yaml.safe_dump(_definition(file, folder))
    definition.write_text(f"{text}process_results: !function {__name__}.{word_scores.__name__}\n", encoding="utf-8")
    return definition


def word_scores(item: dict[str, str], results: Iterable[tuple[float, bool]]) -> dict[str, float]:
    """Return the `loss` of the word in nats, a sum over its tokens, and whether each token is the most likely one."""
    ((log_likelihood, is_greedy),) = results
    return {"loss": -log_likelihood, "acc": float(is_greedy)}


def _definition(file: Path, cache: Path) -> dict[str, Any]:
    return {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"validation": str(file)},
            "cache_dir": str(cache),
            "keep_in_memory": True,
        },
        "validation_split": "validation",
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + word}}",
        "metric_list": [
            {"metric": "loss", "aggregation": "mean", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
        "metadata": {"version": 1.0},
    }
