"""Verdicts on spikes, each with runs that support the claim and runs that do not."""

import numpy as np

from experiments.paper.claims import CLAIMS, NOT_SUPPORTED, NOT_TESTABLE, SUPPORTED, judge_claim
from experiments.paper.tables_and_figures import RATES, SPIKE_LAB
from experiments.run.collect import RunCollection
from tests.experiments.modified_runs import with_excess_loss, with_loss
from tests.experiments.written_runs import SEEDS, without

LEAVES, REMOVES = [*CLAIMS][:2]


def with_spikes(collection: RunCollection, group: str, events: list[int]) -> RunCollection:
    """Return the runs with spikes of one step, a number by seed, spread over the learning rates of a strategy."""

    def losses(spec):
        at = next(number for number, row in enumerate(RATES.values()) if row[group] == spec)

        def change(seed, steps, own):
            many = events[seed] // len(RATES) + (at < events[seed] % len(RATES))
            return own + 9.0 * np.isin(steps, [60 + 4 * number for number in range(many)])

        return change

    return with_loss(collection, {row[group]: losses(row[group]) for row in RATES.values()})


def test_fixed_clipping_leaves_spikes(everything):
    """By the loss after corrupted batches, or by spikes alone; not where it leaves neither for sure."""
    assert judge_claim(everything, LEAVES).outcome == SUPPORTED
    clean = with_excess_loss(everything, "Fixed 1.0", [0.0, 0.0, 0.0])
    verdict = judge_claim(clean, LEAVES)
    assert verdict.outcome == NOT_SUPPORTED and "+0.000 (p = 1, 3 seeds, 95 %: " in verdict.evidence[1]
    assert "of which skipping the batches would cost about 0.014" in verdict.evidence[1], (
        "a step of 1 / 139, one to three times"
    )
    few = judge_claim(with_spikes(clean, "fixed", [2, 2, 1]), LEAVES)
    # 5 in 21 runs: chi-square of 10 and 12 degrees gives 1.62 to 11.67 (95 %).
    assert (
        few.outcome == NOT_SUPPORTED and "5 spikes in 21 runs over all learning rates, 0.08 to 0.56" in few.evidence[0]
    )
    many = judge_claim(with_spikes(clean, "fixed", [5, 5, 6]), LEAVES)
    assert (
        many.outcome == SUPPORTED and "16 spikes in 21 runs over all learning rates, 0.44 to 1.24" in many.evidence[0]
    )
    assert judge_claim(with_spikes(clean, "fixed", [35, 35, 35]), LEAVES).outcome == SUPPORTED, "as many in each"
    assert judge_claim(with_spikes(clean, "fixed", [5, 4, 4]), LEAVES).outcome == NOT_SUPPORTED, "13, or 0.33 in a run"
    noise = {
        row["fixed"]: lambda seed, steps, own: own + 9.0 * np.isin(steps, [60, 70, 90]) - 3.0 * np.isin(steps, [65, 75])
        for row in RATES.values()
    }
    verdict = judge_claim(with_loss(clean, noise), LEAVES)
    assert verdict.outcome == NOT_SUPPORTED and "63 spikes" in verdict.evidence[0] and "42 dips" in verdict.evidence[0]
    assert judge_claim(with_excess_loss(everything, "Fixed 1.0", [0.04, 0.04, 0.04]), LEAVES).outcome == SUPPORTED, (
        "0.026 beyond"
    )
    assert judge_claim(with_excess_loss(everything, "Fixed 1.0", [0.0, 0.3, 2.5]), LEAVES).outcome == NOT_SUPPORTED, (
        "not for sure"
    )
    little = with_excess_loss(everything, "Fixed 1.0", [0.02, 0.021, 0.022])
    assert judge_claim(little, LEAVES).outcome == NOT_SUPPORTED, "that is what the lost batches cost"
    assert judge_claim(little, REMOVES).outcome == NOT_TESTABLE, "nothing for sure"
    assert judge_claim(without(everything, (RATES[5e-3]["fixed"], 1)), LEAVES).outcome == SUPPORTED, "by the lab"
    gone = without(clean, *((SPIKE_LAB["Fixed 1.0"]["corrupted"], seed) for seed in SEEDS))
    verdict = judge_claim(gone, LEAVES)
    assert (
        verdict.outcome == NOT_TESTABLE and "loss after corrupted batches: it needs three seeds" in verdict.evidence[1]
    )
    assert "it is not known whether fixed clipping leaves any" in judge_claim(gone, REMOVES).evidence[0]
    key = (RATES[5e-3]["fixed"], 1)
    columns = {name: column[:50] for name, column in clean.runs[key].metrics.items()}
    short = clean._replace(runs=clean.runs | {key: clean.runs[key]._replace(metrics=columns)})
    verdict = judge_claim(short, LEAVES)
    assert verdict.outcome == NOT_TESTABLE and "learning rates: runs are too short to have any" in verdict.evidence[0]
    fewer = without(everything, (RATES[5e-3]["fixed"], 1))
    assert "spikes over all learning rates: it needs three seeds" in judge_claim(fewer, LEAVES).evidence[0]
    some = without(with_spikes(clean, "fixed", [35, 35, 35]), (RATES[5e-3]["fixed"], 1))
    assert judge_claim(some, LEAVES).outcome == NOT_TESTABLE, "two seeds have all learning rates"
    alone = without(clean, (SPIKE_LAB["Fixed 1.0"]["corrupted"], 0), *((RATES[5e-3]["fixed"], seed) for seed in (0, 1)))
    alone = alone._replace(diverged={(RATES[5e-3]["fixed"], 2)})
    assert judge_claim(alone, LEAVES).outcome == NOT_TESTABLE, "one run that diverged is no three seeds"
    alone = without(clean, *((SPIKE_LAB["Fixed 1.0"]["baseline"], seed) for seed in (0, 1)))
    verdict = judge_claim(alone._replace(diverged={(SPIKE_LAB["Fixed 1.0"]["baseline"], 2)}), LEAVES)
    assert verdict.outcome == NOT_TESTABLE and "corruption.steps=[] seed=2" in verdict.evidence[1], "but it is named"


def test_diverged_fixed_clipping_leaves_spikes(everything):
    clean = with_excess_loss(everything, "Fixed 1.0", [0.0, 0.0, 0.0])
    bad = SPIKE_LAB["Fixed 1.0"]["corrupted"]
    for many, gone in (
        (1, clean._replace(diverged={(bad, 1)})),
        (1, with_loss(clean, {bad: lambda seed, steps, own: np.where((steps == 83) & (seed == 2), np.nan, own)})),
        (3, with_loss(clean, {bad: lambda seed, steps, own: np.where(steps > 83, np.nan, own)}, {(bad, 0)})),
    ):
        verdict = judge_claim(gone, LEAVES)
        assert verdict.outcome == SUPPORTED and "not finite: clip=fixed paper.lr=0.001 " in verdict.evidence[0], verdict
        assert verdict.evidence[0].count("clip=fixed") == many, "the lab's run is one of Table 2's"
    for at in (30, 79):
        odd = {bad: lambda seed, steps, own, at=at: np.where((steps == at) & (seed == 2), np.nan, own)}
        assert "diverged, or" not in judge_claim(with_loss(clean, odd), LEAVES).evidence[0], "before, or at a bad batch"
    calm = SPIKE_LAB["Fixed 1.0"]["baseline"]
    assert not everything.runs[calm, 0].config["data"]["corruption"]["steps"]
    odd = with_loss(clean, {calm: lambda seed, steps, own: np.where((steps == 112) & (seed == 2), np.nan, own)})
    verdict = judge_claim(odd, LEAVES)
    assert verdict.outcome == SUPPORTED and verdict.evidence[0].count("corruption.steps=[]") == 1, (
        "the baseline run too"
    )
    assert (
        "loss after corrupted batches: diverged, or with a loss" in verdict.evidence[2] and len(verdict.evidence) == 4
    )
    verdict = judge_claim(clean._replace(diverged={(calm, 1)}), LEAVES)
    assert verdict.outcome == SUPPORTED and "corruption.steps=[] seed=1" in verdict.evidence[0]


def test_zclip_removes_spikes_if_the_rest_is_certainly_small(everything):
    """The claim is not supported if seeds differ so much that the rest may be larger."""
    assert judge_claim(with_excess_loss(everything, "ZClip", [0.0, 0.001, 0.002]), REMOVES).outcome == SUPPORTED
    verdict = judge_claim(with_excess_loss(everything, "ZClip", [0.03, 0.03, 0.03]), REMOVES)
    assert verdict.outcome == SUPPORTED, "0.015 beyond what the lost batches cost"
    assert judge_claim(with_excess_loss(everything, "ZClip", [0.05, 0.05, 0.05]), REMOVES).outcome == NOT_SUPPORTED
    assert judge_claim(with_excess_loss(everything, "ZClip", [0.0, 0.03, 0.045]), REMOVES).outcome == NOT_SUPPORTED, (
        "0.01, or more"
    )
    noisy = judge_claim(with_excess_loss(everything, "ZClip", [0.0, 0.3, 2.5]), REMOVES)
    assert noisy.outcome == NOT_SUPPORTED and "p = 0.3" in noisy.evidence[1], noisy
    clean = with_excess_loss(everything, "ZClip", [0.0, 0.0, 0.0])
    verdict = judge_claim(with_spikes(clean, "zclip", [1, 1, 1]), REMOVES)
    assert judge_claim(with_spikes(clean, "zclip", [1, 0, 0]), REMOVES).outcome == NOT_SUPPORTED, "1, or up to 5.57"
    # 3 spikes in 21 runs: 0.62 to 8.77 with 95 %.
    assert (
        verdict.outcome == NOT_SUPPORTED
        and "3 spikes in 21 runs over all learning rates, 0.03 to 0.42" in verdict.evidence[0]
    )
    verdict = judge_claim(without(clean, (RATES[5e-3]["zclip"], 0)), REMOVES)
    assert verdict.outcome == NOT_TESTABLE and "over all learning rates: it needs three seeds" in verdict.evidence[0]
    assert judge_claim(
        without(with_excess_loss(everything, "ZClip", [0.5] * 3), (RATES[5e-3]["zclip"], 0)), REMOVES
    ).outcome == (NOT_SUPPORTED), "the lab shows that some are left"
    verdict = judge_claim(without(clean, (SPIKE_LAB["ZClip"]["corrupted"], 0)), REMOVES)
    assert verdict.outcome == NOT_TESTABLE
    assert "that loss, ZClip minus Fixed 1.0: -" in judge_claim(clean, REMOVES).evidence[2]
    only_by_spikes = with_excess_loss(with_spikes(clean, "fixed", [9, 9, 9]), "Fixed 1.0", [0.0, 0.0, 0.0])
    assert judge_claim(only_by_spikes, REMOVES).outcome == SUPPORTED, "fixed clipping's are in the losses alone"


def test_dips_are_subtracted_from_spikes(everything):
    """4 spikes in 21 runs are up to 0.49 per run, 21 dips at least 0.62; corrupted batches count as neither."""
    clean = with_excess_loss(everything, "ZClip", [0.0, 0.0, 0.0])
    spikes = with_spikes(clean, "zclip", [2, 1, 1])
    assert judge_claim(spikes, REMOVES).outcome == NOT_SUPPORTED
    dips = {
        row["zclip"]: lambda seed, steps, own: own - 3.0 * (steps == 66) - 9.0 * (steps == 79) for row in RATES.values()
    }
    verdict = judge_claim(with_loss(spikes, dips), REMOVES)
    assert "21 dips" in verdict.evidence[0], verdict
    assert verdict.outcome == SUPPORTED and ": -1.48 to -0.13 more spikes" in verdict.evidence[0], verdict


def test_removal_is_not_testable_without_spikes(everything):
    calm = everything
    for label in SPIKE_LAB:
        calm = with_excess_loss(calm, label, [0.0, 0.0, 0.0])
    verdict = judge_claim(calm, REMOVES)
    assert verdict.evidence == ["it is not shown that fixed clipping leaves any spikes that could be removed"]
    assert verdict.outcome == NOT_TESTABLE


def test_diverged_zclip_removes_no_spikes(everything):
    clean = with_excess_loss(everything, "ZClip", [0.0, 0.0, 0.0])
    bad = SPIKE_LAB["ZClip"]["corrupted"]
    for spec in (bad, RATES[5e-3]["zclip"]):
        verdict = judge_claim(clean._replace(diverged={(spec, 2)}), REMOVES)
        assert verdict.outcome == NOT_SUPPORTED and "not finite: clip=zclip" in verdict.evidence[0], verdict
    verdict = judge_claim(clean._replace(diverged={(RATES[5e-3]["fixed"], 1)}), REMOVES)
    assert verdict.outcome == SUPPORTED, "fixed clipping is worse still"
    verdict = judge_claim(clean._replace(diverged={(SPIKE_LAB["ZClip"]["baseline"], 1)}), REMOVES)
    assert verdict.outcome == NOT_SUPPORTED and "corruption.steps=[] seed=1" in verdict.evidence[0]
    assert "required run has diverged" in verdict.evidence[3], "and is no measure"
    for diverged, nans in ((None, [83]), ({(bad, 2)}, range(83, 140))):
        broken = with_loss(
            clean,
            {bad: lambda seed, steps, own, nans=nans: np.where(np.isin(steps, nans) & (seed == 2), np.nan, own)},
            diverged,
        )
        verdict = judge_claim(broken, REMOVES)
        assert verdict.outcome == NOT_SUPPORTED and "not finite: clip=zclip" in verdict.evidence[0], verdict
        assert "seed=2" in verdict.evidence[0]
