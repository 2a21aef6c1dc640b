"""The paper's claims, and a verdict on each from the runs.

Runs of the same seed see the same batches, so strategies are compared seed by seed. A comparison takes the mean over
the compared learning rates, and reports the mean difference, its 95 % confidence interval and the two-sided paired
t-test over seeds (the sign test if all seeds have the same difference). A verdict needs three seeds that have all
compared runs, on the same text. A difference counts if p < 0.05, or if its whole interval is beyond the claimed value;
p-values are not corrected for multiple tests.

A diverged run is never excluded from a mean: it counts against its strategy, and if it is a required reference, the
claim is not testable. A claim is not supported while any of its runs is unfinished or excluded; such runs, and seeds
that were not run, are named. Further rules of a verdict stand with its numbers. `not supported` means that these runs
do not show the claim: they show the opposite, or a difference within the variation between seeds.
"""

from collections.abc import Mapping

import numpy as np
from scipy import stats

from experiments.paper.distributions import MIN_NORMS, norm_windows, window_norms
from experiments.paper.measures import clip_and_step_seconds
from experiments.paper.residual_spikes import fixed_leaves_spikes, zclip_removes_spikes
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
from experiments.paper.verdict import (
    NOT_SUPPORTED,
    NOT_TESTABLE,
    SIGNIFICANT,
    SUPPORTED,
    Difference,
    Judge,
    NotTestable,
    Verdict,
    difference_by_seed,
    difference_text,
    measure_by_seed,
    reached_by_seed,
    require_not_diverged,
    require_seeds,
    run_text,
)
from experiments.run.collect import RunCollection

#: Percentage of a step that is negligible.
NEGLIGIBLE = 1.0
#: Number of seeds from which a sign test can be significant.
MIN_SIGN_TEST_SEEDS = 6
#: Maximum length of a short window, as a fraction of the run; the paper's are 1.1 %.
MAX_SHORT_WINDOW = 0.05


def judge_claims(collection: RunCollection) -> dict[str, Verdict]:
    """Return the verdict on each claim."""
    return {claim: judge_claim(collection, claim) for claim in CLAIMS}


def judge_claim(collection: RunCollection, claim: str) -> Verdict:
    """Return the verdict on a claim, with the runs that are missing.

    If the other runs support it while one is unfinished or excluded, it is not testable.
    """
    texts = sorted({str(run.result.get("data_fingerprint")) for run in collection.runs.values()})
    judge, labelled_specs = CLAIMS[claim]
    specs = {spec for _, spec in labelled_specs}
    incomplete = {spec for spec, _ in [*collection.unfinished, *collection.excluded]}
    if specs & (incomplete | {spec for spec, _ in collection.runs}):
        missing = collection.notes(labelled_specs, with_diverged=False)
    else:
        missing = ["none of its runs has begun"]
    try:
        if len(texts) > 1:
            raise NotTestable(f"the runs are of different texts (fingerprints {' and '.join(texts)})")
        outcome, evidence = judge(collection)
    except NotTestable as reason:
        outcome, evidence = NOT_TESTABLE, [str(reason)]
    if outcome == SUPPORTED and specs & incomplete:
        outcome, evidence = NOT_TESTABLE, [*evidence, "supported, except for runs that are unfinished or excluded"]
    return Verdict(outcome, [*evidence, *missing])


def _best_rates(collection: RunCollection, group: str) -> dict[int, float]:
    """Return the learning rate with the lowest train loss by seed, of seeds that have all; 0 if all have diverged."""
    best = {}
    for seed in collection.complete_seeds([specs[group] for specs in RATES.values()]):
        losses = {
            lr: loss
            for lr, specs in RATES.items()
            if (loss := collection.runs[specs[group], seed].result.get("train_loss")) is not None
            and (specs[group], seed) not in collection.diverged
        }
        best[seed] = min(losses, key=losses.__getitem__, default=0.0)
    return best


def _higher_rates(collection: RunCollection) -> Verdict:
    best = {group: _best_rates(collection, group) for group in ("fixed", "zclip")}
    seeds = sorted(best["fixed"].keys() & best["zclip"].keys())
    require_seeds(seeds)
    higher = sum(best["zclip"][seed] > best["fixed"][seed] for seed in seeds)
    lower = sum(best["zclip"][seed] < best["fixed"][seed] for seed in seeds)
    p = float(stats.binomtest(higher, higher + lower).pvalue) if higher + lower else 1.0

    def at_high_rates() -> Difference:
        zclip, fixed = ([RATES[lr][group] for lr in HIGH_RATES] for group in ("zclip", "fixed"))
        require_not_diverged(collection, [*zclip, *fixed])
        return difference_by_seed(*(measure_by_seed(collection, "train_loss", specs) for specs in (zclip, fixed)))

    shown = {
        group: ", ".join(f"{best[group][seed]:.0e}" if best[group][seed] else "none" for seed in seeds)
        for group in best
    }
    evidence = [
        f"best of the paper's learning rates by seed: fixed {shown['fixed']}; ZClip {shown['zclip']}",
        f"ZClip's is higher with {higher} of {len(seeds)} seeds, lower with {lower} (sign test, p = {p:.2g}); a "
        "diverged run is the worst, and if all have diverged, no rate is best",
        f"mean train loss at 1e-3 to 5e-3, ZClip minus fixed: {difference_text(at_high_rates)}",
        "rule: the best rate is higher",
    ]
    if higher > lower and p < SIGNIFICANT:
        return Verdict(SUPPORTED, evidence)
    if higher and not lower and len(seeds) < MIN_SIGN_TEST_SEEDS:
        return Verdict(NOT_TESTABLE, [*evidence, f"fewer than {MIN_SIGN_TEST_SEEDS} seeds cannot show it"])
    return Verdict(NOT_SUPPORTED, evidence)


def _fewer_tokens(collection: RunCollection) -> Verdict:
    reached = reached_by_seed(collection, RATES[5e-4]["fixed"], RATES[3e-3]["zclip"])
    saved = difference_by_seed({seed: result.saved for seed, result in reached.items()})
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
    evidence = [
        f"ZClip at 3e-3 against fixed at 5e-4, as the paper compares: {saved.mean:.0%} fewer tokens "
        f"({', '.join(by_seed)} by seed; 0 % if it reaches the loss later, or never), {saved.low:.0%} to "
        f"{saved.high:.0%} (95 %); its final loss is "
        f"{np.mean([result.final_difference for result in reached.values()]):+.2f} nats from that of fixed clipping",
        f"at equal learning rates: {', '.join(equal_rates)}",
        "rule: more than none, and with 95 % confidence at least 35 %",
    ]
    is_shown = saved.p < SIGNIFICANT and saved.low >= 0.35
    return Verdict(SUPPORTED if is_shown else NOT_SUPPORTED, evidence)


def _lowest(measure: str, specs: Specs, claimed: str) -> Judge:
    """Judge whether a run, of some by label, has the lowest loss: below each of the others, on the same seeds."""

    def judge(collection: RunCollection) -> Verdict:
        seeds = collection.complete_seeds(specs.values())
        require_seeds(seeds)
        if bad_seeds := collection.diverged_seeds(specs[claimed]):
            return Verdict(NOT_SUPPORTED, [f"{claimed} has diverged: {run_text(specs[claimed], bad_seeds)}"])
        complete = collection._replace(
            runs={key: run for key, run in collection.runs.items() if key[1] in seeds},
            diverged={key for key in collection.diverged if key[1] in seeds},
        )
        diverged = {label: bad for label, spec in specs.items() if (bad := complete.diverged_seeds(spec))}
        losses = {
            label: measure_by_seed(complete, measure, [spec]) for label, spec in specs.items() if label not in diverged
        }
        means = ", ".join(f"{label} {np.mean(list(values.values())):.3f}" for label, values in losses.items())
        differences = {
            label: difference_by_seed(losses[claimed], values) for label, values in losses.items() if label != claimed
        }
        evidence = [
            f"mean {measure.replace('_', ' ')}: {means}",
            *(f"{claimed} minus {label}: {difference.text(4)}" for label, difference in differences.items()),
            *(f"{label} has diverged: {run_text(specs[label], bad)}" for label, bad in diverged.items()),
            "rule: it is below each of the others; a diverged one counts as higher",
        ]
        lowest = all(difference.mean < 0 and difference.p < SIGNIFICANT for difference in differences.values())
        return Verdict(SUPPORTED if lowest else NOT_SUPPORTED, evidence)

    return judge


def _normal(collection: RunCollection) -> Verdict:
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
        evidence.append(f"but the windows are up to {longest:.0%} of a run, in which norms fall, and are not short")
        return Verdict(NOT_TESTABLE, evidence)
    chance = stats.binomtest(rejected["norms"], len(p_values["norms"]), SIGNIFICANT, alternative="greater").pvalue
    evidence.append(
        f"probability of as many rejections if all were normal: p = {chance:.2g}; rule: it is not below "
        f"{SIGNIFICANT:g}, though few windows of few norms show large deviations only"
    )
    return Verdict(SUPPORTED if chance >= SIGNIFICANT else NOT_SUPPORTED, evidence)


def _overhead(collection: RunCollection) -> Verdict:
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
        f"ZClip minus fixed clipping, in percent of a step with fixed clipping: {overhead.text(2)}",
        f"rule: that is below {NEGLIGIBLE:g} %; tokens per hour of runs that share a machine do not measure it",
    ]
    return Verdict(SUPPORTED if overhead.high < NEGLIGIBLE else NOT_SUPPORTED, evidence)


def _lab_specs(*labels: str) -> list[tuple[str, RunSpec]]:
    """Return the runs of strategies in the spike lab, with their labels."""
    return [pair for pair in TABLES["spike_lab"].labelled_specs() if pair[0].rpartition(", ")[0] in labels]


_RATE_SPECS = TABLES["table2"].labelled_specs()
_FIXED_SPECS = [pair for pair in _RATE_SPECS if pair[1].clip == "fixed"]
_VARIANTS = {name.lower(): VARIANTS[name] for name in ("Reciprocal", "Mean", "Max")}

#: How each claim is judged, and the runs that it needs, with their labels.
CLAIMS: Mapping[str, tuple[Judge, list[tuple[str, RunSpec]]]] = {
    "Fixed clipping leaves spikes.": (fixed_leaves_spikes, [*_FIXED_SPECS, *_lab_specs("Fixed 1.0")]),
    "ZClip removes the spikes.": (
        zclip_removes_spikes,
        [*_RATE_SPECS, *_lab_specs("Fixed 1.0", "ZClip", "No clipping")],
    ),
    "ZClip allows higher learning rates.": (_higher_rates, _RATE_SPECS),
    "ZClip reaches the baseline's loss with 35 % fewer tokens.": (_fewer_tokens, _RATE_SPECS),
    "Reciprocal clipping beats clipping to the mean and to the maximum.": (
        _lowest("test_loss", _VARIANTS, "reciprocal"),
        [*VARIANTS.items()],
    ),
    "z_thresh = 2.5 is best.": (_lowest("train_loss", THRESHOLDS, "2.5"), [*THRESHOLDS.items()]),
    "alpha = 0.97 is best.": (_lowest("train_loss", ALPHAS, "0.97"), [*ALPHAS.items()]),
    "Gradient norms are about normally distributed in short windows.": (_normal, [*FIGURE_RUNS["figure9"].items()]),
    "The overhead is negligible.": (_overhead, [*STRATEGIES.items()]),
}
