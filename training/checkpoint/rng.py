"""The states of the random number generators of a process."""

import random
from typing import Any

import numpy as np
import torch


def rng_states() -> dict[str, Any]:
    """Return the states of the generators of Python, NumPy, torch on the CPU, and torch on this process's GPU.

    They consist of types that `torch.load(weights_only=True)` accepts.
    """
    state: Any = np.random.get_state()  # noqa: NPY002 - libraries use the global generator
    kind, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.tensor(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_states(states: dict[str, Any], only_check: bool = False) -> None:
    """Restore what `rng_states` returned; with `only_check` into generators that nobody uses.

    States that are none raise any error.
    """
    kind, keys, *rest = states["numpy"]
    numpy_state = (kind, keys.numpy().astype(np.uint32), *rest)
    if only_check:
        random.Random().setstate(states["python"])
        np.random.RandomState().set_state(numpy_state)
        torch.Generator().set_state(states["torch"])
        if states["cuda"] is not None and torch.cuda.is_available():
            torch.Generator("cuda").set_state(states["cuda"])
        return
    random.setstate(states["python"])
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
