"""Verdicts on spikes: whether fixed clipping leaves residual spikes, and whether ZClip removes them.

Both strategies are measured alike, by spikes per run in excess of dips, and by the excess loss after corrupted batches
net of the cost of skipping them. Dips estimate how many spikes are noise.

Residual spikes are certain if a run has diverged or has a loss that is not finite, or if the 95 % confidence interval
of either number is above its limit. They are certainly absent if no run has, and both intervals are below their limits.
Otherwise neither is shown.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.paper.measures import MEASURES
from experiments.paper.tables_and_figures import RATES, SPIKE_LAB, RunSpec
from experiments.paper.verdict import (
    MIN_SEEDS,
    NOT_SUPPORTED,
    NOT_TESTABLE,
    SUPPORTED,
    TOO_FEW_SEEDS,
    Interval,
    NotTestable,
    Verdict,
    difference_by_seed,
    difference_text,
    event_rate,
    measure_by_seed,
    require_not_diverged,
    run_text,
)
from experiments.run.collect import RunCollection
from experiments.run.definitions import SPIKE_WINDOW, loss_dips, min_spike_height
from experiments.run.read import corrupted_rows

#: Limits below which spikes count as absent: spikes per run, and nats of net excess loss.
MAX_SPIKES, MAX_EXCESS_LOSS = 0.2, 0.02

DIVERGED_LABEL = "diverged, or with a loss that is not finite"


def _in_lab(collection: RunCollection, label: str, measure: str = "excess_loss") -> dict[int, float]:
    """Return a measure of a strategy's run with corrupted batches, against its baseline run, by seed."""
    specs = SPIKE_LAB[label]
    require_not_diverged(collection, [specs["baseline"]])
    return measure_by_seed(collection, measure, [specs["corrupted"]], specs["baseline"])


class ResidualSpikes(NamedTuple):
    """The spikes that a strategy leaves."""

    is_measured: bool  # whether both numbers are known
    certain: bool  # whether spikes are certainly left
    certainly_none: bool
    evidence: list[str]


def _residual_spikes(collection: RunCollection, label: str, group: str) -> ResidualSpikes:
    """Return the spikes that a strategy leaves, by its label in the spike lab and its group in Table 2."""
    over_rates = [specs[group] for specs in RATES.values()]
    diverged = {
        collection.runs[spec, seed].path: run_text(spec, [seed])
        for spec in (*over_rates, *SPIKE_LAB[label].values())
        if len(collection.runs_of(spec)) >= MIN_SEEDS
        for seed in _diverged_seeds(collection, spec)
    }
    texts = [f"{DIVERGED_LABEL}: {'; '.join(diverged.values())}"] if diverged else []
    spikes, spikes_text = _spikes_minus_dips(collection, over_rates)
    excess_loss, loss_text = _net_excess_loss(collection, label)
    limits = ((spikes, MAX_SPIKES), (excess_loss, MAX_EXCESS_LOSS))
    return ResidualSpikes(
        is_measured=spikes is not None and excess_loss is not None,
        certain=bool(diverged) or any(number is not None and number.low > limit for number, limit in limits),
        certainly_none=not diverged and all(number is not None and number.high <= limit for number, limit in limits),
        evidence=[f"{label}: {text}" for text in (*texts, spikes_text, loss_text)],
    )


def _spikes_minus_dips(collection: RunCollection, specs: Sequence[RunSpec]) -> tuple[Interval | None, str]:
    """Return spikes minus dips per run, and the sentence. Diverged runs count; seeds that lack a run do not."""
    seeds = collection.complete_seeds(specs)
    runs = [collection.runs[spec, seed] for spec in specs for seed in seeds]
    counts = [MEASURES["spikes"].compute(run, None) for run in runs]
    if len(seeds) < MIN_SEEDS or None in counts:
        reason = "runs are too short to have any" if None in counts else TOO_FEW_SEEDS
        return None, f"spikes over all learning rates: {reason}"
    spikes = round(sum(count or 0 for count in counts))
    dips = sum(loss_dips(run.metrics["loss"], corrupted_rows(run)) for run in runs)
    spike_rate, dip_rate = event_rate(spikes, len(runs)), event_rate(dips, len(runs))
    excess = Interval(spike_rate.low - dip_rate.high, spike_rate.high - dip_rate.low)
    jump = float(np.nanmedian([min_spike_height(run.metrics["loss"], corrupted_rows(run)) for run in runs]))
    return excess, (
        f"{spikes} spikes in {len(runs)} runs over all learning rates, {spike_rate.low:.2f} to {spike_rate.high:.2f} "
        f"per run (95 %, Poisson, as if runs of a seed were independent), and {dips} dips, which estimate the "
        f"noise: {excess.low:.2f} to {excess.high:.2f} more spikes than dips; in the first {SPIKE_WINDOW} steps only a "
        f"loss that is not finite is a spike, and after that a jump of {jump:.2f} nats (median)"
    )


def _net_excess_loss(collection: RunCollection, label: str) -> tuple[Interval | None, str]:
    """Return the excess loss after corrupted batches, net of the cost of skipping them, and the sentence."""
    diverged = [
        run_text(spec, [seed]) for spec in SPIKE_LAB[label].values() for seed in _diverged_seeds(collection, spec)
    ]
    if diverged:
        return None, f"loss after corrupted batches: {DIVERGED_LABEL}: {'; '.join(diverged)}"
    try:
        excess, costs = _in_lab(collection, label), _in_lab(collection, label, "skip_cost")
        net = difference_by_seed(excess, costs)
    except NotTestable as reason:
        return None, f"loss after corrupted batches: {reason}"
    return Interval(net.low, net.high), (
        f"loss after corrupted batches minus the baseline run's, in nats: {difference_by_seed(excess).text()}, of "
        f"which skipping the batches would cost about {np.mean(list(costs.values())):.3f}; net of that {net.low:.3f} "
        f"to {net.high:.3f} (95 %)"
    )


def _diverged_seeds(collection: RunCollection, spec: RunSpec) -> list[int]:
    """Return the seeds with which a run has diverged or has a loss that is not finite.

    In a run with corrupted batches, only losses after the first of them count.
    """
    seeds = []
    for seed in collection.complete_seeds([spec]):
        run = collection.runs[spec, seed]
        corrupted = corrupted_rows(run)
        loss = np.delete(run.metrics["loss"], sorted(corrupted))[min(corrupted, default=0) :]
        if (spec, seed) in collection.diverged or not np.isfinite(loss).all():
            seeds.append(seed)
    return seeds


def fixed_leaves_spikes(collection: RunCollection) -> Verdict:
    """Judge whether fixed clipping leaves spikes."""
    residual = _residual_spikes(collection, "Fixed 1.0", "fixed")
    if not residual.certain and not residual.is_measured:
        return Verdict(NOT_TESTABLE, residual.evidence)
    rule = (
        f"rule: with 95 % confidence there are more than {MAX_SPIKES:g} spikes per run in excess of dips, or more than "
        f"{MAX_EXCESS_LOSS:g} nats net of the cost of skipping, or a run has diverged or has a loss that is not finite"
    )
    return Verdict(SUPPORTED if residual.certain else NOT_SUPPORTED, [*residual.evidence, rule])


def zclip_removes_spikes(collection: RunCollection) -> Verdict:
    """Judge whether ZClip leaves no spikes, provided that fixed clipping leaves some."""
    fixed = _residual_spikes(collection, "Fixed 1.0", "fixed")
    if not fixed.certain:
        known = "it is not shown that" if fixed.is_measured else "it is not known whether"
        raise NotTestable(f"{known} fixed clipping leaves any spikes that could be removed")
    residual = _residual_spikes(collection, "ZClip", "zclip")
    evidence = list(residual.evidence)
    for label in ("Fixed 1.0", "No clipping"):
        reduction = difference_text(
            lambda: difference_by_seed(_in_lab(collection, "ZClip"), _in_lab(collection, label))  # noqa: B023, at once
        )
        evidence.append(f"that loss, ZClip minus {label}: {reduction}")
    evidence.append(
        f"rule: with 95 % confidence there are at most {MAX_SPIKES:g} spikes per run in excess of dips and at most "
        f"{MAX_EXCESS_LOSS:g} nats net of the cost of skipping; no run has diverged or has a loss that is not finite"
    )
    if not residual.certain and not residual.is_measured:
        return Verdict(NOT_TESTABLE, evidence)
    return Verdict(SUPPORTED if residual.certainly_none else NOT_SUPPORTED, evidence)
