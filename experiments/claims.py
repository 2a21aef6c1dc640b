"""The paper's claims, and what the runs at hand say of each.

Runs of the same seed see the same batches, so strategies are compared seed by seed, each number being the mean over
the learning rates that are compared: the mean difference, and the two-sided paired t-test over seeds (where all seeds
have the same difference, the sign test). A verdict needs three seeds that have all runs compared, on the same text. A
difference counts with p < 0.05, and is absent where even the upper end of its 95 % interval is small; p-values are not
corrected for their number. A run that has diverged is never left out of a mean: it speaks against the strategy that it
is of, or where it is what the strategy is measured by, the claim is not testable. What else a verdict asks for stands
with its numbers. `not supported` means that these runs do not show it, be it the other way round or within what seeds
do.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.catalogue import (
    ALPHAS,
    FIGURES,
    HIGH_RATES,
    LEARNING_RATES,
    STRATEGIES,
    TABLES,
    THRESHOLDS,
    VARIANTS,
    Setting,
)
from experiments.collection import Found
from experiments.definitions import SPIKE_WINDOW
from experiments.distributions import LEAST_NORMS, norm_windows, window_norms
from experiments.measures import MEASURES, last_loss_reached
from experiments.paired import (
    LEAST_SEEDS,
    SIGNIFICANT,
    TOO_FEW,
    Difference,
    Untestable,
    difference,
    most_events,
    said,
    signs,
)

SUPPORTED, NOT_SUPPORTED, NOT_TESTABLE = "supported", "not supported", "not testable here"

#: Percent of a step that is negligible.
NEGLIGIBLE = 1.0
#: Spikes in a run, and nats above the undisturbed run after bad batches, that are as good as none.
FEW_SPIKES, LITTLE = 0.2, 0.02
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


#: A verdict and its numbers.
Judged = tuple[str, list[str]]
Judge = Callable[[Found], Judged]


def verdicts(found: Found) -> list[Verdict]:
    """Return what the runs say of each claim."""
    texts = sorted({str((run.result or {}).get("data_fingerprint")) for run in found.runs.values()})
    judged = []
    for claim, judge in CLAIMS.items():
        try:
            if len(texts) > 1:
                raise Untestable(f"the runs are of different texts (fingerprints {' and '.join(texts)})")
            judged.append(Verdict(claim, *judge(found)))
        except Untestable as why:
            judged.append(Verdict(claim, NOT_TESTABLE, [str(why)]))
    return judged


def _diverged(found: Found, setting: Setting) -> list[int]:
    """Return the seeds with which a setting has diverged."""
    return [seed for seed in found.seeds if (setting, seed) in found.diverged]


def _named(setting: Setting, seeds: Sequence[int]) -> str:
    """Name runs as on the command line."""
    return f"{' '.join(setting.overrides)} seed={','.join(map(str, seeds))}"


def _whole(found: Found, settings: Sequence[Setting]) -> None:
    """Raise `Untestable` if a run of some settings has diverged."""
    for setting in settings:
        if gone := _diverged(found, setting):
            raise Untestable(f"a run that others are measured by has diverged: {_named(setting, gone)}")


def _by_seed(found: Found, measure: str, settings: Sequence[tuple[Setting, Setting | None]]) -> dict[int, float]:
    """Return the mean of a number over settings, each with its undisturbed one, by seed, of seeds that have all.

    Raises:
        Untestable: a number is not finite: a mean over the others would leave out the worst.
    """
    values = {}
    for seed in found.seeds:
        own = []
        for setting, calm in settings:
            run, other = found.runs.get((setting, seed)), None if calm is None else found.runs.get((calm, seed))
            value = None if run is None else MEASURES[measure].of(run, other)
            if value is not None and not math.isfinite(value):
                raise Untestable(f"a run that is compared has no finite number: {_named(setting, [seed])}")
            own.append(value)
        known = [value for value in own if value is not None]
        if len(known) == len(settings):
            values[seed] = float(np.mean(known))
    return values


def _losses(found: Found, measure: str, settings: Sequence[Setting]) -> dict[int, float]:
    """Return the mean loss over settings by seed; raise `Untestable` if one has diverged."""
    _whole(found, settings)
    return _by_seed(found, measure, [(setting, None) for setting in settings])


def _rates() -> dict[float, Mapping[str, Setting]]:
    return {lr: row.settings for lr, row in zip(LEARNING_RATES, TABLES["table2"].rows, strict=True)}


def _in_lab(label: str) -> Mapping[str, Setting]:
    return next(row.settings for row in TABLES["spike_lab"].rows if row.label == label)


def _excursions(found: Found, label: str) -> dict[int, float]:
    settings = _in_lab(label)
    _whole(found, [settings["good"]])
    return _by_seed(found, "excursion", [(settings["bad"], settings["good"])])


def _spikes(found: Found, group: str) -> dict[int, float]:
    """Return the spikes in a run, over all learning rates, by seed; also those of runs that have diverged."""
    return _by_seed(found, "spikes", [(row[group], None) for row in _rates().values()])


def _left(found: Found, label: str, group: str) -> tuple[Difference, Difference, float, list[str]]:
    """Return how many spikes a strategy leaves, how far its loss is above the undisturbed run's, and both in words.

    The third number is the upper 95 % bound of the spikes in a run, of as many as there are in all (Poisson).
    """
    by_seed = _spikes(found, group)
    spikes, excursion = difference(by_seed), difference(_excursions(found, label))
    most = most_events(spikes.mean, len(by_seed) * len(LEARNING_RATES))
    numbers = [
        f"{label}: spikes in a run, over all learning rates: {spikes.says(2)}, at most {most:.2f} (95 %); the first "
        f"{SPIKE_WINDOW} steps can only spike by not being finite",
        f"{label}: loss after bad batches minus the undisturbed run's, in nats: {excursion.says()}, at most "
        f"{excursion.most:.3f} (95 %)",
    ]
    return spikes, excursion, most, numbers


def _spikes_of_fixed(found: Found) -> Judged:
    spikes, excursion, _, numbers = _left(found, "Fixed 1.0", "fixed")
    rule = "rule: a run has more than none on the mean of the learning rates, or its loss is above after bad batches"
    return SUPPORTED if spikes.above or excursion.above else NOT_SUPPORTED, [*numbers, rule]


def _spikes_of_zclip(found: Found) -> Judged:
    of_fixed, after_fixed, _, _ = _left(found, "Fixed 1.0", "fixed")
    if not of_fixed.above and not after_fixed.above:
        raise Untestable("fixed clipping leaves none for sure, so that there is nothing to remove")
    _, excursion, most, numbers = _left(found, "ZClip", "zclip")
    own = _excursions(found, "ZClip")
    for label in ("Fixed 1.0", "No clipping"):
        less = said(lambda: difference(own, _excursions(found, label)))  # noqa: B023, called at once
        numbers.append(f"that loss, ZClip minus {label}: {less}")
    fewer = difference(_spikes(found, "zclip"), _spikes(found, "fixed"))
    numbers += [
        f"spikes in a run, ZClip minus fixed: {fewer.says(2)}",
        f"rule: none are left, with 95 % at most {FEW_SPIKES:g} in a run and {LITTLE:g} nats after bad batches, and no "
        "run has diverged",
    ]
    zclip = dict.fromkeys([*(row["zclip"] for row in _rates().values()), _in_lab("ZClip")["bad"]])
    if gone := [_named(setting, seeds) for setting in zclip if (seeds := _diverged(found, setting))]:
        return NOT_SUPPORTED, [f"diverged: {'; '.join(gone)}", *numbers]
    return SUPPORTED if most <= FEW_SPIKES and excursion.most <= LITTLE else NOT_SUPPORTED, numbers


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
            losses = {lr: _loss(found, row[group], seed) for lr, row in _rates().items()}
            known = {lr: loss for lr, loss in losses.items() if loss is not None}
            if len(known) == len(losses):
                if min(known.values()) == math.inf:
                    raise Untestable(f"clip={group} has diverged at every learning rate with seed {seed}")
                rates[seed] = min(known, key=known.__getitem__)
    seeds = sorted(best["fixed"].keys() & best["zclip"].keys())
    if len(seeds) < LEAST_SEEDS:
        raise Untestable(TOO_FEW)
    higher = sum(best["zclip"][seed] > best["fixed"][seed] for seed in seeds)
    lower = sum(best["zclip"][seed] < best["fixed"][seed] for seed in seeds)
    p = signs(higher, lower)
    high = [row for lr, row in _rates().items() if lr in HIGH_RATES]

    def at_high_rates() -> Difference:
        one, other = (_losses(found, "train_loss", [row[group] for row in high]) for group in ("zclip", "fixed"))
        return difference(one, other)

    numbers = [
        "best learning rate by seed: "
        + "; ".join(
            f"{name} {', '.join(f'{best[group][seed]:.0e}' for seed in seeds)}"
            for name, group in (("fixed", "fixed"), ("ZClip", "zclip"))
        ),
        f"ZClip's is higher with {higher} of {len(seeds)} seeds, lower with {lower} (sign test, p = {p:.2g}); a run "
        "that diverged is the worst",
        f"train loss on the mean of 1e-3 to 5e-3, ZClip minus fixed: {said(at_high_rates)}",
        "rule: the best rate is higher",
    ]
    if higher > lower and p < SIGNIFICANT:
        return SUPPORTED, numbers
    if higher and not lower and len(seeds) < SEEDS_OF_SIGNS:
        return NOT_TESTABLE, [*numbers, f"fewer than {SEEDS_OF_SIGNS} seeds cannot show it"]
    return NOT_SUPPORTED, numbers


def _saved(found: Found, fixed: Setting, zclip: Setting) -> dict[int, float]:
    """Return the share of tokens that ZClip saves to reach the loss at the end of fixed clipping, by seed.

    None are saved by a run that does not get there, or has diverged.
    """
    _whole(found, [fixed])
    saved = {}
    for seed in found.seeds:
        one, other = found.runs.get((fixed, seed)), found.runs.get((zclip, seed))
        if one is not None and other is not None:
            saved[seed] = 0.0 if (zclip, seed) in found.diverged else last_loss_reached(one, other).saved
    return saved


def _fewer_tokens(found: Found) -> Judged:
    rates = _rates()
    papers = _saved(found, rates[5e-4]["fixed"], rates[3e-3]["zclip"])
    fewer = difference(papers)
    equal = []
    for lr, row in rates.items():
        try:
            if saved := _saved(found, row["fixed"], row["zclip"]):
                equal.append(f"{lr:.0e} {np.mean(list(saved.values())):.0%}")
        except Untestable:
            equal.append(f"{lr:.0e} fixed diverged")
    numbers = [
        f"ZClip at 3e-3 against fixed at 5e-4, as the paper compares: {fewer.mean:.0%} fewer tokens "
        f"({', '.join(f'{share:.0%}' for share in papers.values())} by seed; 0 % where it does not get there)",
        f"at equal learning rates: {', '.join(equal)}",
        "rule: more than none, and 35 % at least on the mean",
    ]
    return SUPPORTED if fewer.above and fewer.mean >= 0.35 else NOT_SUPPORTED, numbers


def _beats(
    found: Found, measure: str, claimed: tuple[str, Setting], rivals: Mapping[str, Setting]
) -> tuple[bool, list[str]]:
    """Return whether a setting has a lower loss than each of others, and how much lower; who diverges is beaten."""
    label, setting = claimed
    if gone := _diverged(found, setting):
        return False, [f"{label} has diverged: {_named(setting, gone)}"]
    own, beaten, numbers = _losses(found, measure, [setting]), [], []
    for name, rival in rivals.items():
        if gone := _diverged(found, rival):
            beaten.append(len(own) >= LEAST_SEEDS)
            numbers.append(f"{name} has diverged: {_named(rival, gone)}")
            continue
        lower = difference(own, _losses(found, measure, [rival]))
        beaten.append(lower.below)
        numbers.append(f"{label} minus {name}: {lower.says(4)}")
    return all(beaten), numbers


def _reciprocal(found: Found) -> Judged:
    rivals = {name.lower(): VARIANTS[name] for name in ("Mean", "Max")}
    better, numbers = _beats(found, "test_loss", ("reciprocal", VARIANTS["Reciprocal"]), rivals)
    return SUPPORTED if better else NOT_SUPPORTED, [*numbers, "test losses; rule: it is below both"]


def _best_of(settings: dict[str, Setting], claimed: str) -> Judge:
    def judge(found: Found) -> Judged:
        healthy = {label: setting for label, setting in settings.items() if not _diverged(found, setting)}
        every = {label: _losses(found, "train_loss", [setting]) for label, setting in healthy.items()}
        seeds = sorted(set.intersection(*(set(values) for values in every.values()))) if every else []
        if len(seeds) < LEAST_SEEDS:
            raise Untestable(TOO_FEW)
        means = {label: float(np.mean([values[seed] for seed in seeds])) for label, values in every.items()}
        rivals = sorted((label for label in means if label != claimed), key=means.__getitem__)[:1]
        rivals += [label for label in settings if label not in healthy and label != claimed]
        better, numbers = _beats(
            found, "train_loss", (claimed, settings[claimed]), {label: settings[label] for label in rivals}
        )
        shown = "mean train loss: " + ", ".join(f"{label} {mean:.3f}" for label, mean in means.items())
        return SUPPORTED if better else NOT_SUPPORTED, [shown, *numbers, "rule: it is below the best of the others"]

    return judge


def _normal(found: Found) -> Judged:
    results: dict[str, list[float]] = {"norms": [], "log norms": []}
    shown = FIGURES["figure9"]["ZClip"]
    _whole(found, [shown])
    runs = [run for seed in found.seeds if (run := found.runs.get((shown, seed))) is not None]
    if len(runs) < LEAST_SEEDS:
        raise Untestable(TOO_FEW)
    share = 0.0
    for run in runs:
        for first, last in norm_windows(run):
            share = max(share, (last - first + 1) / len(run.metrics["step"]))
            sample = window_norms(run, first, last)
            if len(sample) >= LEAST_NORMS:
                results["norms"].append(float(stats.shapiro(sample).pvalue))
                results["log norms"].append(float(stats.shapiro(np.log(sample)).pvalue))
    if not results["norms"]:
        raise Untestable(f"no window has {LEAST_NORMS} norms")
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
    shares = {label: _by_seed(found, "clip_share", [(setting, None)]) for label, setting in STRATEGIES.items()}
    extra = difference(shares["ZClip"], shares["Fixed 1.0"])
    numbers = [
        "share of a step that goes to clipping, its norm included (which runs without clipping find too): "
        + ", ".join(f"{label} {np.mean(list(each.values())):.2f} %" for label, each in shares.items() if each),
        f"ZClip minus fixed clipping: {extra.says(2)}, at most {extra.most:.2f} % of a step (95 %)",
        f"rule: that is below {NEGLIGIBLE:g} %; tokens per hour of runs that share a machine are no measure of it",
    ]
    return SUPPORTED if extra.most < NEGLIGIBLE else NOT_SUPPORTED, numbers


CLAIMS: Mapping[str, Judge] = {
    "Fixed clipping leaves spikes.": _spikes_of_fixed,
    "ZClip removes the spikes.": _spikes_of_zclip,
    "ZClip allows higher learning rates.": _higher_rates,
    "ZClip reaches the baseline's loss with 35 % fewer tokens.": _fewer_tokens,
    "Reciprocal clipping beats clipping to the mean and to the maximum.": _reciprocal,
    "z_thresh = 2.5 is best.": _best_of(THRESHOLDS, "2.5"),
    "alpha = 0.97 is best.": _best_of(ALPHAS, "0.97"),
    "Gradient norms are about normally distributed in short windows.": _normal,
    "The overhead is negligible.": _overhead,
}
