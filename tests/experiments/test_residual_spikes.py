"""Verdicts on spikes, each with runs that support the claim and runs that do not."""

import math

import numpy as np
import pytest

from experiments.claims.verdict import (
    CONTRADICTED,
    NO_EFFECT,
    NOT_TESTABLE,
    SUPPORTED,
    UNDECIDED,
    Claim,
    Verdict,
)
from experiments.claims.verdict import judge_claim as judge_one
from experiments.paper.claims import PAPER_CLAIMS
from experiments.paper.tables_and_figures import RATES, SPIKE_LAB
from experiments.run.collect import RunCollection
from tests.experiments.modified_runs import with_excess_loss, with_loss
from tests.experiments.written_runs import SEEDS, without

LEAVES, REMOVES = PAPER_CLAIMS[:2]
#: Excess losses that are next to none, and differ.
CALM = [0.0, 0.001, 0.002]


def judge_claim(collection: RunCollection, claim: Claim) -> Verdict:
    return judge_one(claim, collection)


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
    clean = with_excess_loss(everything, "Fixed 1.0", CALM)
    # No event in 21 runs has an interval up to 0.18 per run, and the loss is about 0.015 below the cost of skipping.
    verdict = judge_claim(clean, LEAVES)
    assert verdict.outcome == NO_EFFECT, verdict
    assert "Fixed 1.0: without that cost it is +0.001 nats (95 %: -0.001 to 0.003)" in verdict.evidence[3]
    assert "skipping the batches would cost about 0.014" in verdict.evidence[3], "a step of 1 / 139, one to three times"
    much = judge_claim(with_excess_loss(everything, "Fixed 1.0", [0.3, 0.31, 0.32]), LEAVES)
    assert much.outcome == SUPPORTED and much.part.smallest.unit == "nats"
    few = judge_claim(with_spikes(clean, "fixed", [2, 2, 1]), LEAVES)
    # 5 in 21 runs: chi-square of 10 and 12 degrees gives 1.62 to 11.67 (95 %).
    assert few.outcome == UNDECIDED and "5 spikes in 21 runs over all learning rates, 0.08 to 0.56" in few.evidence[2]
    many = judge_claim(with_spikes(clean, "fixed", [7, 7, 6]), LEAVES)
    assert many.outcome == SUPPORTED and many.part.smallest.unit == "spikes per run"
    # 20 events are 12.22 to 30.89, and no dips up to 3.69: (12.22 - 3.69) / 21.
    assert many.part.number.interval().low == pytest.approx((12.217 - 3.689) / 21, abs=1e-3)
    assert judge_claim(with_spikes(clean, "fixed", [35, 35, 35]), LEAVES).outcome == SUPPORTED, "as many in each"
    noise = {
        row["fixed"]: lambda seed, steps, own: own + 9.0 * np.isin(steps, [60, 70, 90]) - 3.0 * np.isin(steps, [65, 75])
        for row in RATES.values()
    }
    verdict = judge_claim(with_loss(clean, noise), LEAVES)
    assert verdict.outcome == UNDECIDED and "63 spikes" in verdict.evidence[2] and "42 dips" in verdict.evidence[2]
    wild = judge_claim(with_excess_loss(everything, "Fixed 1.0", [0.0, 0.3, 2.5]), LEAVES)
    assert wild.outcome == UNDECIDED, "not for sure"
    little = with_excess_loss(everything, "Fixed 1.0", [0.02, 0.021, 0.022])
    assert judge_claim(little, LEAVES).outcome == NO_EFFECT, "that is what the lost batches cost"
    assert judge_claim(little, REMOVES).outcome == NOT_TESTABLE, "nothing for sure"


def test_one_of_both_measures_can_show_spikes(everything):
    much = with_excess_loss(everything, "Fixed 1.0", [0.3, 0.31, 0.32])
    clean = with_excess_loss(everything, "Fixed 1.0", CALM)
    assert judge_claim(without(much, (RATES[5e-3]["fixed"], 1)), LEAVES).outcome == SUPPORTED, "by the lab"
    gone = without(clean, *((SPIKE_LAB["Fixed 1.0"]["corrupted"], seed) for seed in SEEDS))
    verdict = judge_claim(gone, LEAVES)
    assert verdict.outcome == NOT_TESTABLE
    assert "loss after corrupted batches: it needs three seeds" in verdict.evidence[0]
    assert "it is not known whether fixed clipping leaves any" in judge_claim(gone, REMOVES).evidence[0]
    key = (RATES[5e-3]["fixed"], 1)
    columns = {name: column[:50] for name, column in clean.runs[key].metrics.items()}
    short = clean._replace(runs=clean.runs | {key: clean.runs[key]._replace(metrics=columns)})
    verdict = judge_claim(short, LEAVES)
    assert verdict.outcome == NOT_TESTABLE and "learning rates: runs are too short to have any" in verdict.evidence[0]
    some = without(with_spikes(clean, "fixed", [35, 35, 35]), (RATES[5e-3]["fixed"], 1))
    assert judge_claim(some, LEAVES).outcome == NOT_TESTABLE, "two seeds have all learning rates"
    alone = without(clean, (SPIKE_LAB["Fixed 1.0"]["corrupted"], 0), *((RATES[5e-3]["fixed"], seed) for seed in (0, 1)))
    alone = alone._replace(diverged={(RATES[5e-3]["fixed"], 2)})
    assert judge_claim(alone, LEAVES).outcome == NOT_TESTABLE, "one run that diverged is no three seeds"
    alone = without(clean, *((SPIKE_LAB["Fixed 1.0"]["baseline"], seed) for seed in (0, 1)))
    verdict = judge_claim(alone._replace(diverged={(SPIKE_LAB["Fixed 1.0"]["baseline"], 2)}), LEAVES)
    assert verdict.outcome == NOT_TESTABLE and "corruption.steps=[] seed=2" in verdict.evidence[0], "but it is named"


def test_diverged_fixed_clipping_leaves_spikes(everything):
    clean = with_excess_loss(everything, "Fixed 1.0", CALM)
    bad = SPIKE_LAB["Fixed 1.0"]["corrupted"]
    for many, gone in (
        (1, clean._replace(diverged={(bad, 1)})),
        (1, with_loss(clean, {bad: lambda seed, steps, own: np.where((steps == 83) & (seed == 2), np.nan, own)})),
        (3, with_loss(clean, {bad: lambda seed, steps, own: np.where(steps > 83, np.nan, own)}, {(bad, 0)})),
    ):
        verdict = judge_claim(gone, LEAVES)
        assert verdict.outcome == SUPPORTED and verdict.part.number.value == math.inf and verdict.p == 0
        (named,) = (text for text in verdict.evidence if "not finite: clip=fixed paper.lr=0.001 " in text)
        assert named.count("clip=fixed") == many, "the lab's run is one of Table 2's"
    for at in (30, 79):
        odd = {bad: lambda seed, steps, own, at=at: np.where((steps == at) & (seed == 2), np.nan, own)}
        verdict = judge_claim(with_loss(clean, odd), LEAVES)
        assert not any("diverged, or" in text for text in verdict.evidence), "before, or at a bad batch"
    calm = SPIKE_LAB["Fixed 1.0"]["baseline"]
    assert not everything.runs[calm, 0].config["data"]["corruption"]["steps"]
    odd = with_loss(clean, {calm: lambda seed, steps, own: np.where((steps == 112) & (seed == 2), np.nan, own)})
    verdict = judge_claim(odd, LEAVES)
    assert verdict.outcome == SUPPORTED and any("corruption.steps=[] seed=2" in text for text in verdict.evidence), (
        "the baseline run too"
    )
    assert judge_claim(clean._replace(diverged={(calm, 1)}), LEAVES).outcome == SUPPORTED


@pytest.fixture
def leaving(everything) -> RunCollection:
    """Runs in which fixed clipping leaves spikes for sure."""
    return with_excess_loss(everything, "Fixed 1.0", [0.3, 0.31, 0.32])


def test_zclip_removes_spikes_if_the_rest_is_certainly_small(leaving):
    """Both measures must be small for sure."""

    def judged(nats: list[float], spikes: list[int] | None = None) -> Verdict:
        runs = with_excess_loss(leaving, "ZClip", nats)
        return judge_claim(with_spikes(runs, "zclip", spikes) if spikes else runs, REMOVES)

    assert judged(CALM).outcome == SUPPORTED
    assert judged([0.029, 0.03, 0.031]).outcome == SUPPORTED, "0.015 beyond what the lost batches cost"
    assert judged([0.05, 0.051, 0.052]).outcome == CONTRADICTED
    assert judged([0.0, 0.03, 0.045]).outcome == UNDECIDED, "0.01, or more"
    assert judged([0.0, 0.3, 2.5]).outcome == UNDECIDED
    assert judged(CALM, [1, 0, 0]).outcome == UNDECIDED, "1, or up to 5.57"
    verdict = judged(CALM, [1, 1, 1])
    assert verdict.outcome == UNDECIDED and verdict.part.smallest.unit == "spikes per run"
    assert judged(CALM, [9, 9, 9]).outcome == CONTRADICTED, "27 are 17.8 or more"
    assert any("ZClip minus Fixed 1.0: -" in text for text in judged(CALM).evidence)


def test_removal_is_decided_by_one_measure_only_if_that_shows_spikes(leaving):
    clean = with_excess_loss(leaving, "ZClip", CALM)
    verdict = judge_claim(without(clean, (RATES[5e-3]["zclip"], 0)), REMOVES)
    assert verdict.outcome == NOT_TESTABLE and "over all learning rates: it needs three seeds" in verdict.evidence[0]
    much = without(with_excess_loss(leaving, "ZClip", [0.5, 0.51, 0.52]), (RATES[5e-3]["zclip"], 0))
    assert judge_claim(much, REMOVES).outcome == CONTRADICTED, "the lab shows that some are left"
    assert judge_claim(without(clean, (SPIKE_LAB["ZClip"]["corrupted"], 0)), REMOVES).outcome == NOT_TESTABLE
    only_by_spikes = with_excess_loss(with_spikes(clean, "fixed", [9, 9, 9]), "Fixed 1.0", CALM)
    assert judge_claim(only_by_spikes, REMOVES).outcome == SUPPORTED, "fixed clipping's are in the losses alone"


def test_dips_are_subtracted_from_spikes(leaving):
    """4 spikes in 21 runs are up to 0.49 per run, 21 dips at least 0.62; corrupted batches count as neither."""
    clean = with_excess_loss(leaving, "ZClip", CALM)
    spikes = with_spikes(clean, "zclip", [2, 1, 1])
    assert judge_claim(spikes, REMOVES).outcome == UNDECIDED
    dips = {
        row["zclip"]: lambda seed, steps, own: own - 3.0 * (steps == 66) - 9.0 * (steps == 79) for row in RATES.values()
    }
    verdict = judge_claim(with_loss(spikes, dips), REMOVES)
    assert verdict.outcome == SUPPORTED and "21 dips" in " ".join(verdict.evidence), verdict
    assert "-0.81 spikes per run (95 %: -1.48 to -0.13)" in verdict.evidence[0], verdict


def test_spikes_of_a_batch_that_is_hard_for_both_strategies_are_counted_and_named(leaving):
    """Seed 0's batch of step 70 is hard at seven rates of 14. One more spike of ZClip's is its own."""
    clean = with_excess_loss(leaving, "ZClip", CALM)

    def hard(seed, steps, own):
        return own + 9.0 * ((steps == 70) & (seed == 0))

    rates = [*RATES.values()]
    specs = [*(row["fixed"] for row in rates[:4]), *(row["zclip"] for row in rates[4:])]
    spikes = with_loss(clean, dict.fromkeys(specs, hard))
    spikes = with_loss(spikes, {rates[0]["zclip"]: lambda seed, steps, own: own + 9.0 * (steps == 80) * (seed == 1)})
    text = " ".join(judge_claim(spikes, REMOVES).evidence)
    assert "ZClip: 4 spikes in 21 runs" in text, text
    assert "; 3 of the spikes begin where at least half of Table 2's runs of the seed spike" in text, text
    fewer = with_loss(clean, dict.fromkeys(specs[1:], hard))
    text = " ".join(judge_claim(fewer, REMOVES).evidence)
    assert "ZClip: 3 spikes in 21 runs" in text and "of the spikes begin" not in text, text


def test_removal_is_not_testable_without_spikes(everything):
    calm = everything
    for label in SPIKE_LAB:
        calm = with_excess_loss(calm, label, CALM)
    verdict = judge_claim(calm, REMOVES)
    assert verdict.evidence == ["it is not shown that fixed clipping leaves any spikes that could be removed"]
    assert verdict.outcome == NOT_TESTABLE


def test_diverged_zclip_removes_no_spikes(leaving):
    clean = with_excess_loss(leaving, "ZClip", CALM)
    bad = SPIKE_LAB["ZClip"]["corrupted"]
    for spec in (bad, RATES[5e-3]["zclip"], SPIKE_LAB["ZClip"]["baseline"]):
        verdict = judge_claim(clean._replace(diverged={(spec, 2)}), REMOVES)
        assert verdict.outcome == CONTRADICTED and verdict.p == 0, verdict
        assert any("not finite: clip=zclip" in text for text in verdict.evidence)
    verdict = judge_claim(clean._replace(diverged={(RATES[5e-3]["fixed"], 1)}), REMOVES)
    assert verdict.outcome == SUPPORTED, "fixed clipping is worse still"
    for diverged, nans in ((None, [83]), ({(bad, 2)}, range(83, 140))):
        broken = with_loss(
            clean,
            {bad: lambda seed, steps, own, nans=nans: np.where(np.isin(steps, nans) & (seed == 2), np.nan, own)},
            diverged,
        )
        verdict = judge_claim(broken, REMOVES)
        assert verdict.outcome == CONTRADICTED and any("seed=2" in text for text in verdict.evidence), verdict
