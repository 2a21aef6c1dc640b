"""A filter of training sequences: those with an n-gram that is repeated many times do not contribute to the loss.

It is that of OLMo 2 (arXiv 2501.00656), where the n-gram has 1 to 13 tokens and is repeated 32 times or more. The
sequences stay in the batch, so the order of the data is the same with and without the filter.
"""

import numpy as np

from data.config import InstanceFilterConfig

#: Positions of each long enough repetition that the first look at a row compares.
SAMPLES = 4


def has_repetition(rows: np.ndarray, config: InstanceFilterConfig) -> np.ndarray:
    """Return for each row of token ids whether it has an n-gram that is repeated often enough to be masked.

    An n-gram of period p that is repeated n times is p (n - 1) consecutive tokens, each of which equals the token p
    places earlier. Few rows of text have such a run at every `SAMPLES`-th part of its length, where a first look
    compares, so the whole row is compared for few.

    Args:
        rows: (rows, tokens) ids of any integer type.
        config: periods, and the number of repetitions.

    Returns:
        (rows,) bool.
    """
    found = np.zeros(len(rows), dtype=bool)
    longest = min(config.repetition_max_period, rows.shape[1] // config.repetition_max_count)
    for period in range(config.repetition_min_period, longest + 1):
        run = period * (config.repetition_max_count - 1)
        stride = max(1, run // SAMPLES)
        sampled = rows[:, period::stride] == rows[:, :-period:stride]
        candidates = np.flatnonzero(_has_run(sampled, run // stride) & ~found)
        if len(candidates):
            few = rows[candidates]
            found[candidates] = _has_run(few[:, period:] == few[:, :-period], run)
    return found


def _has_run(equal: np.ndarray, length: int) -> np.ndarray:
    """Return for each row of booleans whether `length` consecutive ones, at least 1, are true: (rows,) bool."""
    ends = np.cumsum(equal, axis=1, dtype=np.int32)
    sums = ends[:, length - 1 :].copy()
    sums[:, 1:] -= ends[:, :-length]
    return (sums == length).any(axis=1)
