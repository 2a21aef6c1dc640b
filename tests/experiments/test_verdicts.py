"""Numbers with their intervals, and verdicts by where intervals lie."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from experiments.claims.forest import draw_verdicts, multiples
from experiments.claims.numbers import Certain, ExcessEvents, Mean, Share, event_rate, mean_of
from experiments.claims.verdict import (
    ABOVE,
    BELOW,
    CONTRADICTED,
    NO_EFFECT,
    NOT_TESTABLE,
    SUPPORTED,
    UNDECIDED,
    WITHIN,
    Claim,
    Findings,
    NotTestable,
    Part,
    SmallestEffect,
    corrected,
    difference_by_seed,
    judge_claim,
)
from experiments.run.collect import RunCollection

NATS = SmallestEffect(0.02, "nats", "a reason")
TENTH = SmallestEffect(0.1, "of the area", "a reason", 2, is_ratio=True)
NOTHING = RunCollection({}, set(), {}, [], frozenset())


def claim(asserts=ABOVE, *numbers, smallest=NATS, unmeasured="", needs_all=True):
    parts = [Part(f"number {at}", number, smallest) for at, number in enumerate(numbers)]
    return Claim(
        "A claim.", "us", asserts, (smallest,), ("table3",), [], lambda _: Findings(parts, [], unmeasured), needs_all
    )


def outcome(*args, **more):
    return judge_claim(claim(*args, **more), NOTHING).outcome


def around(low, high):
    """Return a mean over five seeds with this 95 % interval; 2.776 is the quantile of t with four degrees."""
    return Mean((low + high) / 2, (high - low) / 2 / 2.7764451, 5)


@pytest.mark.parametrize(
    ("low", "high", "above", "below", "within"),
    [
        (0.03, 0.05, SUPPORTED, CONTRADICTED, CONTRADICTED),
        (0.01, 0.05, UNDECIDED, UNDECIDED, UNDECIDED),
        (-0.01, 0.01, NO_EFFECT, SUPPORTED, SUPPORTED),
        (-0.05, 0.01, UNDECIDED, SUPPORTED, UNDECIDED),
        (-0.05, -0.03, CONTRADICTED, SUPPORTED, CONTRADICTED),
        (-0.05, 0.05, UNDECIDED, UNDECIDED, UNDECIDED),
    ],
)
def test_verdicts_are_where_the_interval_lies(low, high, above, below, within):
    number = around(low, high)
    assert number.interval() == (pytest.approx(low), pytest.approx(high))
    assert [outcome(asserts, number) for asserts in (ABOVE, BELOW, WITHIN)] == [above, below, within]


@settings(max_examples=200, deadline=None)
@given(st.floats(-0.1, 0.1), st.floats(1e-4, 0.1), st.sampled_from([ABOVE, BELOW, WITHIN]))
def test_the_p_value_agrees_with_the_interval(value, error, asserts):
    number = Mean(value, error, 4)
    low, high = number.interval()
    expected = UNDECIDED
    if asserts == BELOW:
        expected = SUPPORTED if high < 0.02 else CONTRADICTED if low > 0.02 else UNDECIDED
    elif low > 0.02 or high < -0.02:
        expected = SUPPORTED if asserts == ABOVE and low > 0.02 else CONTRADICTED
    elif low > -0.02 and high < 0.02:
        expected = NO_EFFECT if asserts == ABOVE else SUPPORTED
    assert outcome(asserts, number) == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 40), st.floats(-1, 1))
def test_events_are_above_a_bound_if_their_interval_is(events, noise, runs, bound):
    number = ExcessEvents(events, noise, runs)
    low, high = number.interval()
    assert (number.above(bound) < 0.025) == (low > bound) and (number.below(bound) < 0.025) == (high < bound)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.data(), st.floats(0.01, 0.99))
def test_shares_are_above_a_bound_if_their_interval_is(cases, data, bound):
    number = Share(data.draw(st.integers(0, cases)), cases)
    low, high = number.interval()
    assert (number.above(bound) < 0.025) == (low > bound) and (number.below(bound) < 0.025) == (high < bound)


def test_poisson_rates():
    """Garwood's intervals of Poisson counts: of none 0 to 3.69, of five 1.62 to 11.67."""
    assert event_rate(0, 10) == (0.0, pytest.approx(0.3689, abs=1e-4))
    assert event_rate(5, 10) == (pytest.approx(0.1623, abs=1e-4), pytest.approx(1.1668, abs=1e-4))


def by_seed(*numbers):
    return dict(enumerate(numbers))


def test_paired_differences():
    with pytest.raises(NotTestable, match="it needs three seeds"):
        difference_by_seed(by_seed(1.0, 2.0), by_seed(0.0, 0.0, 0.0))
    mean = difference_by_seed(by_seed(1.0, 2.0, 3.0), by_seed(2.0, 2.5, 4.5))
    # Differences -1, -0.5, -1.5: mean -1, standard error 0.5 / sqrt(3), t = -3.4641 with two degrees of freedom.
    assert mean.value == -1 and mean.below(0) == pytest.approx(0.07418 / 2, abs=1e-4)
    assert mean.interval() == (
        pytest.approx(-1 - 4.3027 * 0.5 / 3**0.5, abs=1e-4),
        pytest.approx(-1 + 4.3027 * 0.5 / 3**0.5, abs=1e-4),
    )


def test_seeds_that_are_all_alike_are_compared_by_the_sign_test():
    same = difference_by_seed(by_seed(2.1, 2.2, 2.3), by_seed(1.1, 1.2, 1.3))
    assert same.interval() == (same.value, same.value) and same.above(0.5) == 1 / 8 and same.above(1.5) == 1
    assert outcome(ABOVE, mean_of([1.0] * 3)) == UNDECIDED and outcome(ABOVE, mean_of([1.0] * 6)) == SUPPORTED


HIGH, LOW, SMALL, WIDE = around(0.03, 0.05), around(-0.05, -0.03), around(-0.01, 0.01), around(-0.1, 0.1)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((HIGH, HIGH), SUPPORTED),
        ((HIGH, WIDE), UNDECIDED),
        ((HIGH, LOW), CONTRADICTED),
        ((WIDE, LOW), CONTRADICTED),
        ((SMALL, SMALL), NO_EFFECT),
        ((HIGH, SMALL), NO_EFFECT),
        ((WIDE, SMALL), UNDECIDED),
        ((around(-0.05, 0.12), SMALL), UNDECIDED),
    ],
)
def test_claims_of_several_comparisons_need_all(numbers, expected):
    assert outcome(ABOVE, *numbers) == outcome(ABOVE, *numbers[::-1]) == expected


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((HIGH, WIDE), SUPPORTED),
        ((HIGH, LOW), SUPPORTED),
        ((SMALL, WIDE), UNDECIDED),
        ((SMALL, SMALL), NO_EFFECT),
        ((SMALL, LOW), NO_EFFECT),
        ((LOW, LOW), CONTRADICTED),
    ],
)
def test_claims_of_any_of_several_need_one(numbers, expected):
    assert outcome(ABOVE, *numbers, needs_all=False) == outcome(ABOVE, *numbers[::-1], needs_all=False) == expected


def test_one_of_several_comparisons_decides_with_a_p_value_for_all_of_them():
    verdict = judge_claim(claim(ABOVE, HIGH, LOW, HIGH), NOTHING)
    assert verdict.p == pytest.approx(3 * stats.t.cdf((-0.04 + 0.02) / LOW.error, 4))
    assert verdict.part.number == LOW
    weak = Mean(-0.04, 0.02 / stats.t.isf(0.02, 4), 5)  # p = 0.02 by itself
    assert outcome(ABOVE, weak) == CONTRADICTED and outcome(ABOVE, weak, HIGH, HIGH) == UNDECIDED


def test_a_claim_with_an_unmeasured_part_is_decided_only_by_a_part_that_suffices():
    assert outcome(ABOVE, LOW, unmeasured="no runs") == CONTRADICTED
    assert outcome(ABOVE, HIGH, unmeasured="no runs") == NOT_TESTABLE
    assert outcome(ABOVE, HIGH, unmeasured="no runs", needs_all=False) == SUPPORTED
    assert outcome(ABOVE, LOW, unmeasured="no runs", needs_all=False) == NOT_TESTABLE


def test_ratios_are_compared_by_their_logarithms():
    number = Mean(math.log(0.4), 0.2, 3)
    verdict = judge_claim(claim(BELOW, number, smallest=TENTH), NOTHING)
    assert verdict.outcome == CONTRADICTED and verdict.p == pytest.approx(stats.t.sf(math.log(4) / 0.2, 2))
    spread = 4.30265 * 0.2
    low, high = 0.4 * math.exp(-spread), 0.4 * math.exp(spread)
    assert verdict.part.text == f"number 0: 0.40 of the area (95 %: {low:.2f} to {high:.2f}, 3 seeds)"
    assert outcome(BELOW, Mean(math.log(0.03), 0.1, 3), smallest=TENTH) == SUPPORTED


def test_what_is_certain_needs_no_test():
    verdict = judge_claim(claim(BELOW, Certain(math.inf)), NOTHING)
    assert (verdict.outcome, verdict.p) == (CONTRADICTED, 0)
    assert "infinite nats (95 %: infinite to infinite)" in verdict.evidence[0]


def test_verdicts_are_corrected_together():
    """Of p-values 0.001, 0.02, 0.024 and 0.4 Holm's method makes 0.004, 0.06, 0.06 and 0.4."""

    def with_p(p):
        return Mean(0.04, 0.02 / stats.t.isf(p, 4), 5)

    claims = [claim(ABOVE, with_p(p)) for p in (0.02, 0.4, 0.001, 0.024)]
    claims.insert(1, claim(ABOVE, HIGH, unmeasured="no runs"))
    before = [judge_claim(each, NOTHING) for each in claims]
    assert [each.outcome for each in before] == [SUPPORTED, NOT_TESTABLE, UNDECIDED, SUPPORTED, SUPPORTED]
    after = corrected(before)
    assert [each.outcome for each in after] == [UNDECIDED, NOT_TESTABLE, UNDECIDED, SUPPORTED, UNDECIDED]
    assert [each.corrected for each in after] == [
        pytest.approx(0.06), None, pytest.approx(0.4), pytest.approx(0.004), pytest.approx(0.06),
    ]  # fmt: skip
    assert after[0].p == pytest.approx(0.02)
    assert after[0].evidence[-1].startswith("by itself it would be supported (p = 0.02), but not among 4 testable")
    assert after[2].evidence == before[2].evidence and after[3].evidence == before[3].evidence


def test_picture_has_a_row_for_each_testable_claim():
    """It is in multiples of the smallest effect, and shaded where the claim is supported."""
    numbers = {ABOVE: around(0.04, 0.06), BELOW: around(-0.06, -0.04), WITHIN: around(-0.01, 0.01)}
    verdicts = [judge_claim(claim(asserts, number), NOTHING) for asserts, number in numbers.items()]
    verdicts.insert(1, judge_claim(claim(ABOVE, HIGH, unmeasured="no runs"), NOTHING))
    verdicts.append(judge_claim(claim(BELOW, Mean(math.log(0.4), 0.2, 3), smallest=TENTH), NOTHING))
    verdicts.append(judge_claim(claim(BELOW, Certain(math.inf)), NOTHING))
    assert multiples(verdicts[0].part) == (pytest.approx(2.5), pytest.approx(2), pytest.approx(3))
    assert multiples(verdicts[4].part)[0] == pytest.approx(math.log(0.4) / math.log(10))
    (ax,) = draw_verdicts(verdicts).axes
    assert len(ax.get_yticks()) == 5, "the claim that is not testable has no row"
    shaded = [sorted({x for x, _ in area.get_paths()[0].vertices}) for area in ax.collections]
    limit = ax.get_xlim()[1]
    assert [(x[0], x[-1]) for x in shaded] == [(1, limit), (-limit, 1), (-1, 1), (-limit, -1), (-limit, 1)]
    drawn = [
        line.get_xdata()[0] for line in ax.lines if line.get_marker() not in ("None", "") and len(line.get_xdata())
    ]
    assert drawn == [pytest.approx(x) for x in (2.5, -2.5, 0, math.log(0.4) / math.log(10), limit)]
    assert draw_verdicts([verdicts[1]]) is None and draw_verdicts(verdicts[-1:]) is not None


def test_number_that_does_not_exist_decides_nothing():
    """Half of the seeds are infinite on one side, and half on the other."""
    unknown = judge_claim(claim(ABOVE, Mean(math.nan, math.nan, 3)), NOTHING)
    assert (unknown.outcome, unknown.p) == (UNDECIDED, 1) and "unknown nats" in unknown.evidence[0]
    shown = [each.outcome for each in corrected([unknown, judge_claim(claim(ABOVE, HIGH), NOTHING)])]
    assert shown == [UNDECIDED, SUPPORTED]
