"""A stand-in for a training job: `consume.py FOLDER WORLD MICRO STEPS`, killed and started again by the tests.

It reads the tokens in the folder, or if there is a `text` folder in it, streams that with the tokenizer beside it.

Each of WORLD processes takes its rows of every global batch and writes them to a file of the step; after all have, the
position is saved, as a checkpoint would. A job that is started again goes on from there.
"""

import json
import os
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from data import (
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
        encoder = load_tokenizer(str(folder / "tokenizer"))
        corpus = Corpus((Source(name="text", path=str(folder / "text")),), tokenizer=str(folder / "tokenizer"))
        return StreamingDataset(corpus, encoder, threshold=0.05, length=10, seed=1, block_tokens=370)
    array = TokenArray([folder / f"{i}.npy" for i in range(3)], [207, 3, 291], np.uint16)
    return ShuffledDataset(TokenDataset(array, 10), seed=1)


def loader(folder: Path, steps: int, micro: int, rank: int = 0, world: int = 1) -> TrainLoader:
    return TrainLoader(sequences(folder), "f", steps, GLOBAL_BATCH, micro, rank, world)


def rank_of_a_job(folder: Path, world: int, micro: int, steps: int, rank: int, barrier) -> None:
    mine = loader(folder, steps, micro, rank, world)
    state = folder / "state.json"
    if state.exists():
        mine.load_state_dict(json.loads(state.read_text()))
    rows: list[list[list[int]]] = []
    for batch in mine:
        rows.append(batch.tokens.tolist())
        if mine.consumed % GLOBAL_BATCH == 0:
            step = mine.consumed // GLOBAL_BATCH - 1
            (folder / f"{step}-{rank}-{world}.json").write_text(json.dumps(rows))
            rows = []
            barrier.wait()
            if rank == 0:
                aside = folder / "state.tmp"
                aside.write_text(json.dumps(mine.state_dict()))
                aside.replace(state)
            barrier.wait()


if __name__ == "__main__":
    os.setpgid(0, 0)  # killed as one
    folder, (world, micro, steps) = Path(sys.argv[1]), map(int, sys.argv[2:])
    context = get_context("fork")
    barrier = context.Barrier(world)
    ranks = [
        context.Process(target=rank_of_a_job, args=(folder, world, micro, steps, rank, barrier))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
