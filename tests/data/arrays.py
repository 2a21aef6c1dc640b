"""Token arrays for tests: real files, small parts."""

from pathlib import Path

import numpy as np

from data import TokenArray


def token_array(folder: Path, tokens: np.ndarray, *lengths: int) -> TokenArray:
    """Write tokens as parts of these lengths, the rest in the last one, and map them."""
    cuts = np.cumsum(lengths)
    files = []
    for i, part in enumerate(np.split(tokens, cuts)):
        files.append(folder / f"{i}.npy")
        np.save(files[-1], part)
    return TokenArray(files, [*lengths, len(tokens) - sum(lengths)], tokens.dtype)
