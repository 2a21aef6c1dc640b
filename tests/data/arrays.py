"""Token arrays for tests: small parts in real files."""

from pathlib import Path

import numpy as np

from data import TokenArray


def token_array(folder: Path, tokens: np.ndarray, *lengths: int) -> TokenArray:
    """Write tokens as parts of these lengths, with the remaining tokens in the last part, and open them."""
    borders = np.cumsum(lengths)
    files = []
    for i, part in enumerate(np.split(tokens, borders)):
        files.append(folder / f"{i}.npy")
        np.save(files[-1], part)
    return TokenArray(files, [*lengths, len(tokens) - sum(lengths)], tokens.dtype)
