"""Steps whose batches are corrupted: listed, or drawn by the seed."""

from collections import Counter
from itertools import combinations, pairwise

import pytest

from common.corruption import KINDS, MOST_STEPS, corrupted_batches, room


def drawn(seed: int, count: int, last: int, first: int = 1, length: int = 1) -> list[int]:
    corruption = {"random_steps": count, "random_first_step": first, "burst_length": length, "kind": "labels"}
    return list(corrupted_batches(corruption, seed, last))


def test_drawn_steps_are_those_of_the_seed():
    """A change of these numbers would give recorded runs other corrupted steps than those that they were trained on."""
    assert drawn(0, 5, 300, first=100) == [150, 183, 202, 250, 266]
    assert drawn(1, 6, 300, first=100, length=3) == [126, 127, 128, 269, 270, 271]


def test_steps_differ_by_seed_and_lie_between_first_and_last():
    found = [drawn(seed, 6, 60, first=20, length=2) for seed in range(200)]
    assert len(set(map(tuple, found))) > 190
    for steps in found:
        assert len(set(steps)) == 6 and steps == sorted(steps)
        starts = steps[::2]
        assert steps[1::2] == [start + 1 for start in starts]
        assert all(other - one > 2 for one, other in pairwise(starts)), "bursts do not touch"
    assert min(map(min, found)) == 20 and max(map(max, found)) == 60


def test_each_choice_of_steps_is_equally_likely():
    """All ways to put two bursts of 2 into 8 steps with a step between them, counted by brute force."""
    ways = {(a, a + 1, b, b + 1) for a, b in combinations(range(1, 8), 2) if b > a + 2}
    counts = Counter(tuple(drawn(seed, 4, 8, length=2)) for seed in range(4000))
    assert set(counts) == ways and len(ways) == 10
    assert all(abs(count - 400) < 80 for count in counts.values()), counts


@pytest.mark.parametrize("length", [1, 2, 3])
def test_room_is_what_can_be_drawn(length):
    for last in range(12):
        fits = room(5, last, length)
        most = max((n for n in range(1, 9) if n * (length + 1) - 1 <= last - 4), default=0)  # a gap after each but one
        assert fits == most * length
        if fits:
            assert len(drawn(3, fits, last, first=5, length=length)) == fits
        with pytest.raises(ValueError, match=f"in bursts of {length} cannot be drawn from 5 to {last}"):
            drawn(3, fits + length, last, first=5, length=length)


def test_number_of_steps_is_limited():
    """A configuration of somebody else must not fill the memory. The number of steps of the run does not matter."""
    assert len(drawn(0, 10, 2**53)) == 10
    with pytest.raises(ValueError, match="cannot be drawn"):
        drawn(0, MOST_STEPS + 1, 2**53)


def test_mixed_kinds_are_equally_frequent_and_differ_by_seed():
    corruption = {"random_steps": 30, "burst_length": 2, "kind": "mixed"}
    found = [corrupted_batches(corruption, seed, 400) for seed in range(3)]
    for kinds in found:
        assert Counter(kinds.values()) == dict.fromkeys(KINDS, 6)
        assert all(kinds.get(step + 1, kind) == kind for step, kind in kinds.items()), "a burst has one kind"
    assert len({tuple(kinds.values()) for kinds in found}) == 3
    listed = corrupted_batches({"steps": [9, 1, 2, 5, 20, 30], "kind": "mixed"}, 0, 400)
    assert list(listed) == [1, 2, 5, 9, 20, 30] and listed[1] == listed[2] and set(listed.values()) == set(KINDS)


def test_listed_steps_have_the_kind_that_is_said():
    assert corrupted_batches({"steps": [4, 2], "kind": "repeat"}, 0, 9) == {2: "repeat", 4: "repeat"}
    assert corrupted_batches({}, 0, 9) == {}
