"""The paper's claims, and what the runs at hand say of each.

Runs of the same seed see the same batches, so strategies are compared seed by seed, each number being the mean over
the learning rates that are compared: the mean difference, its 95 % interval, and the two-sided paired t-test over seeds
(where all seeds have the same difference, the sign test). A verdict needs three seeds that have all runs compared, on
the same text. A difference counts with p < 0.05, or where its whole interval is beyond what a claim asks for; p-values
are not corrected for their number. A run that has diverged is never left out of a mean: it speaks against the strategy
that it is of, or where it is what the strategy is measured by, the claim is not testable. While any of a claim's runs
is unfinished or left out, the others do not support it; those, and seeds that were not run, are named. What else a
verdict asks for stands with its numbers. `not supported` means that these runs do not show it, be it the other way
round or within what seeds do.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.paper.collect import Found
from experiments.paper.distributions import LEAST_NORMS, norm_windows, window_norms
from experiments.paper.judging import (
    NOT_SUPPORTED,
    NOT_TESTABLE,
    SUPPORTED,
    Judge,
    Judged,
    at_rates,
    by_seed,
    diverged_seeds,
    losses_by_seed,
    named,
    reached_by_seed,
    require_whole,
    seeds_with_all,
)
from experiments.paper.measures import MEASURES, clip_and_step
from experiments.paper.residual_spikes import fixed_leaves_spikes, zclip_removes_spikes
from experiments.paper.statistics import (
    LEAST_SEEDS,
    SIGNIFICANT,
    TOO_FEW,
    Difference,
    NotTestable,
    difference,
    said,
    signs,
)
from experiments.paper.suites import ALPHAS, FIGURES, HIGH_RATES, STRATEGIES, TABLES, THRESHOLDS, VARIANTS, Setting

#: Percent of a step that is negligible.
NEGLIGIBLE = 1.0
#: Seeds with which a sign test can be significant.
SEEDS_OF_SIGNS = 6
#: Share of a run that a short window is at most; the paper's are 1.1 %.
SHORT = 0.05


class Verdict(NamedTuple):
    """What runs say of a claim.

    Attributes:
        claim: the paper's.
        verdict: supported, not supported, or not testable here.
        numbers: sentences.
    """

    claim: str
    verdict: str
    numbers: Sequence[str]


class Claim(NamedTuple):
    """How a claim is judged.

    Attributes:
        judge: finds the verdict.
        settings: of the runs that it looks at, each with its label.
    """

    judge: Judge
    settings: Sequence[tuple[str, Setting]]


def verdicts(found: Found) -> list[Verdict]:
    """Return what the runs say of each claim."""
    return [verdict(found, claim) for claim in CLAIMS]


def verdict(found: Found, claim: str) -> Verdict:
    """Return what the runs say of a claim, and which of its runs are lacking.

    One that is unfinished or left out may say otherwise: what the others support is not testable then.
    """
    texts = sorted({str((run.result or {}).get("data_fingerprint")) for run in found.runs.values()})
    judge, settings = CLAIMS[claim]
    begun = {setting for setting, _ in [*found.runs, *found.unfinished, *found.refused]}
    some = any(setting in begun for _, setting in settings)
    lacking = found.notes(settings, diverged=False) if some else ["none of its runs has begun"]
    try:
        if len(texts) > 1:
            raise NotTestable(f"the runs are of different texts (fingerprints {' and '.join(texts)})")
        said, numbers = judge(found)
    except NotTestable as why:
        said, numbers = NOT_TESTABLE, [str(why)]
    unread = {setting for setting, _ in [*found.unfinished, *found.refused]}
    if said == SUPPORTED and any(setting in unread for _, setting in settings):
        said, numbers = NOT_TESTABLE, [*numbers, "supported, but for runs that are unfinished or left out"]
    return Verdict(claim, said, [*numbers, *lacking])


def _loss(found: Found, setting: Setting, seed: int) -> float | None:
    """Return the train loss of a run, infinite if it has diverged; `None` if it is not done."""
    if (run := found.runs.get((setting, seed))) is None:
        return None
    value = (run.result or {}).get("train_loss")
    return math.inf if value is None or (setting, seed) in found.diverged else value


def _higher_rates(found: Found) -> Judged:
    best: dict[str, dict[int, float]] = {"fixed": {}, "zclip": {}}
    for group, rates in best.items():
        for seed in found.seeds:
            losses = {lr: _loss(found, row[group], seed) for lr, row in at_rates().items()}
            known = {lr: loss for lr, loss in losses.items() if loss is not None}
            if len(known) == len(losses):
                healthy = min(known.values()) < math.inf
                rates[seed] = min(known, key=known.__getitem__) if healthy else 0.0  # it allows none
    seeds = sorted(best["fixed"].keys() & best["zclip"].keys())
    if len(seeds) < LEAST_SEEDS:
        raise NotTestable(TOO_FEW)
    higher = sum(best["zclip"][seed] > best["fixed"][seed] for seed in seeds)
    lower = sum(best["zclip"][seed] < best["fixed"][seed] for seed in seeds)
    p = signs(higher, lower)
    high = [row for lr, row in at_rates().items() if lr in HIGH_RATES]

    def at_high_rates() -> Difference:
        one, other = (losses_by_seed(found, "train_loss", [row[group] for row in high]) for group in ("zclip", "fixed"))
        return difference(one, other)

    numbers = [
        "best of the paper's learning rates by seed: "
        + "; ".join(
            f"{name} {', '.join(f'{best[group][seed]:.0e}' if best[group][seed] else 'none' for seed in seeds)}"
            for name, group in (("fixed", "fixed"), ("ZClip", "zclip"))
        ),
        f"ZClip's is higher with {higher} of {len(seeds)} seeds, lower with {lower} (sign test, p = {p:.2g}); a run "
        "that diverged is the worst, and where all have, none is allowed",
        f"train loss on the mean of 1e-3 to 5e-3, ZClip minus fixed: {said(at_high_rates)}",
        "rule: the best rate is higher",
    ]
    if higher > lower and p < SIGNIFICANT:
        return SUPPORTED, numbers
    if higher and not lower and len(seeds) < SEEDS_OF_SIGNS:
        return NOT_TESTABLE, [*numbers, f"fewer than {SEEDS_OF_SIGNS} seeds cannot show it"]
    return NOT_SUPPORTED, numbers


def _fewer_tokens(found: Found) -> Judged:
    rates = at_rates()
    papers = reached_by_seed(found, rates[5e-4]["fixed"], rates[3e-3]["zclip"])
    saved = difference({seed: each.saved for seed, each in papers.items()})
    equal = []
    for lr, row in rates.items():
        try:
            if there := [each.saved for each in reached_by_seed(found, row["fixed"], row["zclip"]).values()]:
                fewer = f" ({len(there)} of {len(found.seeds)} seeds)" if len(there) < len(found.seeds) else ""
                equal.append(f"{lr:.0e} {np.mean(there):.0%}{fewer}")
        except NotTestable:
            equal.append(f"{lr:.0e} fixed diverged")
    numbers = [
        f"ZClip at 3e-3 against fixed at 5e-4, as the paper compares: {saved.mean:.0%} fewer tokens "
        f"({', '.join(each.says() for each in papers.values())} by seed; 0 % where it is there later, or never), "
        f"{saved.least:.0%} to {saved.most:.0%} (95 %); its last loss is "
        f"{np.mean([each.above for each in papers.values()]):+.2f} nats from fixed clipping's",
        f"at equal learning rates: {', '.join(equal)}",
        "rule: more than none, and with 95 % it is 35 % at least",
    ]
    return SUPPORTED if saved.above and saved.least >= 0.35 else NOT_SUPPORTED, numbers


def _lowest(measure: str, settings: Mapping[str, Setting], claimed: str) -> Judge:
    """Judge whether a setting has the lowest loss: it is below each of the others, on the same seeds."""

    def judge(found: Found) -> Judged:
        seeds = seeds_with_all(found, settings.values())
        if len(seeds) < LEAST_SEEDS:
            raise NotTestable(TOO_FEW)
        if gone := diverged_seeds(found, settings[claimed]):
            return NOT_SUPPORTED, [f"{claimed} has diverged: {named(settings[claimed], gone)}"]
        whole = found._replace(
            runs={key: run for key, run in found.runs.items() if key[1] in seeds},
            diverged={key for key in found.diverged if key[1] in seeds},
        )
        beaten = {label: gone for label, setting in settings.items() if (gone := diverged_seeds(whole, setting))}
        same = {
            label: by_seed(whole, measure, [(setting, None)])
            for label, setting in settings.items()
            if label not in beaten
        }
        name = MEASURES[measure].says.partition(" is ")[0].removeprefix("the ")
        means = ", ".join(f"{label} {np.mean(list(values.values())):.3f}" for label, values in same.items())
        lower = {label: difference(same[claimed], values) for label, values in same.items() if label != claimed}
        numbers = [f"mean {name}: {means}"]
        numbers += [f"{claimed} minus {label}: {each.says(4)}" for label, each in lower.items()]
        numbers += [f"{label} has diverged: {named(settings[label], gone)}" for label, gone in beaten.items()]
        numbers.append("rule: it is below each of the others; one that has diverged is beaten")
        return SUPPORTED if all(each.below for each in lower.values()) else NOT_SUPPORTED, numbers

    return judge


def _normal(found: Found) -> Judged:
    results: dict[str, list[float]] = {"norms": [], "log norms": []}
    shown = FIGURES["figure9"]["ZClip"]
    require_whole(found, [shown])
    runs = [run for seed in found.seeds if (run := found.runs.get((shown, seed))) is not None]
    if len(runs) < LEAST_SEEDS:
        raise NotTestable(TOO_FEW)
    share = 0.0
    for run in runs:
        for first, last in norm_windows(run):
            share = max(share, (last - first + 1) / len(run.metrics["step"]))
            sample = window_norms(run, first, last)
            if len(sample) >= LEAST_NORMS:
                results["norms"].append(float(stats.shapiro(sample).pvalue))
                results["log norms"].append(float(stats.shapiro(np.log(sample)).pvalue))
    if not results["norms"]:
        raise NotTestable(f"no window has {LEAST_NORMS} norms")
    rejected = {name: sum(p < SIGNIFICANT for p in each) for name, each in results.items()}
    numbers = [
        f"Shapiro-Wilk rejects a normal distribution of {name} in {rejected[name]} of {len(each)} windows (p < 0.05)"
        for name, each in results.items()
    ]
    if share > SHORT:
        numbers.append(f"but the windows are up to {share:.0%} of a run, in which norms fall, and are not short")
        return NOT_TESTABLE, numbers
    chance = stats.binomtest(rejected["norms"], len(results["norms"]), SIGNIFICANT, alternative="greater").pvalue
    numbers.append(
        f"so many or more of normal distributions would be rejected with p = {chance:.2g}; rule: that is not below "
        f"{SIGNIFICANT:g}, though few windows of few norms show large deviations only"
    )
    return SUPPORTED if chance >= SIGNIFICANT else NOT_SUPPORTED, numbers


def _overhead(found: Found) -> Judged:
    spent = {
        label: {
            seed: seconds
            for seed in found.seeds
            if (run := found.runs.get((setting, seed))) is not None and (seconds := clip_and_step(run)) is not None
        }
        for label, setting in STRATEGIES.items()
    }
    shares = {label: [100 * clip / step for clip, step in each.values()] for label, each in spent.items()}
    zclip, fixed = spent["ZClip"], spent["Fixed 1.0"]
    extra = {seed: 100 * (zclip[seed][0] - fixed[seed][0]) / fixed[seed][1] for seed in zclip.keys() & fixed.keys()}
    over = difference(extra)
    numbers = [
        "share of their own steps that goes to clipping, its norm included (which runs without clipping find too): "
        + ", ".join(f"{label} {np.mean(each):.2f} %" for label, each in shares.items() if each),
        f"ZClip minus fixed clipping, in percent of a step with fixed clipping: {over.says(2)}",
        f"rule: that is below {NEGLIGIBLE:g} %; tokens per hour of runs that share a machine are no measure of it",
    ]
    return SUPPORTED if over.most < NEGLIGIBLE else NOT_SUPPORTED, numbers


def _lab_of(*labels: str) -> list[tuple[str, Setting]]:
    """Return the settings of strategies in the spike lab, with their labels."""
    return [pair for pair in TABLES["spike_lab"].labelled() if pair[0].rpartition(", ")[0] in labels]


_RATES = [*TABLES["table2"].labelled()]

CLAIMS: Mapping[str, Claim] = {
    "Fixed clipping leaves spikes.": Claim(
        fixed_leaves_spikes, [*(pair for pair in _RATES if pair[1].clip == "fixed"), *_lab_of("Fixed 1.0")]
    ),
    "ZClip removes the spikes.": Claim(zclip_removes_spikes, [*_RATES, *_lab_of("Fixed 1.0", "ZClip", "No clipping")]),
    "ZClip allows higher learning rates.": Claim(_higher_rates, _RATES),
    "ZClip reaches the baseline's loss with 35 % fewer tokens.": Claim(_fewer_tokens, _RATES),
    "Reciprocal clipping beats clipping to the mean and to the maximum.": Claim(
        _lowest("test_loss", {name.lower(): VARIANTS[name] for name in ("Reciprocal", "Mean", "Max")}, "reciprocal"),
        [*VARIANTS.items()],
    ),
    "z_thresh = 2.5 is best.": Claim(_lowest("train_loss", THRESHOLDS, "2.5"), [*THRESHOLDS.items()]),
    "alpha = 0.97 is best.": Claim(_lowest("train_loss", ALPHAS, "0.97"), [*ALPHAS.items()]),
    "Gradient norms are about normally distributed in short windows.": Claim(_normal, [*FIGURES["figure9"].items()]),
    "The overhead is negligible.": Claim(_overhead, [*STRATEGIES.items()]),
}
