"""Damaged checkpoints are detected: any byte that changes, and any cut, whatever part of the format it hits."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import same
from training.checkpoint.format import is_valid, load_full, publish, write

#: What Lightning saves, with less in it.
STATE = {
    "state_dict": {"model.a": torch.arange(35.0).view(7, 5), "model.b": torch.ones(3, dtype=torch.bfloat16)},
    "optimizer_states": [{"state": {"model.a": {"step": torch.tensor(3.0), "exp_avg": torch.ones(7, 5)}}}],
    "callbacks": {"TimedClippingCallback": {"count": 3, "rows": [1.5, None, "text"]}},
    "global_step": 3,
}


@pytest.fixture(scope="module", params=["file", "sharded"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of one file, and one of a sharded run; tests restore what they damage."""
    folder = tmp_path_factory.mktemp(request.param)
    path = folder / "step-00000003.ckpt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # one process saves and loads
        write(STATE, folder / "temporary", sharded=request.param == "sharded", is_rank0=True, group=None)
        publish(folder / "temporary", path)
        yield path


def files(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]


def is_harmless(checkpoint: Path, original: dict[str, Any]) -> bool:
    """Whether a checkpoint loads as before: a few bytes of an archive, such as dates, are not read."""
    return same(load_full(checkpoint), original)


def check_changed_byte(checkpoint: Path, original: dict[str, Any], file: Path, position: int, mask: int) -> None:
    """Change bits of a byte; the checkpoint must not be valid, or be the same."""
    content = file.read_bytes()
    damaged = bytearray(content)
    damaged[position] ^= mask
    file.write_bytes(damaged)
    try:
        if is_valid(checkpoint):
            assert is_harmless(checkpoint, original), f"byte {position} of {file.name}, changed by {mask:#x}"
    finally:
        file.write_bytes(content)


def check_random_damage(checkpoint: Path, examples: int) -> None:
    """Change random bytes and cut files at random; one byte in four is of the last 500, where the directory is."""
    original = load_full(checkpoint)

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(files(checkpoint)))
        size = file.stat().st_size
        first = data.draw(st.sampled_from([0, 0, 0, max(0, size - 500)]))
        position = data.draw(st.integers(first, size - 1))
        check_changed_byte(checkpoint, original, file, position, data.draw(st.integers(1, 255)))
        content = file.read_bytes()
        file.write_bytes(content[:position])
        try:
            assert not is_valid(checkpoint), f"{file.name} is cut after {position} of {size} bytes"
        finally:
            file.write_bytes(content)

    check()


def test_undamaged_checkpoint_is_valid_and_complete(checkpoint):
    assert is_valid(checkpoint)
    loaded = load_full(checkpoint)
    assert loaded["callbacks"] == STATE["callbacks"] and loaded["global_step"] == 3
    name = "state_dict.model.a" if checkpoint.is_dir() else "state_dict"
    expected = STATE["state_dict"]
    assert same(loaded[name], expected["model.a"] if checkpoint.is_dir() else expected)


def test_changed_bytes_and_cuts_are_detected(checkpoint):
    check_random_damage(checkpoint, 40)


@pytest.mark.slow
def test_many_changed_bytes_and_cuts_are_detected(checkpoint):
    check_random_damage(checkpoint, 2000)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["finished_run", "sharded_run"])
def test_changed_bytes_and_cuts_of_a_real_checkpoint_are_detected(run, request, tmp_path):
    source = max((request.getfixturevalue(run) / "checkpoints").iterdir())
    copy = tmp_path / source.name
    if source.is_dir():
        copy.mkdir()
    for file in files(source):
        (copy / file.name if source.is_dir() else copy).write_bytes(file.read_bytes())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        check_random_damage(copy, 200)


def test_checkpoint_whose_directory_torch_cannot_read_is_damaged(checkpoint):
    """Python's zipfile ignores some of these bytes: each byte of the last 300 of each file is changed."""
    original = load_full(checkpoint)
    for file in files(checkpoint):
        attributes = [match.end() + 38 - 4 for match in re.finditer(rb"PK\x01\x02", file.read_bytes())]
        for position in attributes:  # torch reads nothing of an entry with the attribute of a folder
            check_changed_byte(checkpoint, original, file, position, 0x10)
    for file in files(checkpoint):
        size = file.stat().st_size
        for position in range(max(0, size - 300), size, 1 if size < 300 or not checkpoint.is_dir() else 7):
            check_changed_byte(checkpoint, original, file, position, 0x08)


@pytest.mark.parametrize("checkpoint", ["sharded"], indirect=True)
def test_missing_file_of_a_sharded_checkpoint_is_detected(checkpoint):
    for file in files(checkpoint):
        moved = file.rename(checkpoint.parent / "moved")
        assert not is_valid(checkpoint), file.name
        moved.rename(file)
    assert is_valid(checkpoint)
