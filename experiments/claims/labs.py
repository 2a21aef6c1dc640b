"""Claims that the labs' runs can test: which signal warns first, and what clipping does to each instability."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from scipy import stats

from experiments.claims.numbers import Mean
from experiments.claims.verdict import (
    ABOVE,
    BELOW,
    WITHIN,
    Claim,
    Findings,
    NotTestable,
    Part,
    SmallestEffect,
    difference_by_seed,
    require_seeds,
)
from experiments.labs.declaration import ADAM_LAG, RATE, Arm, RateLab, SpikeLab, arm_of
from experiments.labs.natural_spikes import NaturalSpike, after_calm, natural_spikes, total_area, warning_steps
from experiments.labs.rates import curves_of
from experiments.labs.spike_tables import AREA_OFFSET
from experiments.labs.statistics import CURE, SMALLEST_NATS, SMALLEST_RATIO, Comparison, paired_ratio
from experiments.run.collect import RunCollection
from experiments.run.read import Run

STEP = SmallestEffect(1, "steps", "a rule can act no sooner than in the next step", 1)
CURED = SmallestEffect(
    CURE, "of the area of spikes", "the labs call a spike cured that has less left", 2, is_ratio=True
)
TWICE = SmallestEffect(1 / SMALLEST_RATIO, "times the area", "the labs' bound for a rule that helps", 2, is_ratio=True)
SENSITIVITY = SmallestEffect(SMALLEST_NATS, "nats", "the labs' bound for learning-rate sensitivity", 2)
LOSS = SmallestEffect(0.01, "nats", "1 % of the perplexity")

#: Returns a signal of a run, (steps,), that may warn of a spike.
Signal = Callable[[Run], np.ndarray]


def _column(name: str) -> Signal:
    def column(run: Run) -> np.ndarray:
        if name not in run.metrics:
            raise NotTestable(f"a run has no {name}: {run.path.name}")
        return run.metrics[name]

    return column


def z_score(run: Run) -> np.ndarray:
    """Return the exponential of the z-score: warnings are about logarithms, and this one's is the z-score."""
    with np.errstate(over="ignore"):
        return np.exp(_column("z")(run))


def spikes_of(run: Run) -> Sequence[NaturalSpike]:
    """Return the spikes of a run. A loss that is not finite is infinite."""
    loss = run.metrics["loss"]
    return _cached_spikes(np.where(np.isfinite(loss), loss, np.inf).astype(np.float64).tobytes())


@lru_cache(maxsize=1 << 9)
def _cached_spikes(loss: bytes) -> tuple[NaturalSpike, ...]:
    return tuple(natural_spikes(np.frombuffer(loss)))


def leads(run: Run, first: Signal, then: Signal) -> list[int]:
    """Return how many steps one signal warns before another, for each spike with enough calm steps before it."""
    spikes = spikes_of(run)
    signals = [signal(run) for signal in (first, then)] if spikes else []
    pairs = [[warning_steps(signal, spike.start) for signal in signals] for spike in after_calm(spikes)]
    return [one - other for one, other in pairs if one is not None and other is not None]


class _Warns:
    """Finds how many steps a signal warns before another, in the runs of an arm: the mean over the spikes of a seed."""

    def __init__(self, arm: Arm, names: tuple[str, str], first: Signal, then: Signal) -> None:
        self.arm, self.names, self.first, self.then = arm, names, first, then

    def __call__(self, collection: RunCollection) -> Findings:
        found = {
            seed: leads(collection.runs[self.arm, seed], self.first, self.then)
            for seed in collection.complete_seeds([self.arm])
        }
        means = {seed: float(np.mean(steps)) for seed, steps in found.items() if steps}
        require_seeds(means)
        steps = "; ".join(f"seed {seed}: {', '.join(map(str, found[seed]))}" for seed in means)
        evidence = [f"steps for each spike, in runs with {self.arm.label}: {steps}"]
        if without := [seed for seed in found if seed not in means]:
            evidence.append(f"without a spike after enough calm steps: seed {', '.join(map(str, without))}")
        what = f"steps by which {self.names[0]} warns before {self.names[1]}"
        return Findings([Part(what, difference_by_seed(means), STEP)], evidence)


def _areas(collection: RunCollection, arm: Arm) -> dict[int, float]:
    """Return the area of spikes by seed, in nats x steps; infinite if the run has diverged."""
    return {
        seed: total_area(spikes_of(collection.runs[arm, seed]), (arm, seed) in collection.diverged)
        for seed in collection.complete_seeds([arm])
    }


def ratio_of_areas(collection: RunCollection, arm: Arm, other: Arm) -> Mean:
    """Return the mean logarithm of the ratio of areas, as the labs compare arms.

    Raises `NotTestable` for fewer than three seeds, or without any area.
    """
    areas, others = _areas(collection, arm), _areas(collection, other)
    require_seeds(areas.keys() & others.keys())
    if not max([*areas.values(), *others.values()]):
        raise NotTestable("there is nothing to prevent: these runs do not show the instability")
    comparison = paired_ratio(areas, others, AREA_OFFSET)
    assert comparison is not None, "there are as many seeds as the labs need"
    return _logarithm(comparison)


def _logarithm(ratio: Comparison) -> Mean:
    """Return a ratio of the labs as a mean of logarithms."""
    spread = (math.log(ratio.high) - math.log(ratio.low)) / 2
    error = spread / float(stats.t.ppf(0.975, ratio.seeds - 1))
    return Mean(math.log(ratio.mean), error if error > 1e-12 else 0.0, ratio.seeds)


class _Cures:
    """Finds the share of the area of spikes that an arm leaves of the reference arm's."""

    def __init__(self, lab: SpikeLab, label: str) -> None:
        self.reference, self.arm = lab.arm(lab.reference), lab.arm(label)

    def __call__(self, collection: RunCollection) -> Findings:
        if not max(_areas(collection, self.reference).values(), default=1.0):
            raise NotTestable("there is nothing to cure: the reference arm has no spikes")
        ratio = ratio_of_areas(collection, self.arm, self.reference)
        what = f"area of spikes with {self.arm.label}, of that with {self.reference.label}"
        return Findings([Part(what, ratio, CURED)], [_areas_text(collection, self.arm, self.reference)])


def _areas_text(collection: RunCollection, *arms: Arm) -> str:
    shown = (f"{arm.label} {', '.join(f'{area:.3g}' for area in _areas(collection, arm).values())}" for arm in arms)
    return f"areas by seed, in nats x steps: {'; '.join(shown)}"


def _fixed_fails(collection: RunCollection) -> Findings:
    fixed, zclip = ADAM_LAG.arm("fixed 1.0"), ADAM_LAG.arm("ZClip")
    ratio = ratio_of_areas(collection, fixed, zclip)
    what = "area of spikes with a fixed threshold of 1.0, of that with ZClip"
    return Findings([Part(what, ratio, TWICE)], [_areas_text(collection, fixed, zclip)])


def _sensitivities(collection: RunCollection, label: str) -> Mapping[int, float]:
    curves = curves_of(RATE, arm_of(RATE.arms, label), collection)
    return {seed: curve.sensitivity for seed, curve in curves.items()}


def _qk_norm_suffices(collection: RunCollection) -> Findings:
    alone, both = (_sensitivities(collection, label) for label in ("QK-norm", "QK-norm and ZClip"))
    what = "learning-rate sensitivity with QK-norm, minus that with QK-norm and ZClip"
    evidence = []
    for label in ("no clipping", "ZClip", "QK-norm"):
        if values := _sensitivities(collection, label):
            evidence.append(f"mean sensitivity with {label}: {np.mean([*values.values()]):.3f} nats")
    return Findings([Part(what, difference_by_seed(alone, both), SENSITIVITY)], evidence)


def _clipping_does_nothing(collection: RunCollection) -> Findings:
    best = {
        label: {
            seed: float(curve.losses.min())
            for seed, curve in curves_of(RATE, arm_of(RATE.arms, label), collection).items()
        }
        for label in ("no clipping", "fixed 1.0", "ZClip")
    }
    parts = [
        Part(
            f"best test loss over the rates, {label} minus no clipping",
            difference_by_seed(best[label], best["no clipping"]),
            LOSS,
        )
        for label in ("fixed 1.0", "ZClip")
    ]
    return Findings(parts, ["each arm has its own best rate with each seed"])


def _specs(lab: SpikeLab | RateLab, *labels: str) -> Sequence[tuple[str, Arm]]:
    """Return the runs of some arms, with their labels."""
    arms = [arm for arm in lab.arms if arm.label in labels]
    runs = [lab.at(arm, rate) for arm in arms for rate in lab.rates] if isinstance(lab, RateLab) else arms
    return [(run.label, run) for run in runs]


def _warning(text: str, source: str, label: str, names: tuple[str, str], first: Signal, then: Signal) -> Claim:
    find = _Warns(ADAM_LAG.arm(label), names, first, then)
    return Claim(text, source, ABOVE, (STEP,), (_suite(ADAM_LAG),), _specs(ADAM_LAG, label), find)


def _suite(lab: SpikeLab | RateLab) -> str:
    return f"{lab.name}_lab"


_NORM, _UPDATE, _LOSS = (_column(name) for name in ("grad_norm", "update_norm", "loss"))

#: The claims that each lab's runs can test, by the lab's name.
LAB_CLAIMS: Mapping[str, Sequence[Claim]] = {
    ADAM_LAG.name: (
        _warning(
            "The gradient norm warns before the loss.",
            "common practice: norms are watched",
            "no clipping",
            ("the gradient norm", "the loss"),
            _NORM,
            _LOSS,
        ),
        _warning(
            "The update norm warns before the loss.",
            "the explanation of these spikes (arXiv 2506.04805)",
            "no clipping",
            ("the update norm", "the loss"),
            _UPDATE,
            _LOSS,
        ),
        _warning(
            "The update norm warns before the gradient norm.",
            "the explanation of these spikes (arXiv 2506.04805)",
            "no clipping",
            ("the update norm", "the gradient norm"),
            _UPDATE,
            _NORM,
        ),
        _warning(
            "ZClip's z-score rises by five sigma before the gradient norm.",
            "nobody: a question of this project",
            "ZClip",
            ("the z-score", "the gradient norm"),
            z_score,
            _NORM,
        ),
        *(
            Claim(
                text,
                "common practice: spikes are a reason to clip",
                BELOW,
                (CURED,),
                (_suite(ADAM_LAG),),
                _specs(ADAM_LAG, ADAM_LAG.reference, label),
                _Cures(ADAM_LAG, label),
            )
            for text, label in (
                ("ZClip cures Adam-lag spikes.", "ZClip"),
                ("A fixed threshold cures Adam-lag spikes.", "fixed 1.0"),
            )
        ),
        Claim(
            "A fixed threshold fails as norms shrink.",
            "the paper's argument for thresholds that adapt",
            ABOVE,
            (TWICE,),
            (_suite(ADAM_LAG),),
            _specs(ADAM_LAG, "fixed 1.0", "ZClip"),
            _fixed_fails,
        ),
    ),
    RATE.name: (
        Claim(
            "QK-norm makes clipping unnecessary.",
            "a reading of reports on QK-norm, such as arXiv 2309.14322",
            BELOW,
            (SENSITIVITY,),
            (_suite(RATE),),
            _specs(RATE, "QK-norm", "QK-norm and ZClip"),
            _qk_norm_suffices,
        ),
        Claim(
            "Clipping does nothing at small scale.",
            "nanochat's experiment log of 2026-01-08 (dev/LOG.md)",
            WITHIN,
            (LOSS,),
            (_suite(RATE),),
            _specs(RATE, "no clipping", "fixed 1.0", "ZClip"),
            _clipping_does_nothing,
        ),
    ),
}
