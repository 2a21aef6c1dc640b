"""Verdicts on the paper's claims, each with runs that support the claim and runs that do not."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.claims.verdict import (
    CONTRADICTED,
    NO_EFFECT,
    NOT_TESTABLE,
    SUPPORTED,
    TOO_FEW_SEEDS,
    UNDECIDED,
    Claim,
    Verdict,
    judge,
)
from experiments.claims.verdict import judge_claim as judge_one
from experiments.paper.best_rates import lowest_between
from experiments.paper.by_seed import measure_by_seed
from experiments.paper.claims import PAPER_CLAIMS
from experiments.paper.measures import reach_final_loss
from experiments.paper.tables_and_figures import ALPHAS, FIGURE_RUNS, RATES, STRATEGIES, SUITES, THRESHOLDS, VARIANTS
from experiments.run.collect import RunCollection
from tests.experiments.modified_runs import with_loss, with_result
from tests.experiments.written_runs import SEEDS, modify, without

LEAVES, _, HIGHER, FEWER, RECIPROCAL, THRESHOLD, ALPHA, NORMAL, OVERHEAD = PAPER_CLAIMS


def judge_claim(collection: RunCollection, claim: Claim) -> Verdict:
    return judge_one(claim, collection)


def outcomes(collection: RunCollection) -> dict[str, str]:
    """Return the outcome of each of the paper's claims, by its text."""
    return {verdict.claim.text: verdict.outcome for verdict in judge(PAPER_CLAIMS, collection)}


def test_verdicts_need_three_seeds_and_one_text_and_never_raise(everything):
    two = everything._replace(runs={key: run for key, run in everything.runs.items() if key[1] < 2})
    assert {*outcomes(two).values()} == {NOT_TESTABLE}
    some = everything._replace(runs={key: run for at, (key, run) in enumerate(everything.runs.items()) if at % 3})
    assert len(outcomes(some)) == 9, "whatever is missing"
    all_diverged = outcomes(everything._replace(diverged={*everything.runs}))
    supported = {text for text, outcome in all_diverged.items() if outcome == SUPPORTED}
    assert len(all_diverged) == 9 and supported <= {LEAVES.text, OVERHEAD.text}
    other = dict(everything.runs)
    key = (STRATEGIES["AutoClip"], 0)
    other[key] = other[key]._replace(result={**other[key].result, "data_fingerprint": "ffff"})
    verdict = judge_claim(everything._replace(runs=other), OVERHEAD)
    assert verdict.outcome == NOT_TESTABLE and "different texts (fingerprints abcd and ffff)" in verdict.evidence[0]
    assert judge_claim(everything._replace(runs=other), LEAVES).outcome == SUPPORTED, "it needs no such run"


def with_seconds(collection: RunCollection, zclip: list[float]) -> RunCollection:
    """Return the runs with the share of a step that ZClip spends on clipping, by seed; fixed clipping's is 0.01."""
    shares = {"Fixed 1.0": [0.01] * 3, "ZClip": zclip}
    return with_result(
        collection,
        {
            STRATEGIES[label]: {"step_seconds": [{"forward_backward": 1 - share, "clip": share} for share in by_seed]}
            for label, by_seed in shares.items()
        },
    )


def test_claims_with_unreadable_runs_are_not_testable(everything):
    """Missing runs are named."""
    little = with_seconds(everything, [0.012, 0.0121, 0.0122])
    assert judge_claim(little, OVERHEAD).outcome == SUPPORTED
    key = (STRATEGIES["AutoClip"], 1)
    missing = without(little, key)
    for lacking, note in (
        (missing._replace(excluded=frozenset({key})), "excluded: AutoClip (seed 1)"),
        (missing._replace(unfinished={key: 7}), "unfinished: AutoClip (seed 1 after 7 steps)"),
    ):
        verdict = judge_claim(lacking, OVERHEAD)
        assert verdict.outcome == NOT_TESTABLE and verdict.evidence[-1] == note
        assert verdict.evidence[0] == "supported, but for runs that are unfinished or excluded"
        assert verdict.part is verdict.p is None
        unaffected = judge_claim(little, RECIPROCAL).evidence
        assert judge_claim(lacking, RECIPROCAL).evidence == unaffected, "a claim about other runs"
    verdict = judge_claim(missing, OVERHEAD)
    assert verdict.outcome == SUPPORTED and verdict.evidence[-1] == "not run: AutoClip (seed 1)"
    never = without(everything, *((spec, seed) for spec in STRATEGIES.values() for seed in SEEDS))
    assert judge_claim(never, OVERHEAD).evidence == [TOO_FEW_SEEDS, "none of its runs has begun"]


def test_verdicts_name_their_runs_scale_and_command(everything):
    verdict = judge_one(RECIPROCAL, everything, ["scale=micro", "seed=0,1,2"])
    names = {run.path.name for (spec, _), run in everything.runs.items() if spec in VARIANTS.values()}
    assert {*verdict.runs} == names and len(names) == 9
    assert verdict.scale == "640k parameters, 287k tokens, seeds 0, 1, 2"
    assert verdict.command == "python train.py -m experiment=table5 scale=micro seed=0,1,2"
    assert judge_one(LEAVES, everything, []).command == "python train.py -m 'experiment=[table2,spike_lab]'"
    assert all({*claim.experiments} <= {*SUITES} for claim in PAPER_CLAIMS)
    for claim in PAPER_CLAIMS:
        trained = {spec for name in claim.experiments for spec in SUITES[name]}
        assert {spec for _, spec in claim.specs} <= trained, f"the command trains the runs of {claim.text}"


def test_means_over_runs_use_seeds_that_have_all_runs(everything):
    specs = [RATES[lr]["fixed"] for lr in (1e-3, 3e-3, 5e-3)]
    numbers = {
        spec: {"train_loss": [each, each + 1, each + 2]} for spec, each in zip(specs, (1.0, 2.0, 6.0), strict=True)
    }
    collection = without(with_result(everything, numbers), (RATES[3e-3]["fixed"], 1))
    assert measure_by_seed(collection, "train_loss", specs) == {0: 3.0, 2: 5.0}


def with_best_rates(collection: RunCollection, **best: list[float]) -> RunCollection:
    """Return the runs with losses that rise with the square of the log rate from that of the given rate, by seed."""
    return with_result(
        collection,
        {
            row[group]: {"train_loss": [4 + math.log(lr / rate) ** 2 for rate in rates]}
            for lr, row in RATES.items()
            for group, rates in best.items()
        },
    )


@pytest.mark.parametrize(
    ("fixed", "zclip", "outcome"),
    [
        ([4e-4, 6e-4, 8e-4], [8e-4, 13e-4, 15e-4], SUPPORTED),
        ([8e-4, 13e-4, 15e-4], [4e-4, 6e-4, 8e-4], CONTRADICTED),
        ([9e-4, 10e-4, 11e-4], [9e-4, 10e-4, 11.2e-4], NO_EFFECT),
        ([9e-4, 10e-4, 11e-4], [8e-4, 12e-4, 16e-4], UNDECIDED),
        ([1e-4] * 3, [5e-3] * 3, UNDECIDED),
    ],
)
def test_higher_learning_rates(fixed, zclip, outcome, everything):
    """Best rates between those of the grid are found exactly, as losses are parabolas over log rates."""
    verdict = judge_claim(with_best_rates(everything, fixed=fixed, zclip=zclip), HIGHER)
    assert verdict.outcome == outcome
    ratios = [math.log(one / other) for one, other in zip(zclip, fixed, strict=True)]
    assert verdict.part.number.value == pytest.approx(np.mean(ratios))
    if len(set(ratios)) > 1:
        expected = stats.t.interval(0.95, 2, np.mean(ratios), stats.sem(ratios))
        assert verdict.part.number.interval() == pytest.approx(expected)
    assert f"fixed {', '.join(f'{rate:.2g}' for rate in fixed)}; ZClip {zclip[0]:.2g}, " in verdict.evidence[1]


def test_rates_at_which_runs_diverge_allow_nothing(everything):
    """They count against their strategy. A rate next to a diverged run is not estimated between the two."""
    same = with_best_rates(everything, fixed=[9e-4] * 3, zclip=[9e-4] * 3)
    gone = {(row["fixed"], seed) for lr, row in RATES.items() for seed in range(3) if lr > 1e-4}
    verdict = judge_claim(same._replace(diverged=gone), HIGHER)
    assert "fixed 0.0001, 0.0001, 0.0001; ZClip 0.0009, " in verdict.evidence[1]
    for row, outcome, text in (("zclip", CONTRADICTED, "ZClip none, none, none"), ("fixed", SUPPORTED, "fixed none")):
        gone = {(specs[row], seed) for specs in RATES.values() for seed in range(3)}
        verdict = judge_claim(same._replace(diverged=gone), HIGHER)
        assert verdict.outcome == outcome and text in verdict.evidence[1]
    gone = {(specs["zclip"], 1) for specs in RATES.values()}
    assert judge_claim(same._replace(diverged=gone), HIGHER).outcome == CONTRADICTED, "with one seed it allows no rate"
    gone |= {(specs["fixed"], 2) for specs in RATES.values()}
    assert judge_claim(same._replace(diverged=gone), HIGHER).outcome == NOT_TESTABLE


def test_higher_learning_rates_need_all_runs_of_three_seeds(everything):
    verdict = judge_claim(without(everything, (RATES[1e-3]["zclip"], 1)), HIGHER)
    assert verdict.outcome == NOT_TESTABLE and verdict.evidence[0] == TOO_FEW_SEEDS, "a rate that was not run"
    low = with_result(everything, {RATES[lr]["zclip"]: {"train_loss": [4.0, 4.1, 4.2]} for lr in (1e-3, 3e-3, 5e-3)})
    assert "ZClip minus fixed: -" in judge_claim(low, HIGHER).evidence[2]
    verdict = judge_claim(low._replace(diverged={(RATES[3e-3]["fixed"], 2)}), HIGHER)
    assert "required run has diverged: clip=fixed" in verdict.evidence[2]


def test_lowest_loss_is_found_between_rates():
    losses = {rate: (math.log(rate / 2e-3)) ** 2 for rate in (1e-4, 1e-3, 3e-3, 1e-2)}
    assert lowest_between(losses) == pytest.approx(2e-3)
    assert lowest_between(losses | {1e-2: math.inf}) == 3e-3, "a neighbour has diverged"
    assert lowest_between({1e-3: 1.0, 3e-3: 2.0}) == 1e-3, "an end of the grid"
    assert lowest_between({1e-3: 1.0, 3e-3: 1.0, 1e-2: 1.0, 3e-2: 2.0}) == 1e-3, "the first of equal ones"
    assert lowest_between({1e-3: math.inf, 3e-3: math.inf}) == 0


def test_fewer_tokens(everything):
    """Fixed clipping falls by 1 nat in 140 steps. ZClip's loss after 91 of them, 65 %, is that of a straight line."""
    fixed, zclip = RATES[5e-4]["fixed"], RATES[3e-3]["zclip"]

    def falls_in(steps_by_seed):
        straight = {
            fixed: lambda seed, steps, own: 6 - steps / 139,
            zclip: lambda seed, steps, own: 6 - steps / steps_by_seed[seed],
        }
        return with_loss(everything, straight)

    faster = falls_in([69.5, 67, 65])
    verdict = judge_claim(faster, FEWER)
    # Fixed clipping's last 20 steps have a mean of 6 - 129.5 / 139, and ZClip's steps 71 to 90 one of 6 - 80.5 / 69.5.
    above = np.mean([129.5 / 139 - 80.5 / steps for steps in (69.5, 67, 65)])
    assert verdict.outcome == SUPPORTED and verdict.part.number.value == pytest.approx(above), verdict
    assert "46%, 48%, 49% by seed" in verdict.evidence[1]
    late = judge_claim(falls_in([110, 111, 112]), FEWER)
    assert late.outcome == CONTRADICTED, "fewer, but not 35 %"
    assert late.part.number.value == pytest.approx(np.mean([129.5 / 139 - 80.5 / s for s in (110, 111, 112)]))
    assert judge_claim(falls_in([69.5, 90, 100]), FEWER).outcome == UNDECIDED, "not for sure"
    assert judge_claim(falls_in([60, 60, 60]), FEWER).outcome == UNDECIDED, "three seeds alike have p = 1 / 8"
    verdict = judge_claim(falls_in([139, 145, 69.5]), FEWER)
    assert "0%, never, 46% by seed" in verdict.evidence[1]
    verdict = judge_claim(without(faster, (RATES[5e-3]["zclip"], 1)), FEWER)
    assert "5e-03 6% (2 of 3 seeds), 3e-03 5" in verdict.evidence[2], verdict
    gone = judge_claim(faster._replace(diverged={(zclip, 1)}), FEWER)
    assert gone.outcome == CONTRADICTED and gone.p == 0, "one run that diverged is one too many"
    gone = judge_claim(faster._replace(diverged={(RATES[1e-4]["fixed"], 0)}), FEWER)
    assert gone.outcome == SUPPORTED and gone.evidence[2].endswith(", 1e-04 fixed diverged")
    gone = judge_claim(faster._replace(diverged={(fixed, 0)}), FEWER)
    assert gone.outcome == NOT_TESTABLE and "required run has diverged: clip=fixed" in gone.evidence[0]


def test_reciprocal(everything):
    def losses(reciprocal, mean, most):
        shown = zip(("Reciprocal", "Mean", "Max"), (reciprocal, mean, most), strict=True)
        return with_result(everything, {VARIANTS[name]: {"test_loss": loss} for name, loss in shown})

    own, high, higher = [4.0, 4.1, 4.2], [4.2, 4.31, 4.4], [4.5, 4.61, 4.7]
    best = losses(own, high, higher)
    verdict = judge_claim(best, RECIPROCAL)
    assert verdict.outcome == SUPPORTED and verdict.evidence[0].startswith(
        "mean minus reciprocal: +0.2033 nats (95 %: "
    )
    assert "mean test loss: reciprocal 4.100, mean 4.303, max 4.603" in verdict.evidence
    # The differences are 0.2, 0.21 and 0.2: 0.2033 with a standard error of 0.00333, and 0.01 nats are beyond t = 58.
    assert verdict.p == pytest.approx(stats.t.sf((0.61 / 3 - 0.01) / (0.01 / 3), 2)), "that of the nearer rival"
    close = [4.001, 4.102, 4.2]
    assert judge_claim(losses(own, close, close), RECIPROCAL).outcome == NO_EFFECT, "within 0.01 nats of both"
    assert judge_claim(losses(own, high, close), RECIPROCAL).outcome == NO_EFFECT, "of one"
    assert judge_claim(losses(own, [4.0, 4.2, 4.5], high), RECIPROCAL).outcome == UNDECIDED
    for missing in (None, float("nan")):
        nothing = judge_claim(losses([4.0, 4.1, missing], high, higher), RECIPROCAL)
        assert nothing.outcome == NOT_TESTABLE and "has no finite test_loss: clip=zclip" in nothing.evidence[0]
    assert judge_claim(losses(higher, high, own), RECIPROCAL).outcome == CONTRADICTED, "one is below"
    assert judge_claim(losses(high, own, higher), RECIPROCAL).outcome == CONTRADICTED
    verdict = judge_claim(best._replace(diverged={(VARIANTS["Reciprocal"], 1)}), RECIPROCAL)
    assert verdict.outcome == CONTRADICTED and verdict.evidence[1].startswith("reciprocal has diverged: clip=zclip")
    assert judge_claim(best._replace(diverged={(VARIANTS["Max"], 1)}), RECIPROCAL).outcome == SUPPORTED, "it is beaten"


@pytest.mark.parametrize(("claim", "specs", "own"), [(THRESHOLD, THRESHOLDS, "2.5"), (ALPHA, ALPHAS, "0.97")])
def test_the_best_setting(claim, specs, own, everything):
    def losses(own_losses, **others):
        numbers = {spec: {"train_loss": [4.2, 4.31, 4.4]} for spec in specs.values()}
        numbers |= {specs[own]: {"train_loss": own_losses}}
        return with_result(everything, numbers | {specs[label]: {"train_loss": loss} for label, loss in others.items()})

    best = losses([4.0, 4.1, 4.2])
    assert judge_claim(best, claim).outcome == SUPPORTED
    assert judge_claim(losses([4.3, 4.4, 4.51]), claim).outcome == CONTRADICTED, "worse"
    assert judge_claim(losses([4.201, 4.312, 4.4]), claim).outcome == NO_EFFECT, "the same"
    rival = next(label for label in specs if label != own)
    verdict = judge_claim(losses([4.0, 4.1, 4.2], **{rival: [4.01, 4.1, 4.2]}), claim)
    # 0.01, 0, 0: 0.0033 with an interval of 4.303 * 0.0033 to either side.
    assert verdict.outcome == UNDECIDED and verdict.part.what == f"{rival} minus {own}", verdict
    assert f"{rival} minus {own}: +0.0033 nats (95 %: -0.0110 to 0.0177, 3 seeds)" in verdict.evidence
    wild = losses([4.0, 4.1, 4.2], **{rival: [3.6, 4.1, 5.4]})
    assert judge_claim(wild, claim).outcome == UNDECIDED, "below each, also those that are worse on the mean"
    lower = losses([4.0, 4.1, 4.2], **{rival: [3.9, 4.01, 4.1]})
    verdict = judge_claim(lower, claim)
    assert verdict.outcome == CONTRADICTED and verdict.part.what == f"{rival} minus {own}", "by one of five"
    error = np.std([-0.1, -0.09, -0.1], ddof=1) / 3**0.5
    assert verdict.p == pytest.approx(5 * stats.t.sf((0.29 / 3 - 0.01) / error, 2)), "each of five could have been"
    verdict = judge_claim(best._replace(diverged={(specs[own], 0)}), claim)
    assert verdict.outcome == CONTRADICTED and f"{own} has diverged" in verdict.evidence[1]
    verdict = judge_claim(best._replace(diverged={(specs[rival], 0)}), claim)
    assert verdict.outcome == SUPPORTED and any(f"{rival} has diverged" in text for text in verdict.evidence)
    alone = {(spec, 0) for label, spec in specs.items() if label != own}
    two = without(best, (specs[own], 1))._replace(diverged=alone)
    assert judge_claim(two, claim).outcome == NOT_TESTABLE, "two seeds beat nobody"
    gone = two._replace(diverged={(specs[own], 0)})
    assert judge_claim(gone, claim).outcome == NOT_TESTABLE, "and are beaten by nobody"
    lost = best._replace(runs=best.runs | {(specs[rival], 3): best.runs[specs[rival], 0]})
    better = with_result(lost, {specs[rival]: {"train_loss": [3.9, 4.01, 4.1, 9.0]}})
    verdict = judge_claim(better._replace(diverged={(specs[rival], 3)}), claim)
    assert verdict.outcome == CONTRADICTED, "a seed that the others lack does not count"
    fewer = without(best, *((spec, 0) for label, spec in specs.items() if label not in (own, rival)))
    verdict = judge_claim(fewer, claim)
    assert verdict.outcome == NOT_TESTABLE and verdict.evidence[0] == TOO_FEW_SEEDS, "the same seeds for all"


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
    assert short.outcome == NOT_TESTABLE and "are not short" in short.evidence[0]
    gone = everything._replace(diverged={(FIGURE_RUNS["figure9"]["ZClip"], 1)})
    assert "required run has diverged" in judge_claim(gone, NORMAL).evidence[0]
    long = norms(lambda rng, steps: rng.normal(1, 0.1, steps), steps=800)
    assert long.outcome == NOT_TESTABLE and "up to 6% of a run" in long.evidence[0], long
    normal = norms(lambda rng, steps: rng.normal(1, 0.1, steps))
    # None of six is below a half with p = 1 / 2^6; the interval of Clopper and Pearson ends at 1 - 0.025^(1/6).
    assert normal.outcome == SUPPORTED and normal.p == pytest.approx(1 / 64), normal
    assert normal.part.number.interval() == (0, pytest.approx(1 - 0.025 ** (1 / 6)))
    skew = norms(lambda rng, steps: rng.exponential(1, steps))
    assert skew.outcome == CONTRADICTED and "of norms in 6 of 6 windows" in skew.evidence[1], skew
    few = norms(lambda rng, steps: np.where(np.arange(steps) % 60 < 2, 1.0, np.nan))
    assert few.outcome == NOT_TESTABLE and few.evidence[0] == "no window has 3 norms", few
    lognormal = norms(lambda rng, steps: np.exp(rng.normal(0, 1, steps)))
    assert "of norms in 6 of 6" in lognormal.evidence[1] and "of log norms in 0 of 6" in lognormal.evidence[2], (
        lognormal
    )


def test_overhead(everything):
    verdict = judge_claim(with_seconds(everything, [0.0119, 0.0121, 0.012]), OVERHEAD)
    assert (
        verdict.outcome == SUPPORTED
        and "fixed clipping: +0.20 % of a step (95 %: 0.18 to 0.22, 3" in verdict.evidence[0]
    )
    assert judge_claim(with_seconds(everything, [0.009, 0.0091, 0.0092]), OVERHEAD).outcome == SUPPORTED, "it is faster"
    slower = with_result(
        everything,
        {
            STRATEGIES[label]: {"step_seconds": [{"forward_backward": step - c, "clip": c} for c in clip]}
            for label, clip, step in (("Fixed 1.0", [0.01] * 3, 1.0), ("ZClip", [0.022, 0.0221, 0.0222], 2.0))
        },
    )
    assert judge_claim(slower, OVERHEAD).outcome == CONTRADICTED, "1.2 % of a step with fixed clipping"
    assert judge_claim(with_seconds(everything, [0.0199, 0.0201, 0.0203]), OVERHEAD).outcome == UNDECIDED
    assert judge_claim(with_seconds(everything, [0.04, 0.042, 0.041]), OVERHEAD).outcome == CONTRADICTED
    assert judge_claim(with_seconds(everything, [0.01, 0.0101, 0.03]), OVERHEAD).outcome == UNDECIDED, "not for sure"
    gone = with_seconds(everything, [0.012, 0.0121, 0.0122])._replace(diverged={(STRATEGIES["No clipping"], 0)})
    assert judge_claim(gone, OVERHEAD).outcome == SUPPORTED, "it is not compared"


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
