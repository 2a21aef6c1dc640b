"""The paper's claims, each with its smallest effect of interest and what the runs show of it."""

import math
from collections.abc import Mapping

import numpy as np
from scipy import stats

from experiments.claims.numbers import Certain, Mean, Number, Share
from experiments.claims.verdict import (
    ABOVE,
    BELOW,
    SIGNIFICANT,
    Claim,
    Findings,
    NotTestable,
    Part,
    SmallestEffect,
    difference_by_seed,
    require_seeds,
)
from experiments.paper.best_rates import best_rates
from experiments.paper.by_seed import measure_by_seed, reached_by_seed, require_not_diverged, run_text
from experiments.paper.distributions import MIN_NORMS, norm_windows, window_norms
from experiments.paper.measures import clip_and_step_seconds
from experiments.paper.residual_spikes import (
    EXCESS_LOSS,
    SPIKES,
    fixed_leaves_spikes,
    text_or_reason,
    zclip_removes_spikes,
)
from experiments.paper.tables_and_figures import (
    ALPHAS,
    FIGURE_RUNS,
    HIGH_RATES,
    RATES,
    STRATEGIES,
    TABLES,
    THRESHOLDS,
    VARIANTS,
    RunSpec,
    Specs,
)
from experiments.run.collect import RunCollection
from experiments.run.definitions import REACHED_WINDOW
from experiments.run.read import without_corrupted

#: Maximum length of a short window, as a fraction of the run; the paper's are 1.1 %.
MAX_SHORT_WINDOW = 0.05
#: Fraction of the tokens that the paper's ZClip saves.
SAVED = 0.35

LOSS = SmallestEffect(0.01, "nats", "1 % of the perplexity, and the last digit of the paper's losses")
RATE_FACTOR = SmallestEffect(
    1.2, "times the rate", "about half of the smallest step between the paper's learning rates", 2, is_ratio=True
)
REJECTED = SmallestEffect(0.5, "of the windows", "norms are then normal in most windows", 2)
OVERHEAD = SmallestEffect(1.0, "% of a step", "less than the time of steps varies by", 2)


def _rate_ratios(zclip: Mapping[int, float], fixed: Mapping[int, float]) -> Number:
    """Return the logarithm of ZClip's best rate over that of fixed clipping, by seed; 0 is no rate at all."""
    pairs = [(zclip[seed], fixed[seed]) for seed in zclip.keys() & fixed.keys()]
    only_one = {math.copysign(math.inf, one - other) for one, other in pairs if bool(one) != bool(other)}
    if len(only_one) > 1:
        raise NotTestable("with some seeds all runs of one strategy have diverged, with others all of the other one")
    if only_one:
        return Certain(only_one.pop())
    logs = [{seed: math.log(rate) for seed, rate in best.items() if rate} for best in (zclip, fixed)]
    return difference_by_seed(*logs)


def _higher_rates(collection: RunCollection) -> Findings:
    fixed, zclip = (best_rates(collection, group) for group in ("fixed", "zclip"))
    seeds = sorted(fixed.keys() & zclip.keys())
    require_seeds(seeds)

    def at_high_rates() -> Mean:
        zclip, fixed = ([RATES[lr][group] for lr in HIGH_RATES] for group in ("zclip", "fixed"))
        require_not_diverged(collection, [*zclip, *fixed])
        return difference_by_seed(*(measure_by_seed(collection, "train_loss", specs) for specs in (zclip, fixed)))

    shown = [", ".join(f"{best[seed]:.2g}" if best[seed] else "none" for seed in seeds) for best in (fixed, zclip)]
    evidence = [
        f"best learning rate by seed, as the paper names them and estimated between them: fixed {shown[0]}; ZClip "
        f"{shown[1]}; a diverged run is the worst, and if all have diverged, no rate is best",
        f"mean train loss at 1e-3 to 5e-3, ZClip minus fixed: {text_or_reason(at_high_rates)}",
    ]
    ratios = _rate_ratios(zclip, fixed)
    return Findings([Part("ZClip's best learning rate over that of fixed clipping", ratios, RATE_FACTOR)], evidence)


def _fewer_tokens(collection: RunCollection) -> Findings:
    fixed, zclip = RATES[5e-4]["fixed"], RATES[3e-3]["zclip"]
    reached = reached_by_seed(collection, fixed, zclip)
    require_seeds(reached)
    above = {}
    for seed, result in reached.items():
        run = collection.runs[zclip, seed]
        budget = (1 - SAVED) * collection.runs[fixed, seed].metrics["tokens"][-1]
        steps = int(np.searchsorted(run.metrics["tokens"], budget, side="right"))
        own = without_corrupted(run, "loss")[max(0, steps - REACHED_WINDOW) : steps]
        above[seed] = float(own.mean()) - result.loss if len(own) else math.inf
    equal_rates = []
    for lr, specs in RATES.items():
        try:
            results = reached_by_seed(collection, specs["fixed"], specs["zclip"]).values()
        except NotTestable:
            equal_rates.append(f"{lr:.0e} fixed diverged")
            continue
        if results:
            total = len(collection.seeds)
            fewer = f" ({len(results)} of {total} seeds)" if len(results) < total else ""
            equal_rates.append(f"{lr:.0e} {np.mean([result.saved for result in results]):.0%}{fewer}")
    by_seed = ["never" if result.tokens is None else f"{result.saved:.0%}" for result in reached.values()]
    final = np.mean([result.final_difference for result in reached.values()])
    evidence = [
        f"ZClip at 3e-3 reaches the final loss of fixed clipping at 5e-4, as the paper compares, with fewer tokens: "
        f"{', '.join(by_seed)} by seed (0 % if it reaches the loss later); its own final loss is {final:+.2f} nats "
        "from that",
        f"fewer tokens at equal learning rates: {', '.join(equal_rates)}",
    ]
    what = f"ZClip's loss after {1 - SAVED:.0%} of the tokens, above the final loss of fixed clipping"
    has_failed = collection.diverged_seeds(zclip) or not all(map(math.isfinite, above.values()))
    number = Certain(math.inf) if has_failed else difference_by_seed(above)
    return Findings([Part(what, number, LOSS)], evidence)


class _Lowest:
    """Finds by how much the losses of other runs are above that of a claimed one, on the same seeds."""

    def __init__(self, measure: str, specs: Specs, claimed: str) -> None:
        self.measure, self.specs, self.claimed = measure, specs, claimed

    def __call__(self, collection: RunCollection) -> Findings:
        specs, claimed = self.specs, self.claimed
        seeds = collection.complete_seeds(specs.values())
        require_seeds(seeds)
        if bad_seeds := collection.diverged_seeds(specs[claimed]):
            gone = f"{claimed} has diverged: {run_text(specs[claimed], bad_seeds)}"
            return Findings([Part(f"the others minus {claimed}", Certain(-math.inf), LOSS)], [gone])
        complete = collection._replace(
            runs={key: run for key, run in collection.runs.items() if key[1] in seeds},
            diverged={key for key in collection.diverged if key[1] in seeds},
        )
        diverged = {label: bad for label, spec in specs.items() if (bad := complete.diverged_seeds(spec))}
        losses = {
            label: measure_by_seed(complete, self.measure, [spec])
            for label, spec in specs.items()
            if label not in diverged
        }
        means = ", ".join(f"{label} {np.mean(list(values.values())):.3f}" for label, values in losses.items())
        parts = [
            Part(
                f"{label} minus {claimed}",
                difference_by_seed(losses[label], losses[claimed]),
                LOSS._replace(decimals=4),
            )
            for label in losses
            if label != claimed
        ]
        parts += [Part(f"{label} minus {claimed}", Certain(math.inf), LOSS) for label in diverged]
        evidence = [f"mean {self.measure.replace('_', ' ')}: {means}"]
        evidence += [
            f"{label} has diverged, and counts as higher: {run_text(specs[label], bad)}"
            for label, bad in diverged.items()
        ]
        return Findings(parts, evidence)


def _normal(collection: RunCollection) -> Findings:
    p_values: dict[str, list[float]] = {"norms": [], "log norms": []}
    spec = FIGURE_RUNS["figure9"]["ZClip"]
    require_not_diverged(collection, [spec])
    runs = collection.runs_of(spec)
    require_seeds(runs)
    longest = 0.0
    for run in runs:
        for first, last in norm_windows(run):
            longest = max(longest, (last - first + 1) / len(run.metrics["step"]))
            sample = window_norms(run, first, last)
            if len(sample) >= MIN_NORMS:
                p_values["norms"].append(float(stats.shapiro(sample).pvalue))
                p_values["log norms"].append(float(stats.shapiro(np.log(sample)).pvalue))
    if not p_values["norms"]:
        raise NotTestable(f"no window has {MIN_NORMS} norms")
    rejected = {name: sum(p < SIGNIFICANT for p in values) for name, values in p_values.items()}
    evidence = [
        f"Shapiro-Wilk rejects a normal distribution of {name} in {rejected[name]} of {len(values)} windows (p < 0.05)"
        for name, values in p_values.items()
    ]
    if longest > MAX_SHORT_WINDOW:
        reason = f"the windows are up to {longest:.0%} of a run, in which norms fall, and are not short"
        raise NotTestable(reason, evidence)
    share = Share(rejected["norms"], len(p_values["norms"]))
    what = "share of the windows in which the Shapiro-Wilk test rejects a normal distribution"
    return Findings([Part(what, share, REJECTED)], [*evidence, "windows of few norms show large deviations only"])


def _overhead(collection: RunCollection) -> Findings:
    seconds = {
        label: {
            seed: times
            for seed in collection.complete_seeds([spec])
            if (times := clip_and_step_seconds(collection.runs[spec, seed]))
        }
        for label, spec in STRATEGIES.items()
    }
    shares = {label: [100 * clip / step for clip, step in times.values()] for label, times in seconds.items()}
    zclip, fixed = seconds["ZClip"], seconds["Fixed 1.0"]
    overhead = difference_by_seed(
        {seed: 100 * (zclip[seed][0] - fixed[seed][0]) / fixed[seed][1] for seed in zclip.keys() & fixed.keys()}
    )
    evidence = [
        "share of a step that is spent on clipping, including the norm (which runs without clipping compute too): "
        + ", ".join(f"{label} {np.mean(values):.2f} %" for label, values in shares.items() if values),
        "tokens per hour of runs that share a machine do not measure it",
    ]
    return Findings([Part("time of clipping, ZClip minus fixed clipping", overhead, OVERHEAD)], evidence)


def _lab_specs(*labels: str) -> list[tuple[str, RunSpec]]:
    """Return the runs of strategies in the spike lab, with their labels."""
    return [pair for pair in TABLES["spike_lab"].labelled_specs() if pair[0].rpartition(", ")[0] in labels]


_RATE_SPECS = TABLES["table2"].labelled_specs()
_FIXED_SPECS = [pair for pair in _RATE_SPECS if pair[1].clip == "fixed"]
_VARIANTS = {name.lower(): VARIANTS[name] for name in ("Reciprocal", "Mean", "Max")}


#: The paper's claims, in its order.
PAPER_CLAIMS = (
    Claim(
        "Fixed clipping leaves spikes.",
        "the paper's Figure 2 and Table 3",
        ABOVE,
        (EXCESS_LOSS, SPIKES),
        ("table2", "spike_lab"),
        [*_FIXED_SPECS, *_lab_specs("Fixed 1.0")],
        fixed_leaves_spikes,
        needs_all=False,
    ),
    Claim(
        "ZClip removes the spikes.",
        "the paper's Table 3",
        BELOW,
        (EXCESS_LOSS, SPIKES),
        ("table2", "spike_lab"),
        [*_RATE_SPECS, *_lab_specs("Fixed 1.0", "ZClip", "No clipping")],
        zclip_removes_spikes,
    ),
    Claim(
        "ZClip allows higher learning rates.",
        "the paper's Table 2",
        ABOVE,
        (RATE_FACTOR,),
        ("table2",),
        _RATE_SPECS,
        _higher_rates,
    ),
    Claim(
        "ZClip reaches the baseline's loss with 35 % fewer tokens.",
        "the paper's Figure 4",
        BELOW,
        (LOSS,),
        ("table2",),
        _RATE_SPECS,
        _fewer_tokens,
    ),
    Claim(
        "Reciprocal clipping beats clipping to the mean and to the maximum.",
        "the paper's Table 5",
        ABOVE,
        (LOSS,),
        ("table5",),
        [*VARIANTS.items()],
        _Lowest("test_loss", _VARIANTS, "reciprocal"),
    ),
    Claim(
        "z_thresh = 2.5 is best.",
        "the paper's Table 6",
        ABOVE,
        (LOSS,),
        ("table6",),
        [*THRESHOLDS.items()],
        _Lowest("train_loss", THRESHOLDS, "2.5"),
    ),
    Claim(
        "alpha = 0.97 is best.",
        "the paper's Table 7",
        ABOVE,
        (LOSS,),
        ("table7",),
        [*ALPHAS.items()],
        _Lowest("train_loss", ALPHAS, "0.97"),
    ),
    Claim(
        "Gradient norms are about normally distributed in short windows.",
        "the paper's Figure 9",
        BELOW,
        (REJECTED,),
        ("figure9",),
        [*FIGURE_RUNS["figure9"].items()],
        _normal,
    ),
    Claim(
        "The overhead is negligible.",
        "the paper's throughput",
        BELOW,
        (OVERHEAD,),
        ("throughput",),
        [*STRATEGIES.items()],
        _overhead,
    ),
)
