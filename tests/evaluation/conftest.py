"""The validation sets, and a tokenizer trained on them."""

import json
import lzma
from pathlib import Path

import pytest

from data import Tokenizer
from data.tokenizer import train_tokenizer
from evaluation.tasks import SETS, data_file
from tests.helpers import CHECKOUT, script

SHARED = CHECKOUT.parent / "shared" / "data" / "eval"


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both validation sets."""
    if SHARED.is_dir():
        return SHARED
    folder = tmp_path_factory.mktemp("sets")
    done = script("eval_data.py", f"out={folder}", cwd=folder)
    if done.returncode:
        pytest.skip(f"the validation sets cannot be downloaded: {done.stderr}")
    return folder


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
