"""Items of the validation sets, and a tokenizer trained on them."""

import json
import lzma
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from data import Tokenizer
from data.tokenizer import train_tokenizer
from evaluation.tasks import SETS, data_file, load_tasks

#: Items of HellaSwag in the fixture `load`.
HELLASWAG_ITEMS = 1000


@pytest.fixture(scope="session")
def load(sets: Path) -> Callable[..., dict[str, Any]]:
    """`load_tasks` with the validation sets, once for each task and number of examples.

    Of HellaSwag, which lm-eval reads twice from beginning to end in each evaluation, only the first items stay.
    """

    @cache
    def load(task: str, num_fewshot: int = 0) -> dict[str, Any]:
        loaded = load_tasks(task, [sets], num_fewshot)
        if task == "hellaswag":
            data = loaded["tasks"][task].dataset
            data["validation"] = data["validation"].select(range(HELLASWAG_ITEMS))
        return loaded

    return load


@cache
def items(folder: Path, task: str) -> list[dict]:
    """Return the items of a validation set."""
    path = data_file(folder, task)
    assert path is not None and SETS[task].file in path.name
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def tokenizer(sets: Path) -> Tokenizer:
    """A byte-level BPE trained on the sentences of WinoGrande."""
    return train_tokenizer((item["sentence"] for item in items(sets, "winogrande")), 2000)
