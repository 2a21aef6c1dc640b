"""The loader yields the same global batches on any number of ranks, and resumes from any position."""

import itertools
import json
import random
import time

import numpy as np
import pytest
import torch

from data import BatchShare, ShuffledDataset, TokenDataset, TrainLoader
from data.tokenizer import train_tokenizer
from tests.data import reader_process
from tests.data.arrays import token_array
from tests.data.processes import Job
from tests.helpers import SLOW


@pytest.fixture
def loader(tmp_path):
    """Make loaders over 50 sequences in three parts."""
    sequences = ShuffledDataset(
        TokenDataset(token_array(tmp_path, np.arange(501, dtype=np.uint16), 207, 3), 10), seed=1
    )

    def make(micro_batch_size: int = 8, rank: int = 0, world_size: int = 1, **changes) -> TrainLoader:
        settings = dict(fingerprint="f", steps=20, share=BatchShare(8, micro_batch_size, rank, world_size))
        return TrainLoader(sequences, **{**settings, **changes})

    return make


def write_text(folder) -> None:
    """Write 300 short documents in two files, and a tokenizer."""
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


def test_global_batches_do_not_depend_on_ranks_or_micro_batch(loader):
    expected = global_batches(loader, 1, 8)
    assert len(expected) == 20
    for world, micro in ((1, 1), (1, 2), (2, 4), (2, 1), (4, 2), (8, 1)):
        assert global_batches(loader, world, micro) == expected
        assert global_batches(loader, world, micro, start=7 * 8) == expected[7:]


def test_position_is_one_number_and_other_tokens_are_rejected(loader):
    first = loader()
    batches = iter(first)
    for _ in range(5):
        next(batches)
    assert first.state_dict() == {"sequences_consumed": 40, "skipped_batches": 0, "fingerprint": "f"}
    resumed = loader()
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(next(iter(resumed)).tokens, next(batches).tokens)
    with pytest.raises(ValueError, match="tokens f, but these are g"):
        loader(fingerprint="g").load_state_dict(first.state_dict())


def test_batches_are_skipped_once(loader):
    all_batches = global_batches(lambda **k: loader(**k, steps=26), 1, 8)
    first = loader()
    batches = iter(first)
    for _ in range(5):
        next(batches)
    resumed = loader(skipped_batches=4)
    resumed.load_state_dict(first.state_dict())
    assert len(resumed) == len(first) == 20 and len(loader(2, rank=1, world_size=2)) == 40
    assert next(iter(resumed)).tokens[:, 0].tolist() == all_batches[9]
    resumed_again = loader(skipped_batches=6)
    resumed_again.load_state_dict(resumed.state_dict())
    assert [batch.tokens[:, 0].tolist() for batch in resumed_again] == all_batches[12:26]
    from_the_start = loader(skipped_batches=2)
    assert [batch.tokens[:, 0].tolist() for batch in from_the_start] == all_batches[2:22]
    with pytest.raises(ValueError, match="the checkpoint has skipped 2 more batches than this run"):
        loader(skipped_batches=4).load_state_dict(resumed_again.state_dict())


def test_new_data_begin_with_their_first_batch(loader):
    """After a rewind to the fork they begin with the first batch that was not skipped."""
    all_batches = global_batches(lambda **k: loader(**k, steps=26), 1, 8)
    other = {"sequences_consumed": 40, "skipped_batches": 0, "fingerprint": "of other data"}
    for skipped in (0, 3):
        new = loader(new_data_after=5, skipped_batches=skipped)
        new.load_state_dict(other)
        batches = iter(new)
        first = [next(batches).tokens[:, 0].tolist() for _ in range(4)]
        assert first == all_batches[skipped : skipped + 4]
        resumed = loader(skipped_batches=skipped)
        resumed.load_state_dict(json.loads(json.dumps(new.state_dict())))
        rest = [batch.tokens[:, 0].tolist() for batch in resumed]
        assert rest == all_batches[skipped + 4 : skipped + 15], "20 steps, 5 of them in the other data"
        assert resumed.state_dict()["data_start"] == 40
    with pytest.raises(ValueError, match="it is before its data"):
        loader().load_state_dict(other | {"fingerprint": "f", "data_start": 48})


@pytest.mark.parametrize(("mode", "kills"), [("stream", 3), ("prepared", 3), SLOW("stream", 10), SLOW("prepared", 10)])
def test_killed_jobs_on_one_to_four_ranks_lose_and_repeat_nothing(mode, kills, tmp_path):
    """Real processes are killed at random moments, and resumed on another number of ranks each time."""
    if mode == "prepared":
        token_array(tmp_path, np.arange(501, dtype=np.uint16), 207, 3)
    else:
        write_text(tmp_path)
    rng, steps = random.Random(0), 30 * (kills + 1)
    state = tmp_path / "state.json"
    worlds = itertools.cycle([(4, 2), (1, 8), (2, 1), (4, 1), (2, 4), (1, 2)])

    def done() -> int:
        return json.loads(state.read_text())["sequences_consumed"] // 8 if state.exists() else 0

    for kill in range(kills + 1):
        before, steps_until_kill = done(), rng.randint(1, 25)
        job = Job(tmp_path / "output", reader_process.run_ranks, tmp_path, *next(worlds), steps)
        while job.running and (kill == kills or done() < before + steps_until_kill):
            time.sleep(0.001)
        job.kill()
        assert job.status in (-9, 0), job.output
    assert job.status == 0 and done() == steps, job.output

    reference = iter(reader_process.loader(tmp_path, steps, 8))
    for step in range(steps):
        files = sorted(tmp_path.glob(f"{step}-*.json"), key=lambda file: file.stat().st_mtime_ns)
        last = files[-1].stem.split("-")[2]  # earlier files may be of unfinished attempts at the step
        ranks = [json.loads((tmp_path / f"{step}-{rank}-{last}.json").read_text()) for rank in range(int(last))]
        rows = [row for parts in zip(*ranks, strict=True) for part in parts for row in part]
        assert rows == next(reference).tokens.tolist(), step


def test_rewinds_that_a_later_checkpoint_does_not_know_are_refused(loader):
    """The record of the rewinds is of another run, or was edited."""
    state = loader(skipped_batches=2).state_dict()
    loader(skipped_batches=5, skipped_before=2).load_state_dict(state)  # then back to the checkpoint's own step
    with pytest.raises(ValueError, match=r"rewinds\.json has 3 skipped batches more than the checkpoint"):
        loader(skipped_batches=5, skipped_before=5).load_state_dict(state)
