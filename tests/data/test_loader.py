"""The loader deals out the same global batches to any number of ranks, from wherever it stands."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from data import ShuffledDataset, TokenDataset, TrainLoader
from data.tokenizer import train_tokenizer
from tests.conftest import CHECKOUT
from tests.data import reader_process
from tests.data.arrays import token_array


@pytest.fixture
def loader(tmp_path):
    """Make loaders over 50 sequences in three parts."""
    sequences = ShuffledDataset(
        TokenDataset(token_array(tmp_path, np.arange(501, dtype=np.uint16), 207, 3), 10), seed=1
    )

    def make(**changes) -> TrainLoader:
        settings = dict(fingerprint="f", steps=20, global_batch_size=8, micro_batch_size=8)
        return TrainLoader(sequences, **{**settings, **changes})

    return make


def written(folder) -> None:
    """Write a text of 300 short documents in two files, and a tokenizer."""
    (folder / "text").mkdir()
    lines = [json.dumps({"text": f"the {i} th document has {i % 7} words" + " and more" * (i % 7)}) for i in range(300)]
    (folder / "text" / "a.jsonl").write_text("\n".join(lines[:100]))
    (folder / "text" / "b.jsonl").write_text("\n".join(lines[100:]))
    (folder / "tokenizer").mkdir()
    train_tokenizer(lines, 400).save(folder / "tokenizer")


def global_batches(loader, world: int, micro: int, start: int = 0) -> list[list[int]]:
    """First tokens of the sequences of each step, over all ranks."""
    ranks = [loader(rank=r, world_size=world, micro_batch_size=micro) for r in range(world)]
    for rank in ranks:
        rank.load_state_dict({"sequences_consumed": start, "fingerprint": "f"})
    per_step = 8 // (world * micro)
    rows = [torch.cat([part.tokens for part in parts])[:, 0].tolist() for parts in zip(*ranks, strict=True)]
    return [[t for row in rows[i : i + per_step] for t in row] for i in range(0, len(rows), per_step)]


def test_the_global_batches_do_not_depend_on_ranks_or_micro_batch(loader):
    expected = global_batches(loader, 1, 8)
    assert len(expected) == 20
    for world, micro in ((1, 1), (1, 2), (2, 4), (2, 1), (4, 2), (8, 1)):
        assert global_batches(loader, world, micro) == expected
        assert global_batches(loader, world, micro, start=7 * 8) == expected[7:]


def test_the_position_is_one_number_and_other_tokens_are_refused(loader):
    one = loader()
    batches = iter(one)
    for _ in range(5):
        next(batches)
    assert one.state_dict() == {"sequences_consumed": 40, "skipped_batches": 0, "fingerprint": "f"}
    two = loader()
    two.load_state_dict(one.state_dict())
    assert torch.equal(next(iter(two)).tokens, next(batches).tokens)
    with pytest.raises(ValueError, match="tokens f, but these are g"):
        loader(fingerprint="g").load_state_dict(one.state_dict())


def test_batches_are_passed_over_once(loader):
    every = global_batches(lambda **k: loader(**k, steps=26), 1, 8)
    one = loader()
    batches = iter(one)
    for _ in range(5):
        next(batches)
    again = loader(skipped_batches=4)
    again.load_state_dict(one.state_dict())
    assert len(again) == len(one) == 20
    rest = iter(again)
    assert next(rest).tokens[:, 0].tolist() == every[9]
    more = loader(skipped_batches=6)
    more.load_state_dict(again.state_dict())
    assert [batch.tokens[:, 0].tolist() for batch in more] == every[12:26]


@pytest.mark.parametrize(
    ("mode", "times"),
    [
        ("stream", 5),
        pytest.param("stream", 20, marks=pytest.mark.slow),
        pytest.param("prepared", 20, marks=pytest.mark.slow),
    ],
)
def test_killed_again_and_again_on_one_to_four_ranks_nothing_is_lost_or_repeated(mode, times, tmp_path):
    """Real processes, killed at random moments, each time continued on another number of ranks."""
    if mode == "prepared":
        token_array(tmp_path, np.arange(501, dtype=np.uint16), 207, 3)
    else:
        written(tmp_path)
    steps, most, draw, kills = (1500, 60, random.Random(0), 0) if mode == "prepared" else (700, 25, random.Random(0), 0)
    state = tmp_path / "state.json"
    worlds = itertools.cycle([(4, 2), (1, 8), (2, 1), (4, 1), (2, 4), (1, 2)])

    def done() -> int:
        return json.loads(state.read_text())["sequences_consumed"] // 8 if state.exists() else 0

    while done() < steps:
        world, micro = next(worlds)
        command = [sys.executable, "-m", "tests.data.reader_process", str(tmp_path), str(world), str(micro), str(steps)]
        before, more = done(), draw.randint(1, most)
        job = subprocess.Popen(command, cwd=CHECKOUT)
        while job.poll() is None and (kills >= times or done() < before + more):
            time.sleep(0.001)
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            kills += 1
        job.wait()
    assert kills == times and done() == steps

    whole = iter(reader_process.loader(tmp_path, steps, 8))
    for step in range(steps):
        files = sorted(tmp_path.glob(f"{step}-*.json"), key=lambda file: file.stat().st_mtime_ns)
        last = files[-1].stem.split("-")[2]  # an unfinished attempt at a step may lie beside the one that counted
        ranks = [json.loads((tmp_path / f"{step}-{rank}-{last}.json").read_text()) for rank in range(int(last))]
        found = [row for parts in zip(*ranks, strict=True) for part in parts for row in part]
        assert found == next(whole).tokens.tolist(), step
