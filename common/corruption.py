"""Which batches of a run are corrupted, and how: from its settings alone, the same in each process and each reader."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

#: Kinds of corrupted batches, see `data.corruption.BatchCorruption`.
KINDS = ("random", "repeat", "foreign_script", "labels", "repeated_ngrams")
#: A kind for each burst: all of `KINDS`, equally often, in an order drawn by the seed.
MIXED = "mixed"
#: Most steps that can be drawn.
MOST_STEPS = 100_000


def room(first: int, last: int, burst_length: int) -> int:
    """Return how many steps can be drawn from `first` to `last`, in bursts with a step between two of them."""
    return max(0, (last - first + 2) // (burst_length + 1)) * burst_length


def corrupted_batches(corruption: Mapping[str, Any], seed: int, max_steps: int) -> dict[int, str]:
    """Return the kind of each corrupted batch by its step, counted from 1, in ascending order.

    Args:
        corruption: the settings `data.corruption`; defaults stand for those that are absent.
        seed: seed of the run.
        max_steps: steps of the run, from which `random_steps` are drawn.

    Raises:
        ValueError: `random_steps` has no room, is no multiple of `burst_length`, or is above `MOST_STEPS`.
    """
    steps = sorted(corruption.get("steps", ()))
    if count := corruption.get("random_steps", 0):
        first, length = corruption.get("random_first_step", 1), corruption.get("burst_length", 1)
        steps = _draw(count, first, length, seed, max_steps)
    kind = corruption.get("kind", KINDS[0])
    return _mix(steps, seed) if kind == MIXED else dict.fromkeys(steps, kind)


def _draw(count: int, first: int, length: int, seed: int, last: int) -> list[int]:
    """Return steps in bursts that never touch; each such choice of steps is equally likely."""
    if count % length or not 0 < count <= min(MOST_STEPS, room(first, last, length)):
        raise ValueError(f"{count} steps in bursts of {length} cannot be drawn from {first} to {last}")
    bursts = count // length
    slots = last - first + 1 - bursts * length + 1  # places between the steps that are not corrupted
    starts = enumerate(_sample(slots, bursts, random.Random(seed)))
    return [first + slot + number * length + step for number, slot in starts for step in range(length)]


def _sample(size: int, count: int, rng: random.Random) -> list[int]:
    """Return `count` different integers below `size`, sorted: Floyd's algorithm, in time that depends on `count` alone.

    It uses `random.random` alone, whose numbers Python promises to keep in all versions.
    """
    chosen: set[int] = set()
    for top in range(size - count, size):
        number = int(rng.random() * (top + 1))
        chosen.add(top if number in chosen else number)
    return sorted(chosen)


def _mix(steps: Sequence[int], seed: int) -> dict[int, str]:
    """Return a kind for each step; consecutive steps have the same kind."""
    starts = [step for before, step in zip((None, *steps), steps, strict=False) if before is None or step > before + 1]
    kinds = [KINDS[number % len(KINDS)] for number in range(len(starts))]
    rng = random.Random(f"kinds {seed}")
    for top in range(len(kinds) - 1, 0, -1):
        other = int(rng.random() * (top + 1))
        kinds[top], kinds[other] = kinds[other], kinds[top]
    of_start = dict(zip(starts, kinds, strict=True))
    found: dict[int, str] = {}
    kind = KINDS[0]
    for step in steps:
        kind = of_start.get(step, kind)
        found[step] = kind
    return found
