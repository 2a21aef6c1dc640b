"""Smoothing of losses for pictures."""

import itertools
from collections.abc import Collection

import numpy as np

#: Smoothing window as a fraction of the steps, and its maximum: a spike is a few steps long.
SMOOTHED_FRACTION, MAX_SMOOTHED_STEPS = 1 / 60, 9


def smooth(values: np.ndarray, corrupted_rows: Collection[int] = ()) -> tuple[np.ndarray, int]:
    """Return centred running means of the values of each step, and their window.

    Windows are shorter at the ends and next to corrupted batches, which have no value: no mean spans one.
    """
    width = min(MAX_SMOOTHED_STEPS, max(1, round(len(values) * SMOOTHED_FRACTION)) // 2 * 2 + 1)
    smoothed = np.full(len(values), np.nan)
    edges = [-1, *sorted(corrupted_rows), len(values)]
    for before, after in itertools.pairwise(edges):
        if length := len(values[before + 1 : after]):
            kernel = np.ones(min(width, 2 * length - 1))
            counts = np.convolve(np.ones(length), kernel)
            centre = slice(len(kernel) // 2, len(kernel) // 2 + length)
            smoothed[before + 1 : after] = (np.convolve(values[before + 1 : after], kernel) / counts)[centre]
    return smoothed, width
