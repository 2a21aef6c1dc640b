"""Bad batches, put in on purpose: what a trillion-token run meets by accident, for study on a laptop.

At chosen steps the whole global batch is replaced. What a row becomes depends on the seed and its position in the run
alone, so the bad batch of a step is the same on any number of ranks, for any micro-batch, after any interruption.
"""

from collections.abc import Callable

import numpy as np
import torch

from common.errors import ConfigError
from data.batch import Batch
from data.config import CorruptionKind
from data.tokenizer import TextEncoder

#: (first code point, size) of the Unicode blocks of `foreign_script`: Greek, Cyrillic, Arabic, Devanagari, Han, Hangul.
SCRIPTS = ((0x391, 0x39), (0x410, 0x40), (0x621, 0x2A), (0x905, 0x35), (0x4E00, 0x5000), (0xAC00, 0x2BA0))


class BatchCorruption:
    """Replaces the content of chosen steps' batches.

    - `random`: every token drawn uniformly from the vocabulary.
    - `repeat`: one token, another in each row, repeated.
    - `foreign_script`: letters of a script the corpus hardly has, at random; another script in each row.
    - `labels`: the text is as it was, what is to be predicted is shuffled within the row.

    Args:
        steps: optimizer steps, counted from 1 as in metrics.jsonl.
        kind: one of these.
        seed: of the run.
        encoder: the tokenizer.

    Raises:
        ValueError: the tokenizer has no tokens for the letters of `foreign_script`.
    """

    def __init__(self, steps: list[int], kind: CorruptionKind, seed: int, encoder: TextEncoder) -> None:
        if kind == "foreign_script":
            letters = ["".join(map(chr, range(start, start + size))) for start, size in SCRIPTS]
            if min(map(len, encoder.encode(letters))) == 1:
                problem = "is not possible: the tokenizer leaves out letters of other scripts"
                raise ConfigError("corruption.kind", kind, problem=problem)
        self.steps = frozenset(steps)
        self.make = KINDS[kind]
        self.seed = seed
        self.encoder = encoder

    def replace(self, batch: Batch, positions: np.ndarray, step: int) -> Batch:
        """Return the batch to train on at a step, which is the one given unless the step is chosen.

        Args:
            batch: of (rows, length + 1) ids.
            positions: (rows,) sequences consumed in the run before each.
            step: counted from 1.
        """
        if step not in self.steps:
            return batch
        tokens = batch.tokens.numpy()
        rows = [
            self.make(row, np.random.default_rng((self.seed, position)), self.encoder)
            for row, position in zip(tokens, positions.tolist(), strict=True)
        ]
        made = torch.from_numpy(np.stack(rows).astype(tokens.dtype))
        return batch._replace(targets=made) if self.make is _labels else batch._replace(tokens=made)


def _random(row: np.ndarray, draw: np.random.Generator, encoder: TextEncoder) -> np.ndarray:
    return draw.integers(0, encoder.size, len(row))


def _repeat(row: np.ndarray, draw: np.random.Generator, encoder: TextEncoder) -> np.ndarray:
    return np.full(len(row), draw.integers(0, encoder.size))


def _foreign_script(row: np.ndarray, draw: np.random.Generator, encoder: TextEncoder) -> np.ndarray:
    start, size = SCRIPTS[draw.integers(len(SCRIPTS))]
    ids: list[int] = []
    while len(ids) < len(row):  # a tokenizer may have one token for several letters
        letters = "".join(map(chr, (start + draw.integers(0, size, len(row))).tolist()))
        ids += encoder.encode([letters])[0][:-1].tolist()
    return np.array(ids[: len(row)])


def _labels(row: np.ndarray, draw: np.random.Generator, encoder: TextEncoder) -> np.ndarray:
    return draw.permutation(row[1:])


#: By name, what makes a row of (length + 1) tokens; `labels` makes (length) targets.
KINDS: dict[CorruptionKind, Callable[[np.ndarray, np.random.Generator, TextEncoder], np.ndarray]] = {
    "random": _random,
    "repeat": _repeat,
    "foreign_script": _foreign_script,
    "labels": _labels,
}
