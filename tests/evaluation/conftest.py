"""Items of the validation sets, and a tokenizer trained on them."""

import json
import lzma
from pathlib import Path

import pytest

from data import Tokenizer
from data.tokenizer import train_tokenizer
from evaluation.tasks import SETS, data_file


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
