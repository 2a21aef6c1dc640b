"""Corrupted batches, injected on purpose to study spikes of the loss.

The replacement of a row depends only on the seed and the row's position in the run. So it is the same on any number of
ranks, for any micro-batch size, and after any interruption.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError
from data.sequences import Batch
from data.tokenizer import Tokenizer

#: (first code point, size) of the Unicode blocks of `foreign_script`: Greek, Cyrillic, Arabic, Devanagari, Han, Hangul.
SCRIPTS = ((0x391, 0x39), (0x410, 0x40), (0x621, 0x2A), (0x905, 0x35), (0x4E00, 0x5000), (0xAC00, 0x2BA0))

#: Tokens of the longest n-gram that `repeated_ngrams` repeats, and how often it does so at least (arXiv 2501.00656).
MAX_PERIOD, MIN_COUNT = 13, 32


class BatchCorruption:
    """Replaces the content of the batches of chosen optimizer steps, counted from 1 as in metrics.jsonl.

    Batches that a rewind skips do not count. The caller leaves out steps that were rewound over: no corrupted batch
    comes back in the place of one that was skipped.

    - `random`: every token is drawn uniformly from the vocabulary.
    - `repeat`: one token is repeated; each row has its own.
    - `foreign_script`: random letters of a script that the corpus hardly contains; each row has its own script.
    - `labels`: the inputs are unchanged, and the targets are shuffled within each row.
    - `repeated_ngrams`: an n-gram of the row, of 1 to 13 tokens, is repeated 32 times or more, as in web text; each row
      has its own n-gram, number of repetitions and place, and keeps the text before and after them.

    Args:
        kinds: kind of each corrupted batch by its step.
        seed: seed of the replacements.
        tokenizer: tokenizer of the text.

    Raises:
        ConfigError: the tokenizer has no tokens for letters of foreign scripts.
    """

    def __init__(self, kinds: Mapping[int, str], seed: int, tokenizer: Tokenizer) -> None:
        if "foreign_script" in kinds.values():
            letters = ["".join(map(chr, range(start, start + size))) for start, size in SCRIPTS]
            if min(map(len, tokenizer.encode(letters))) == 1:
                problem = "is not possible: the tokenizer has no tokens for letters of other scripts"
                raise ConfigError("corruption.kind", "foreign_script", problem=problem)
        self.kinds = dict(kinds)
        self.seed = seed
        self.tokenizer = tokenizer

    def replace(self, tokens: Tensor, first: int, step: int) -> Batch:
        """Return the batch to train on at a step: corrupted if the step is chosen, else `tokens` themselves.

        `first` is the position of the first row in the run.
        """
        kind = self.kinds.get(step)
        if kind is None:
            return Batch(tokens)
        rows = [
            REPLACEMENTS[kind](row, np.random.default_rng((self.seed, position)), self.tokenizer)
            for position, row in enumerate(tokens.numpy(), first)
        ]
        corrupted = torch.from_numpy(np.stack(rows)).to(tokens.dtype)
        return Batch(tokens, corrupted) if kind == "labels" else Batch(corrupted)


def _random(row: np.ndarray, rng: np.random.Generator, tokenizer: Tokenizer) -> np.ndarray:
    return rng.integers(0, tokenizer.size, len(row))


def _repeat(row: np.ndarray, rng: np.random.Generator, tokenizer: Tokenizer) -> np.ndarray:
    return np.full(len(row), rng.integers(0, tokenizer.size))


def _foreign_script(row: np.ndarray, rng: np.random.Generator, tokenizer: Tokenizer) -> np.ndarray:
    start, size = SCRIPTS[rng.integers(len(SCRIPTS))]
    ids: list[int] = []
    while len(ids) < len(row):  # a tokenizer may encode several letters as one token
        letters = "".join(map(chr, (start + rng.integers(0, size, len(row))).tolist()))
        ids += tokenizer.encode([letters])[0][:-1].tolist()
    return np.array(ids[: len(row)])


def _labels(row: np.ndarray, rng: np.random.Generator, tokenizer: Tokenizer) -> np.ndarray:
    return rng.permutation(row[1:])


def _repeated_ngrams(row: np.ndarray, rng: np.random.Generator, tokenizer: Tokenizer) -> np.ndarray:
    period = rng.integers(1, min(MAX_PERIOD, len(row) // MIN_COUNT) + 1)
    length = period * rng.integers(MIN_COUNT, len(row) // period + 1)
    start = rng.integers(0, len(row) - length + 1)
    replaced = row.copy()
    replaced[start : start + length] = np.tile(row[start : start + period], length // period)
    return replaced


#: Kind -> function that returns the replacement of a row of (length + 1) tokens; `labels` returns (length) targets.
REPLACEMENTS: dict[str, Callable[[np.ndarray, np.random.Generator, Tokenizer], np.ndarray]] = {
    "random": _random,
    "repeat": _repeat,
    "foreign_script": _foreign_script,
    "labels": _labels,
    "repeated_ngrams": _repeated_ngrams,
}
