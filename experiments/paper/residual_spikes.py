"""What runs show of spikes: whether fixed clipping leaves residual spikes, and whether ZClip removes them.

Both strategies are measured alike, by spikes per run in excess of dips, and by the excess loss after corrupted batches
net of the cost of skipping them. Dips estimate how many spikes are noise. Residual spikes are certain if a run has
diverged or has a loss that is not finite.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from experiments.claims.numbers import Certain, ExcessEvents, Mean, event_rate
from experiments.claims.verdict import (
    BEYOND,
    MIN_SEEDS,
    SIGNIFICANT,
    TOO_FEW_SEEDS,
    Findings,
    NotTestable,
    Part,
    SmallestEffect,
    difference_by_seed,
)
from experiments.paper.by_seed import measure_by_seed, require_not_diverged, run_text
from experiments.paper.measures import MEASURES
from experiments.paper.tables_and_figures import RATES, SPIKE_LAB, RunSpec
from experiments.run.collect import RunCollection
from experiments.run.definitions import SPIKE_WINDOW, loss_dips, loss_spikes, min_spike_height
from experiments.run.read import corrupted_rows

EXCESS_LOSS = SmallestEffect(0.02, "nats", "chosen before the runs: skipping the corrupted batches costs a tenth of it")
SPIKES = SmallestEffect(0.2, "spikes per run", "fewer than one in five runs", decimals=2)

DIVERGED_LABEL = "diverged, or with a loss that is not finite"


def _in_lab(collection: RunCollection, label: str, measure: str = "excess_loss") -> dict[int, float]:
    """Return a measure of a strategy's run with corrupted batches, against its baseline run, by seed."""
    specs = SPIKE_LAB[label]
    require_not_diverged(collection, [specs["baseline"]])
    return measure_by_seed(collection, measure, [specs["corrupted"]], specs["baseline"])


def _residual_spikes(collection: RunCollection, label: str, group: str) -> Findings:
    """Return the spikes that a strategy leaves, by its label in the spike lab and its group in Table 2."""
    over_rates = [specs[group] for specs in RATES.values()]
    diverged = {
        collection.runs[spec, seed].path: run_text(spec, [seed])
        for spec in (*over_rates, *SPIKE_LAB[label].values())
        if len(collection.runs_of(spec)) >= MIN_SEEDS
        for seed in _diverged_seeds(collection, spec)
    }
    parts, evidence, unmeasured = [], [], []
    if diverged:
        evidence.append(f"{label}: {DIVERGED_LABEL}: {'; '.join(diverged.values())}")
        parts.append(Part(f"{label}: loss of these runs", Certain(math.inf), EXCESS_LOSS))
    for measure in (_spikes_minus_dips, partial(_net_excess_loss, label=label)):
        try:
            part, sentence = measure(collection, over_rates)
        except NotTestable as reason:
            unmeasured.append(f"{label}: {reason}")
            continue
        parts.append(part._replace(what=f"{label}: {part.what}"))
        evidence.append(f"{label}: {sentence}")
    return Findings(parts, evidence, "; ".join(unmeasured))


def _spikes_minus_dips(collection: RunCollection, specs: Sequence[RunSpec]) -> tuple[Part, str]:
    """Return spikes minus dips per run, and a sentence. Diverged runs count; seeds that lack a run do not."""
    seeds = collection.complete_seeds(specs)
    runs = [collection.runs[spec, seed] for spec in specs for seed in seeds]
    counts = [MEASURES["spikes"].compute(run, None) for run in runs]
    if len(seeds) < MIN_SEEDS or None in counts:
        reason = "runs are too short to have any" if None in counts else TOO_FEW_SEEDS
        raise NotTestable(f"spikes over all learning rates: {reason}")
    spikes = round(sum(count or 0 for count in counts))
    dips = sum(loss_dips(run.metrics["loss"], corrupted_rows(run)) for run in runs)
    shared = sum(_shared_spikes(collection, specs, seed) for seed in seeds)
    rate = event_rate(spikes, len(runs))
    jump = float(np.nanmedian([min_spike_height(run.metrics["loss"], corrupted_rows(run)) for run in runs]))
    return Part("spikes minus dips over all learning rates", ExcessEvents(spikes, dips, len(runs)), SPIKES), (
        f"{spikes} spikes in {len(runs)} runs over all learning rates, {rate.low:.2f} to {rate.high:.2f} "
        f"per run (95 %, Poisson, as if runs of a seed were independent), and {dips} dips, which estimate the "
        f"noise; in the first {SPIKE_WINDOW} steps only a loss that is not finite is a spike, and after that a jump of "
        f"{jump:.2f} nats (median)"
        + (f"; {shared} of the spikes begin where at least half of Table 2's runs of the seed spike" if shared else "")
    )


def _shared_spikes(collection: RunCollection, specs: Sequence[RunSpec], seed: int) -> int:
    """Return how many spikes of some runs begin at a step at which half of the seed's runs at all rates spike, or more.

    Such a batch is hard for every strategy. Its spikes count as all others do.
    """
    over_rates = [spec for row in RATES.values() for spec in row.values() if (spec, seed) in collection.runs]
    starts = {}
    for spec in over_rates:
        run = collection.runs[spec, seed]
        starts[spec] = {spike.start for spike in loss_spikes(run.metrics["loss"], corrupted_rows(run))}
    runs_at = Counter(start for each in starts.values() for start in each)
    return sum(2 * runs_at[start] >= len(over_rates) for spec in specs for start in starts[spec])


def _net_excess_loss(collection: RunCollection, _: Sequence[RunSpec], label: str) -> tuple[Part, str]:
    """Return the excess loss after corrupted batches, net of the cost of skipping them, and a sentence."""
    diverged = [
        run_text(spec, [seed]) for spec in SPIKE_LAB[label].values() for seed in _diverged_seeds(collection, spec)
    ]
    if diverged:
        raise NotTestable(f"loss after corrupted batches: {DIVERGED_LABEL}: {'; '.join(diverged)}")
    try:
        excess, costs = _in_lab(collection, label), _in_lab(collection, label, "skip_cost")
        net = difference_by_seed(excess, costs)
    except NotTestable as reason:
        raise NotTestable(f"loss after corrupted batches: {reason}") from reason
    return Part("loss after corrupted batches, net of the cost of skipping them", net, EXCESS_LOSS), (
        f"without that cost it is {mean_text(difference_by_seed(excess))} above the baseline run's; skipping the "
        f"batches would cost about {np.mean(list(costs.values())):.3f} nats"
    )


def mean_text(mean: Mean, decimals: int = 3, unit: str = "nats") -> str:
    """Return a mean as a phrase, with its 95 % interval."""
    low, high = mean.interval()
    return f"{mean.value:+.{decimals}f} {unit} (95 %: {low:.{decimals}f} to {high:.{decimals}f})"


def text_or_reason(compute: Callable[[], Mean]) -> str:
    """Return a difference on which no verdict depends as a phrase, or the reason why there is none."""
    try:
        return mean_text(compute())
    except NotTestable as reason:
        return str(reason)


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


def fixed_leaves_spikes(collection: RunCollection) -> Findings:
    """Return the spikes that fixed clipping leaves."""
    return _residual_spikes(collection, "Fixed 1.0", "fixed")


def zclip_removes_spikes(collection: RunCollection) -> Findings:
    """Return the spikes that ZClip leaves; raise `NotTestable` unless fixed clipping certainly leaves some."""
    fixed = fixed_leaves_spikes(collection)
    p = [part.number.above(part.smallest.bound) for part in fixed.parts]
    if not any(len(p) * value < SIGNIFICANT and value < BEYOND for value in p):
        known = "it is not known whether" if fixed.unmeasured else "it is not shown that"
        raise NotTestable(f"{known} fixed clipping leaves any spikes that could be removed")
    residual = _residual_spikes(collection, "ZClip", "zclip")
    evidence = list(residual.evidence)
    for label in ("Fixed 1.0", "No clipping"):
        reduction = text_or_reason(
            lambda: difference_by_seed(_in_lab(collection, "ZClip"), _in_lab(collection, label))  # noqa: B023, at once
        )
        evidence.append(f"loss after corrupted batches, ZClip minus {label}: {reduction}")
    return residual._replace(evidence=evidence)
