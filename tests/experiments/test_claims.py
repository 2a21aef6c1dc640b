"""Verdicts on the paper's claims, each with runs that support the claim and runs that do not."""

import numpy as np
import pytest

from experiments.paper.claims import CLAIMS, NOT_SUPPORTED, NOT_TESTABLE, SUPPORTED, judge_claim, judge_claims
from experiments.paper.measures import reach_final_loss
from experiments.paper.tables_and_figures import ALPHAS, FIGURE_RUNS, RATES, STRATEGIES, THRESHOLDS, VARIANTS
from experiments.paper.verdict import TOO_FEW_SEEDS, NotTestable, difference_by_seed, event_rate, measure_by_seed
from experiments.run.collect import RunCollection
from tests.experiments.modified_runs import with_loss, with_result
from tests.experiments.written_runs import SEEDS, modify, without

LEAVES, _, HIGHER, FEWER, RECIPROCAL, THRESHOLD, ALPHA, NORMAL, OVERHEAD = CLAIMS


def test_verdicts_need_three_seeds_and_one_text_and_never_raise(everything):
    two = everything._replace(runs={key: run for key, run in everything.runs.items() if key[1] < 2})
    assert {verdict.outcome for verdict in judge_claims(two).values()} == {NOT_TESTABLE}
    some = everything._replace(runs={key: run for at, (key, run) in enumerate(everything.runs.items()) if at % 3})
    assert len(judge_claims(some)) == 9, "whatever is missing"
    all_diverged = everything._replace(diverged={*everything.runs})
    assert len(judge_claims(all_diverged)) == 9 and all(
        verdict.outcome != SUPPORTED
        for claim, verdict in judge_claims(all_diverged).items()
        if claim not in (LEAVES, OVERHEAD)
    )
    runs = dict(everything.runs)
    key = next(iter(runs))
    runs[key] = runs[key]._replace(result={**runs[key].result, "data_fingerprint": "ffff"})
    assert {verdict.outcome for verdict in judge_claims(everything._replace(runs=runs)).values()} == {NOT_TESTABLE}


def test_claims_with_unreadable_runs_are_not_testable(everything):
    """Missing runs are named."""
    assert judge_claim(everything, OVERHEAD).outcome == SUPPORTED
    key = (STRATEGIES["AutoClip"], 1)
    missing = without(everything, key)
    for lacking, note in (
        (missing._replace(excluded=frozenset({key})), "excluded: AutoClip (seed 1)"),
        (missing._replace(unfinished={key: 7}), "unfinished: AutoClip (seed 1 after 7 steps)"),
    ):
        verdict = judge_claim(lacking, OVERHEAD)
        assert verdict.outcome == NOT_TESTABLE and verdict.evidence[-1] == note
        assert verdict.evidence[-2] == "supported, except for runs that are unfinished or excluded"
        unaffected = judge_claim(everything, RECIPROCAL).evidence
        assert judge_claim(lacking, RECIPROCAL).evidence == unaffected, "a claim about other runs"
    verdict = judge_claim(missing, OVERHEAD)
    assert verdict.outcome == SUPPORTED and verdict.evidence[-1] == "not run: AutoClip (seed 1)"
    never = without(everything, *((spec, seed) for spec in STRATEGIES.values() for seed in SEEDS))
    assert judge_claim(never, OVERHEAD).evidence == [TOO_FEW_SEEDS, "none of its runs has begun"]


def test_means_over_runs_use_seeds_that_have_all_runs(everything):
    specs = [RATES[lr]["fixed"] for lr in (1e-3, 3e-3, 5e-3)]
    numbers = {
        spec: {"train_loss": [each, each + 1, each + 2]} for spec, each in zip(specs, (1.0, 2.0, 6.0), strict=True)
    }
    collection = without(with_result(everything, numbers), (RATES[3e-3]["fixed"], 1))
    assert measure_by_seed(collection, "train_loss", specs) == {0: 3.0, 2: 5.0}


def with_best_rates(collection: RunCollection, fixed: list[float], zclip: list[float]) -> RunCollection:
    """Return the runs with the given best learning rates by seed."""
    best = {"fixed": fixed, "zclip": zclip}
    return with_result(
        collection,
        {
            row[group]: {"train_loss": [4.0 if rates[seed] == lr else 5.0 for seed in range(len(rates))]}
            for lr, row in RATES.items()
            for group, rates in best.items()
        },
    )


def with_six_seeds(collection: RunCollection) -> RunCollection:
    """Return the runs with three more seeds, which are copies of the first ones."""
    return collection._replace(
        runs=collection.runs | {(spec, seed + 3): run for (spec, seed), run in collection.runs.items()}
    )


def test_higher_learning_rates(everything):
    """Three seeds cannot show it by signs, six can; where it is lower once, or the same, it is not."""
    higher = with_best_rates(everything, [1e-4] * 3, [5e-3] * 3)
    verdict = judge_claim(higher, HIGHER)
    assert verdict.outcome == NOT_TESTABLE and "fewer than 6 seeds" in verdict.evidence[-1]
    assert "higher with 3 of 3 seeds, lower with 0 (sign test, p = 0.25)" in verdict.evidence[1]
    assert judge_claim(with_best_rates(with_six_seeds(everything), [1e-4] * 6, [5e-3] * 6), HIGHER).outcome == SUPPORTED
    assert (
        judge_claim(with_best_rates(with_six_seeds(everything), [5e-3] * 6, [1e-4] * 6), HIGHER).outcome
        == NOT_SUPPORTED
    )
    assert judge_claim(with_best_rates(everything, [1e-3] * 3, [1e-3] * 3), HIGHER).outcome == NOT_SUPPORTED
    assert judge_claim(with_best_rates(everything, [1e-3] * 3, [3e-3, 3e-3, 7e-4]), HIGHER).outcome == NOT_SUPPORTED
    gone = {(row["fixed"], seed) for lr, row in RATES.items() for seed in SEEDS if lr > 1e-4}
    verdict = judge_claim(with_best_rates(everything, [5e-3] * 3, [5e-3] * 3)._replace(diverged=gone), HIGHER)
    assert "higher with 3 of 3" in verdict.evidence[1], "a run that diverged is the worst"
    gone = {(row["zclip"], seed) for row in RATES.values() for seed in SEEDS}
    verdict = judge_claim(higher._replace(diverged=gone), HIGHER)
    assert verdict.outcome == NOT_SUPPORTED and "ZClip none, none, none" in verdict.evidence[0]
    assert "lower with 3" in verdict.evidence[1], "it allows no rate"
    verdict = judge_claim(without(higher, (RATES[1e-3]["zclip"], 1)), HIGHER)
    assert verdict.outcome == NOT_TESTABLE and "it needs three seeds" in verdict.evidence[0], "a rate that was not run"
    low = with_result(everything, {RATES[lr]["zclip"]: {"train_loss": [4.0, 4.1, 4.2]} for lr in (1e-3, 3e-3, 5e-3)})
    assert "ZClip minus fixed: -" in judge_claim(low, HIGHER).evidence[2]
    verdict = judge_claim(without(with_six_seeds(low), *((RATES[1e-3]["zclip"], seed) for seed in range(4))), HIGHER)
    assert verdict.evidence == [TOO_FEW_SEEDS, "not run: 1e-3, ZClip (seeds 0, 1, 2, 3)"]
    verdict = judge_claim(low._replace(diverged={(RATES[3e-3]["fixed"], 2)}), HIGHER)
    assert "required run has diverged: clip=fixed" in verdict.evidence[2]


def test_fewer_tokens(everything):
    """Fixed clipping is at its last loss after 140 steps; ZClip after as many as it takes a straight line."""
    fixed, zclip = RATES[5e-4]["fixed"], RATES[3e-3]["zclip"]

    def saves(steps_by_seed):
        straight = {
            fixed: lambda seed, steps, own: 6 - steps / 139,
            zclip: lambda seed, steps, own: 6 - steps / steps_by_seed[seed],
        }
        return with_loss(everything, straight)

    faster = saves([69.5, 60, 50])
    verdict = judge_claim(faster, FEWER)
    # 20 steps of 6 - s / 139 end with a mean of 6 - 129.5 / 139. That of 20 steps of 6 - s / 69.5, the last of them
    # number e, is as low from e = 75 on, after 76 of 140 steps; with 60 and 50 for 69.5 after 67 and 58.
    assert verdict.outcome == SUPPORTED and "52% fewer tokens (46%, 52%, 59% by seed" in verdict.evidence[0]
    verdict = judge_claim(saves([69.5, 60, 30]), FEWER)
    assert verdict.outcome == NOT_SUPPORTED and "57% fewer" in verdict.evidence[0], "or as few as 16 %"
    assert judge_claim(saves([60, 60, 60]), FEWER).outcome == NOT_SUPPORTED, "three seeds alike have p = 0.25"
    assert judge_claim(saves([110, 111, 112]), FEWER).outcome == NOT_SUPPORTED, "fewer, but not 35 %"
    assert judge_claim(saves([30, 139, 139]), FEWER).outcome == NOT_SUPPORTED, "not by chance"
    assert "0% fewer tokens (0%, 0%, 0% by seed" in judge_claim(saves([139, 139, 139]), FEWER).evidence[0]
    verdict = judge_claim(saves([139, 145, 69.5]), FEWER)
    assert "15% fewer tokens (0%, never, 46% by seed" in verdict.evidence[0], "never is no better than late"
    verdict = judge_claim(without(faster, (RATES[5e-3]["zclip"], 1)), FEWER)
    assert "5e-03 6% (2 of 3 seeds), 3e-03 56%" in verdict.evidence[1], verdict
    gone = judge_claim(faster._replace(diverged={(zclip, seed) for seed in SEEDS}), FEWER)
    assert gone.outcome == NOT_SUPPORTED and "(never, never, never by seed" in gone.evidence[0]
    gone = judge_claim(faster._replace(diverged={(RATES[1e-4]["fixed"], 0)}), FEWER)
    assert gone.outcome == SUPPORTED and gone.evidence[1].endswith(", 1e-04 fixed diverged")
    gone = judge_claim(faster._replace(diverged={(fixed, 0)}), FEWER)
    assert gone.outcome == NOT_TESTABLE and "required run has diverged: clip=fixed" in gone.evidence[0]


def test_reciprocal(everything):
    def losses(reciprocal, mean, most):
        shown = zip(("Reciprocal", "Mean", "Max"), (reciprocal, mean, most), strict=True)
        return with_result(everything, {VARIANTS[name]: {"test_loss": loss} for name, loss in shown})

    best = losses([4.0, 4.1, 4.2], [4.2, 4.31, 4.4], [4.5, 4.61, 4.7])
    verdict = judge_claim(best, RECIPROCAL)
    assert verdict.outcome == SUPPORTED and verdict.evidence[1].startswith(
        "reciprocal minus mean: -0.2033 (p = 0.00027"
    )
    assert verdict.evidence[0] == "mean test loss: reciprocal 4.100, mean 4.303, max 4.603"
    half = losses([4.0, 4.1, 4.2], [4.2, 4.31, 4.4], [4.0, 4.1, 4.21])
    assert judge_claim(half, RECIPROCAL).outcome == NOT_SUPPORTED, "below both"
    for missing in (None, float("nan")):
        nothing = judge_claim(losses([4.0, 4.1, missing], [4.2, 4.31, 4.4], [4.5, 4.61, 4.7]), RECIPROCAL)
        assert nothing.outcome == NOT_TESTABLE and "has no finite test_loss: clip=zclip" in nothing.evidence[0]
    assert judge_claim(losses([4.0, 4.1, 4.2], [4.0, 4.1, 4.21], [4.5, 4.61, 4.7]), RECIPROCAL).outcome == NOT_SUPPORTED
    assert judge_claim(losses([4.5, 4.61, 4.7], [4.2, 4.31, 4.4], [4.0, 4.1, 4.2]), RECIPROCAL).outcome == NOT_SUPPORTED
    verdict = judge_claim(best._replace(diverged={(VARIANTS["Reciprocal"], 1)}), RECIPROCAL)
    assert verdict.outcome == NOT_SUPPORTED and verdict.evidence[0].startswith("reciprocal has diverged: clip=zclip")
    assert judge_claim(best._replace(diverged={(VARIANTS["Max"], 1)}), RECIPROCAL).outcome == SUPPORTED, "it is beaten"


@pytest.mark.parametrize(("claim", "specs", "own"), [(THRESHOLD, THRESHOLDS, "2.5"), (ALPHA, ALPHAS, "0.97")])
def test_the_best_setting(claim, specs, own, everything):
    def losses(own_losses, **others):
        numbers = {spec: {"train_loss": [4.2, 4.31, 4.4]} for spec in specs.values()}
        numbers |= {specs[own]: {"train_loss": own_losses}}
        return with_result(everything, numbers | {specs[label]: {"train_loss": loss} for label, loss in others.items()})

    best = losses([4.0, 4.1, 4.2])
    assert judge_claim(best, claim).outcome == SUPPORTED
    assert judge_claim(losses([4.3, 4.4, 4.5]), claim).outcome == NOT_SUPPORTED, "worse"
    assert judge_claim(losses([4.2, 4.31, 4.4]), claim).outcome == NOT_SUPPORTED, "the same"
    rival = next(label for label in specs if label != own)
    verdict = judge_claim(losses([4.0, 4.1, 4.2], **{rival: [4.01, 4.1, 4.2]}), claim)
    assert verdict.outcome == NOT_SUPPORTED and f"{own} minus {rival}: -0.0033 (p = 0.42" in verdict.evidence[1], (
        verdict
    )
    wild = losses([4.0, 4.1, 4.2], **{rival: [3.6, 4.1, 5.4]})
    assert judge_claim(wild, claim).outcome == NOT_SUPPORTED, "below each, also those that are worse on the mean"
    verdict = judge_claim(best._replace(diverged={(specs[own], 0)}), claim)
    assert verdict.outcome == NOT_SUPPORTED and f"{own} has diverged" in verdict.evidence[0]
    verdict = judge_claim(best._replace(diverged={(specs[rival], 0)}), claim)
    assert verdict.outcome == SUPPORTED and f"{rival} has diverged" in verdict.evidence[-2], "it is beaten"
    alone = {(spec, 0) for label, spec in specs.items() if label != own}
    two = without(best, (specs[own], 1))._replace(diverged=alone)
    assert judge_claim(two, claim).outcome == NOT_TESTABLE, "two seeds beat nobody"
    gone = two._replace(diverged={(specs[own], 0)})
    assert judge_claim(gone, claim).outcome == NOT_TESTABLE, "and are beaten by nobody"
    lost = best._replace(runs=best.runs | {(specs[rival], 3): best.runs[specs[rival], 0]})
    better = with_result(lost, {specs[rival]: {"train_loss": [3.0, 3.1, 3.2, 3.3]}})
    verdict = judge_claim(better._replace(diverged={(specs[rival], 3)}), claim)
    assert verdict.outcome == NOT_SUPPORTED, "with a seed that the others lack it beats nobody, and is not beaten"
    others = {(spec, seed) for label, spec in specs.items() if label != own for seed in (1, 2)}
    verdict = judge_claim(without(best, *others)._replace(diverged={(s, 0) for s, _ in others}), claim)
    assert verdict.outcome == NOT_TESTABLE and verdict.evidence[0] == TOO_FEW_SEEDS, (
        "nothing is compared with three seeds"
    )
    fewer = without(best, *((spec, 0) for label, spec in specs.items() if label not in (own, rival)))
    verdict = judge_claim(fewer, claim)
    assert verdict.outcome == NOT_TESTABLE and "it needs three seeds" in verdict.evidence[0], "the same seeds for all"


def test_normal_norms(everything):
    """In windows that are short; whether there are more rejections than of normal distributions."""

    def norms(draw, steps=4000):
        def change(spec, seed, run):
            if spec != FIGURE_RUNS["figure9"]["ZClip"]:
                return run
            column = draw(np.random.default_rng(seed), steps)
            return run._replace(metrics={"step": np.arange(1, steps + 1), "grad_norm": column})

        return judge_claim(modify(everything, change), NORMAL)

    short = judge_claim(everything, NORMAL)
    assert short.outcome == NOT_TESTABLE and "are not short" in short.evidence[2]
    gone = everything._replace(diverged={(FIGURE_RUNS["figure9"]["ZClip"], 1)})
    assert "required run has diverged" in judge_claim(gone, NORMAL).evidence[0]
    long = norms(lambda rng, steps: rng.normal(1, 0.1, steps), steps=800)
    assert long.outcome == NOT_TESTABLE and "up to 6% of a run" in long.evidence[2], long
    normal = norms(lambda rng, steps: rng.normal(1, 0.1, steps))
    assert normal.outcome == SUPPORTED and "of norms in 0 of 6 windows" in normal.evidence[0], normal
    skew = norms(lambda rng, steps: rng.exponential(1, steps))
    assert skew.outcome == NOT_SUPPORTED and "of norms in 6 of 6 windows" in skew.evidence[0], skew
    few = norms(lambda rng, steps: np.where(np.arange(steps) % 60 < 2, 1.0, np.nan))
    assert few.outcome == NOT_TESTABLE and few.evidence[0] == "no window has 3 norms", few
    lognormal = norms(lambda rng, steps: np.exp(rng.normal(0, 1, steps)))
    assert "of norms in 6 of 6" in lognormal.evidence[0] and "of log norms in 0 of 6" in lognormal.evidence[1], (
        lognormal
    )


def test_overhead(everything):
    def shares(fixed, zclip):
        parts = {STRATEGIES["Fixed 1.0"]: fixed, STRATEGIES["ZClip"]: zclip}
        seconds = {
            spec: {"step_seconds": [{"forward_backward": 1 - share, "clip": share} for share in by_seed]}
            for spec, by_seed in parts.items()
        }
        return with_result(everything, seconds)

    little = shares([0.01, 0.011, 0.012], [0.012, 0.0131, 0.0139])
    verdict = judge_claim(little, OVERHEAD)
    assert verdict.outcome == SUPPORTED and "fixed clipping: +0.20 (p = 0.00083" in verdict.evidence[1], verdict
    assert judge_claim(shares([0.01] * 3, [0.0199] * 3), OVERHEAD).outcome == SUPPORTED
    slower = with_result(
        everything,
        {
            STRATEGIES[label]: {"step_seconds": [{"forward_backward": step - clip, "clip": clip}] * 3}
            for label, clip, step in (("Fixed 1.0", 0.01, 1.0), ("ZClip", 0.022, 2.0))
        },
    )
    assert judge_claim(slower, OVERHEAD).outcome == NOT_SUPPORTED, "1.2 % of a step with fixed clipping"
    assert judge_claim(shares([0.01] * 3, [0.0201] * 3), OVERHEAD).outcome == NOT_SUPPORTED
    assert judge_claim(shares([0.01, 0.011, 0.012], [0.04, 0.042, 0.041]), OVERHEAD).outcome == NOT_SUPPORTED
    assert judge_claim(shares([0.01, 0.01, 0.01], [0.01, 0.01, 0.03]), OVERHEAD).outcome == NOT_SUPPORTED, (
        "not for sure"
    )
    gone = little._replace(diverged={(STRATEGIES["No clipping"], 0)})
    assert judge_claim(gone, OVERHEAD).outcome == SUPPORTED, "it is not compared"


def by_seed(*numbers: float) -> dict[int, float]:
    return dict(enumerate(numbers))


def test_paired_differences():
    with pytest.raises(NotTestable, match="it needs three seeds"):
        difference_by_seed(by_seed(1.0, 2.0), by_seed(0.0, 0.0, 0.0))
    difference = difference_by_seed(by_seed(1.0, 2.0, 3.0), by_seed(2.0, 2.5, 4.5))
    # Differences -1, -0.5, -1.5: mean -1, standard error 0.5 / sqrt(3), t = -3.4641 with two degrees of freedom.
    assert difference.mean == -1 and difference.p == pytest.approx(0.07418, abs=1e-4)
    assert difference.high == pytest.approx(-1 + 4.3027 * 0.5 / 3**0.5, abs=1e-4)
    assert difference.low == pytest.approx(-1 - 4.3027 * 0.5 / 3**0.5, abs=1e-4)
    for one, p in ((1.0, 1.0), (2.0, 0.25)):
        same = difference_by_seed(by_seed(one, one, one), by_seed(1.0, 1.0, 1.0))
        assert same.p == p and same.low == same.high == same.mean, "the sign test"


def test_rates():
    """Garwood's intervals of Poisson counts: of none 0 to 3.69, of five 1.62 to 11.67."""
    assert event_rate(0, 10) == (0.0, pytest.approx(0.3689, abs=1e-4))
    assert event_rate(5, 10) == (pytest.approx(0.1623, abs=1e-4), pytest.approx(1.1668, abs=1e-4))


def test_losses_of_corrupted_batches_do_not_count_as_reached(everything):
    """A corrupted batch can be easy or hard."""
    key = (RATES[1e-3]["fixed"], 0)
    run = everything.runs[key]
    bad = run.config["data"]["corruption"]["steps"]
    loss = 6 - np.arange(140) / 139
    easy = loss.copy()
    easy[np.array(bad) - 1] = -100.0
    one, other = (run._replace(metrics={**run.metrics, "loss": each}) for each in (loss, easy))
    assert reach_final_loss(one, other).saved == 0 and reach_final_loss(other, one).saved == 0
    late = run._replace(config={**run.config, "data": {"corruption": {"steps": [139]}}})
    hard = loss.copy()
    hard[138] = 900.0
    reached = reach_final_loss(late._replace(metrics={**run.metrics, "loss": hard}), one)
    assert reached.loss == pytest.approx(6 - 129.5 / 139) and reached.final_difference == pytest.approx(0, abs=1e-9)


def test_run_that_reaches_the_loss_later_saves_nothing(everything):
    run = everything.runs[RATES[1e-3]["fixed"], 0]
    early, late = (
        run._replace(metrics={**run.metrics, "loss": np.maximum(5.0, 6 - np.arange(140) / steps)}) for steps in (60, 90)
    )
    assert reach_final_loss(early, late).saved == 0 < 0.2 < reach_final_loss(late, early).saved < 0.35
