"""What runs say of the paper's claims."""

import re

import pytest

from experiments.catalogue import TABLES, THRESHOLDS
from experiments.claims import NOT_TESTABLE, SUPPORTED, Untestable, paired, verdicts
from experiments.collection import Found
from tests.experiments.conftest import SEEDS


def test_verdicts(everything):
    found = {verdict.claim: verdict for verdict in verdicts(everything)}
    assert found["Fixed clipping leaves spikes."].verdict == SUPPORTED
    assert found["ZClip removes the spikes."].verdict == "not supported", "it leaves a little of the bad batches"
    assert found["z_thresh = 2.5 is best."].verdict == "not supported", "all are the same"
    normal = found["Gradient norms are about normally distributed in short windows."]
    assert normal.verdict == NOT_TESTABLE and "are not short" in normal.numbers[2]
    assert re.fullmatch(r"Shapiro-Wilk rejects a .* of norms in [0-6] of 6 windows \(p < 0.05\)", normal.numbers[0])
    assert found["The overhead is negligible."].verdict == SUPPORTED
    assert "at most 0.00 % of a step" in found["The overhead is negligible."].numbers[1]
    two = everything._replace(runs={key: run for key, run in everything.runs.items() if key[1] < 2})
    assert {verdict.verdict for verdict in verdicts(two)} == {NOT_TESTABLE}
    torn = everything._replace(runs={key: run for at, (key, run) in enumerate(everything.runs.items()) if at % 3})
    assert len(verdicts(torn)) == 9, "whatever is missing"


def changed(everything: Found, change) -> dict:
    """The verdicts where losses and losses after bad batches are what `change` makes of (setting, seed, run)."""
    runs = {key: change(*key, run) for key, run in everything.runs.items()}
    return {verdict.claim: verdict for verdict in verdicts(everything._replace(runs=runs))}


def after_bad(run, nats: float):
    loss = run.metrics["loss"].copy()
    for step in run.config["data"]["bad_batches"]["steps"]:
        loss[step : step + 10] += nats
    return run._replace(metrics={**run.metrics, "loss": loss})


def test_spikes_are_removed_where_little_is_left_for_sure(everything):
    """Not where what is left differs so much between seeds that it is no significant difference."""
    lab = next(row.settings for row in TABLES["spike_lab"].rows if row.label == "ZClip")
    clean = {seed: everything.runs[lab["good"], seed].metrics["loss"] for seed in SEEDS}

    def left(by_seed):
        def change(setting, seed, run):
            if setting != lab["bad"]:
                return run
            return after_bad(run._replace(metrics={**run.metrics, "loss": clean[seed]}), by_seed[seed])

        return changed(everything, change)["ZClip removes the spikes."]

    assert left([0.0, 0.001, 0.002]).verdict == SUPPORTED
    assert left([0.1, 0.11, 0.12]).verdict == "not supported"
    noisy = left([0.0, 0.3, 2.5])
    assert noisy.verdict == "not supported" and "p = 0.3" in noisy.numbers[1], noisy


def test_what_diverged_supports_nothing(everything):
    """Each run that has diverged by itself, and all runs of a strategy at other steps."""
    zclip = next(row.settings for row in TABLES["spike_lab"].rows if row.label == "ZClip")["bad"]
    one = everything._replace(diverged={(zclip, 2)})
    said = {verdict.claim: verdict for verdict in verdicts(one)}["ZClip removes the spikes."]
    assert said.verdict == NOT_TESTABLE and said.numbers[0].startswith(
        "a run that is compared has diverged: clip=zclip"
    )
    assert said.numbers[0].endswith("seed=2")
    for group in ("fixed", "zclip"):
        gone = {(row.settings[group], seed) for row in TABLES["table2"].rows for seed in SEEDS}
        for verdict in verdicts(everything._replace(diverged=gone))[1:4]:
            assert verdict.verdict != SUPPORTED, verdict
    everywhere = verdicts(everything._replace(diverged=gone))[2]
    assert everywhere.numbers == ["clip=zclip has diverged at every learning rate with seed 0"]


def test_settings_are_compared_on_the_same_seeds_and_the_same_text(everything):
    def change(setting, seed, run):
        better = 0.0 if setting == THRESHOLDS["2.5"] else (0.5 if setting == THRESHOLDS["1.5"] else -0.03)
        loss = 5.0 + seed + better + seed * seed / 100 * (setting == THRESHOLDS["1.5"])
        return run._replace(result={**run.result, "train_loss": loss})

    runs = {key: change(*key, run) for key, run in everything.runs.items()}
    others = [setting for label, setting in THRESHOLDS.items() if label not in ("1.5", "2.5")]
    fewer = {key: run for key, run in runs.items() if not (key[0] in others and key[1] == 0)}
    verdict = verdicts(everything._replace(runs=fewer))[5]
    assert verdict.verdict == NOT_TESTABLE and "it needs three seeds" in verdict.numbers[0], verdict
    assert verdicts(everything._replace(runs=runs))[5].verdict == "not supported"
    odd = next(iter(runs))
    runs[odd] = runs[odd]._replace(result={**runs[odd].result, "data_fingerprint": "ffff"})
    assert {each.verdict for each in verdicts(everything._replace(runs=runs))} == {NOT_TESTABLE}


def test_paired_differences():
    with pytest.raises(Untestable, match="it needs three seeds"):
        paired([1.0, 2.0], [0.0, 0.0])
    difference = paired([1.0, 2.0, 3.0], [2.0, 2.5, 4.5])
    # Differences -1, -0.5, -1.5: mean -1, standard error 0.5 / sqrt(3), t = -3.4641 with two degrees of freedom.
    assert difference.mean == -1 and difference.p == pytest.approx(0.07418, abs=1e-4)
    assert difference.most == pytest.approx(-1 + 4.3027 * 0.5 / 3**0.5, abs=1e-4)
    for one, p in ((1.0, 1.0), (2.0, 0.25)):
        same = paired([one] * 3, [1.0] * 3)
        assert same.p == p and same.most == same.mean, "the sign test"
