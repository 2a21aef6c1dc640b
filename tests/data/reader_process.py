"""Stands in for a training job, as a job of `processes` that tests kill.

It reads the tokens in the folder. If the folder has a `text` folder, it streams that with the tokenizer in `tokenizer`.

Each of WORLD processes takes its rows of every global batch and writes them to a file of the step. Once all have done
so, the position is saved, as in a checkpoint. A job that is started again resumes from there.
"""

import json
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from data import (
    BatchShare,
    Corpus,
    ShuffledDataset,
    Source,
    StreamingDataset,
    TokenArray,
    TokenDataset,
    TrainLoader,
    load_tokenizer,
)

GLOBAL_BATCH = 8


def sequences(folder: Path) -> ShuffledDataset | StreamingDataset:
    if (folder / "text").exists():
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
        corpus = Corpus((Source(name="text", path=str(folder / "text")),), tokenizer=str(folder / "tokenizer"))
        return StreamingDataset(corpus, tokenizer, threshold=0.05, length=10, seed=1, block_tokens=370)
    array = TokenArray([folder / f"{i}.npy" for i in range(3)], [207, 3, 291], np.uint16)
    return ShuffledDataset(TokenDataset(array, 10), seed=1)


def loader(folder: Path, steps: int, micro: int, rank: int = 0, world: int = 1) -> TrainLoader:
    return TrainLoader(sequences(folder), "f", steps, BatchShare(GLOBAL_BATCH, micro, rank, world))


def run_rank(folder: Path, world: int, micro: int, steps: int, rank: int, barrier) -> None:
    rank_loader = loader(folder, steps, micro, rank, world)
    state = folder / "state.json"
    if state.exists():
        rank_loader.load_state_dict(json.loads(state.read_text()))
    rows: list[list[list[int]]] = []
    for batch in rank_loader:
        rows.append(batch.tokens.tolist())
        if rank_loader.consumed % GLOBAL_BATCH == 0:
            step = rank_loader.consumed // GLOBAL_BATCH - 1
            (folder / f"{step}-{rank}-{world}.json").write_text(json.dumps(rows))
            rows = []
            barrier.wait()
            if rank == 0:
                temporary = folder / "state.tmp"
                temporary.write_text(json.dumps(rank_loader.state_dict()))
                temporary.replace(state)
            barrier.wait()


def run_ranks(folder: Path, world: int, micro: int, steps: int) -> None:
    """Run the ranks of a job to their ends."""
    context = get_context("fork")
    barrier = context.Barrier(world)
    ranks = [
        context.Process(target=run_rank, args=(folder, world, micro, steps, rank, barrier)) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * world
