"""Readers of models, tokenizers, tokens, texts and clipper states, and how what they accept is then used."""

import contextlib
import io
import random
from pathlib import Path

import numpy as np
import torch

from common.console import make_console
from data import ShuffledDataset, TokenDataset, Tokens, load_tokenizer, open_tokens, prepare, unigram_entropy
from data.prepare import PART_TOKENS
from data.tokenizer import tokenizer_identity
from models.hugging_face import check_weights, config_of, load
from models.llama import Llama
from tests.fuzz.attempts import Refused
from tests.fuzz.bases import corpus_of, take_steps
from tests.zclip.every_strategy import SHORT
from zclip.replay import main as replay


def read_model(folder: Path, bases: Path, rng: random.Random) -> None:
    config = config_of(folder)
    if config.parameters > 1e8:
        raise Refused("too large for this test")
    check_weights(folder, config)
    model = Llama(config)
    load(model, folder)
    model(torch.zeros((1, min(4, config.max_position_embeddings)), dtype=torch.long))


def read_tokenizer(folder: Path, bases: Path, rng: random.Random) -> None:
    tokenizer_identity(str(folder))
    tokenizer = load_tokenizer(str(folder))
    (ids,) = tokenizer.encode(["Fellow citizens: 東京 <|endoftext|> \x00"])
    assert ids[-1] == tokenizer.end and ids.max() < tokenizer.size, (ids, tokenizer.end, tokenizer.size)
    tokenizer.tokenizer.decode(ids.tolist())
    (folder / "saved").mkdir()
    tokenizer.save(folder / "saved")
    assert load_tokenizer(str(folder / "saved")).encode(["a b"])[0].tolist() == tokenizer.encode(["a b"])[0].tolist()


def read_tokens(folder: Path, bases: Path, rng: random.Random) -> None:
    tokens = open_tokens(folder, rng.choice((None, False)))
    use_tokens(tokens)


def use_tokens(tokens: Tokens) -> None:
    """Read tokens as training and the evaluation do."""
    for array in (tokens.train, tokens.test):
        dataset = TokenDataset(array, 16)
        if len(dataset):
            batch = ShuffledDataset(dataset, 0).take(0, min(4, len(dataset)))
            assert not batch.is_floating_point()
            assert int(batch.to(torch.int64).max()) < tokens.facts["vocab_size"], "a token outside the vocabulary"
    read = tokens.test.read(1, min(200, len(tokens.test)))
    unigram_entropy(read)
    assert tokens.held_out_bytes(1, min(200, len(tokens.test))) >= 0
    load_tokenizer(str(tokens.folder))


def read_prepared_tokens(folder: Path, bases: Path, rng: random.Random) -> None:
    corpus = corpus_of(bases / "texts" / "-jsonl")
    cache = folder / "cache"
    cache.mkdir()
    target = corpus.folder(cache)
    target.mkdir()
    for file in [*folder.iterdir()]:
        if file.name not in ("cache", "planted_module.py"):
            file.rename(target / file.name)
    corpus.check(cache, 16)
    use_tokens(prepare(corpus, cache, 16, make_console(), 300 if rng.random() < 0.5 else PART_TOKENS))


def read_texts(folder: Path, bases: Path, rng: random.Random) -> None:
    cache = folder.parent / "cache"
    (folder / "planted_module.py").unlink()
    corpus = corpus_of(folder)
    corpus.check(cache, 16)
    corpus.estimated_bytes()
    use_tokens(prepare(corpus, cache, 16, make_console()))


def read_state(folder: Path, bases: Path, rng: random.Random) -> None:
    def is_changed(file: Path) -> bool:
        return not file.is_file() or file.read_bytes() != (bases / "states" / file.name).read_bytes()

    changed = [name for name in SHORT if is_changed(folder / f"{name}.pt")]
    name = rng.choice(changed or list(SHORT))
    try:
        assert (folder / f"{name}.pt").is_file()
        state = torch.load(folder / f"{name}.pt", weights_only=True)
    except Exception as error:
        raise Refused("torch cannot load it") from error
    strategy = SHORT[name]()
    strategy.load_state_dict(state)
    for _ in range(3):
        assert np.isfinite(take_steps(strategy, 2)), f"the norm after clipping is not finite: {strategy.telemetry}"
    assert all(not v.is_floating_point() or not v.isnan().any() for v in strategy.state.values()), strategy.state
    again = SHORT[name]()
    again.load_state_dict(strategy.state_dict())


def replay_traces(folder: Path, bases: Path, rng: random.Random) -> None:
    clip = rng.choice(("zclip", "zclip", "fixed", "autoclip", "skip_step", "none"))
    for file in sorted(folder.glob("trace*")):
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            status = replay(
                ["replay", str(file), f"clip={clip}", f"out={rng.choice((*['none'] * 9, folder / 'a.png'))}"]
            )
        if status:
            raise Refused(err.getvalue())
