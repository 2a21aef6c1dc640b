"""The paper's claims, and what the runs at hand say of each.

Runs of the same seed see the same batches, so strategies are compared seed by seed, each number being the mean over
the learning rates that are compared: the mean difference, and the two-sided paired t-test over seeds (where all seeds
have the same difference, the sign test). A verdict needs three seeds that have all runs compared. A difference counts
with p < 0.05; p-values are not corrected for their number. What else a verdict asks for stands with its numbers. `not
supported` means that these runs do not show it, be it the other way round or within what seeds do.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.catalogue import ALPHAS, HIGH_RATES, LEARNING_RATES, STRATEGIES, TABLES, THRESHOLDS, VARIANTS, Setting
from experiments.collection import Found
from experiments.definitions import REACHED_WINDOW, SPIKE_WINDOW, tokens_to_reach
from experiments.distributions import LEAST_NORMS, norm_windows, window_norms
from experiments.measures import MEASURES

SUPPORTED, NOT_SUPPORTED, NOT_TESTABLE = "supported", "not supported", "not testable here"

#: Seeds that a verdict needs.
LEAST_SEEDS = 3
#: p below which a difference counts.
SIGNIFICANT = 0.05
#: Percent of a step that is negligible.
NEGLIGIBLE = 1.0
#: Share of windows in which the test may reject a normal distribution.
REJECTED = 0.1
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


class Difference(NamedTuple):
    """A paired difference.

    Attributes:
        mean: of the differences.
        p: of the two-sided paired t-test; of the sign test where all differences are the same, 1 where they are 0.
        seeds: how many pairs there are.
    """

    mean: float
    p: float
    seeds: int

    def says(self, decimals: int = 3) -> str:
        """Return it as a phrase."""
        return f"{self.mean:+.{decimals}f} (p = {self.p:.2g}, {self.seeds} seeds)"

    @property
    def below(self) -> bool:
        """Whether it is below zero, and not by chance."""
        return self.mean < 0 and self.p < SIGNIFICANT

    @property
    def above(self) -> bool:
        """Whether it is above zero, and not by chance."""
        return self.mean > 0 and self.p < SIGNIFICANT


def paired(one: Sequence[float], other: Sequence[float]) -> Difference | None:
    """Return the difference of two samples, pair by pair; `None` for fewer pairs than a verdict needs."""
    differences = np.subtract(one, other)
    if len(differences) < LEAST_SEEDS:
        return None
    if np.ptp(differences) <= 1e-12 * max(1.0, float(np.abs(differences).max())):
        p = 1.0 if differences[0] == 0 else 0.5 ** (len(differences) - 1)
    else:
        p = float(stats.ttest_1samp(differences, 0).pvalue)
    return Difference(float(differences.mean()), p, len(differences))


def verdicts(found: Found) -> list[Verdict]:
    """Return what the runs say of each claim."""
    return [claim(found) for claim in CLAIMS]


TOO_FEW = ["fewer than three seeds have all the runs that are compared"]


def _by_seed(found: Found, measure: str, settings: Sequence[tuple[Setting, Setting | None]]) -> dict[int, float]:
    """Return the mean of a number over settings, each with its undisturbed one, by seed, of seeds that have all."""
    values = {}
    for seed in found.seeds:
        own = []
        for setting, calm in settings:
            run = found.runs.get((setting, seed))
            other = None if calm is None else found.runs.get((calm, seed))
            own.append(None if run is None else MEASURES[measure].of(run, other))
        known = [value for value in own if value is not None and np.isfinite(value)]
        if len(known) == len(settings):
            values[seed] = float(np.mean(known))
    return values


def _difference(one: dict[int, float], other: dict[int, float] | None = None) -> Difference | None:
    """Return how far numbers are above others, or above zero, seed by seed."""
    seeds = sorted(one if other is None else one.keys() & other.keys())
    return paired([one[seed] for seed in seeds], [0.0 if other is None else other[seed] for seed in seeds])


def _compare(found: Found, measure: str, one: Sequence[Setting], other: Sequence[Setting]) -> Difference | None:
    first, second = (_by_seed(found, measure, [(setting, None) for setting in each]) for each in (one, other))
    return _difference(first, second)


def _rates() -> dict[float, Mapping[str, Setting]]:
    return {lr: row.settings for lr, row in zip(LEARNING_RATES, TABLES["table2"].rows, strict=True)}


def _excursions(found: Found, label: str) -> dict[int, float]:
    settings = next(row.settings for row in TABLES["spike_lab"].rows if row.label == label)
    return _by_seed(found, "excursion", [(settings["bad"], settings["good"])])


def _spikes(found: Found, group: str) -> dict[int, float]:
    """Return the spikes in a run, over all learning rates, by seed."""
    return _by_seed(found, "spikes", [(row[group], None) for row in _rates().values()])


RULE = (
    "spikes are left where a run has more than none on the mean of the learning rates, or its loss is above the "
    "undisturbed run's after bad batches"
)


def _left(found: Found, label: str, group: str) -> tuple[bool, list[str]] | None:
    """Return whether a strategy leaves spikes, by the one rule for all, and its numbers."""
    spikes, excursion = _difference(_spikes(found, group)), _difference(_excursions(found, label))
    if spikes is None or excursion is None:
        return None
    numbers = [
        f"{label}: spikes in a run, over all learning rates: {spikes.says(2)}; none can be in the first {SPIKE_WINDOW} "
        "steps",
        f"{label}: loss after bad batches minus the undisturbed run's, in nats: {excursion.says()}",
    ]
    return spikes.above or excursion.above, numbers


def _spikes_of_fixed(found: Found) -> Verdict:
    claim = "Fixed clipping leaves spikes."
    judged = _left(found, "Fixed 1.0", "fixed")
    if judged is None:
        return Verdict(claim, NOT_TESTABLE, TOO_FEW)
    left, numbers = judged
    return Verdict(claim, SUPPORTED if left else NOT_SUPPORTED, [*numbers, f"rule: {RULE}"])


def _spikes_of_zclip(found: Found) -> Verdict:
    claim = "ZClip removes the spikes."
    judged = _left(found, "ZClip", "zclip")
    own = _excursions(found, "ZClip")
    compared = {label: _difference(own, _excursions(found, label)) for label in ("Fixed 1.0", "No clipping")}
    fewer = _difference(_spikes(found, "zclip"), _spikes(found, "fixed"))
    if judged is None or fewer is None:
        return Verdict(claim, NOT_TESTABLE, TOO_FEW)
    left, numbers = judged
    numbers += [
        f"that loss, ZClip minus {label}: {difference.says()}" for label, difference in compared.items() if difference
    ]
    numbers += [f"spikes in a run, ZClip minus fixed: {fewer.says(2)}", f"rule: none are left; {RULE}"]
    return Verdict(claim, NOT_SUPPORTED if left else SUPPORTED, numbers)


def _loss(found: Found, setting: Setting, seed: int) -> float | None:
    """Return the train loss of a run, infinite if it has diverged; `None` if it is not done."""
    if (run := found.runs.get((setting, seed))) is None:
        return None
    value = (run.result or {}).get("train_loss")
    return math.inf if value is None or (setting, seed) in found.diverged else value


def _higher_rates(found: Found) -> Verdict:
    claim = "ZClip allows higher learning rates."
    best: dict[str, dict[int, float]] = {"fixed": {}, "zclip": {}}
    for group, rates in best.items():
        for seed in found.seeds:
            losses = {lr: _loss(found, row[group], seed) for lr, row in _rates().items()}
            known = {lr: loss for lr, loss in losses.items() if loss is not None}
            if len(known) == len(losses):
                rates[seed] = math.log10(min(known, key=known.__getitem__))
    difference = _difference(best["zclip"], best["fixed"])
    if difference is None:
        return Verdict(claim, NOT_TESTABLE, TOO_FEW)
    high = [row for lr, row in _rates().items() if lr in HIGH_RATES]
    lower = _compare(found, "train_loss", [row["zclip"] for row in high], [row["fixed"] for row in high])
    numbers = [
        "best learning rate by seed: "
        + "; ".join(
            f"{name} {', '.join(f'{10**rate:.0e}' for rate in best[group].values())}"
            for name, group in (("fixed", "fixed"), ("ZClip", "zclip"))
        ),
        f"logarithm of the best rate, ZClip minus fixed: {difference.says(2)}; a run that diverged is the worst",
    ]
    if lower is not None:
        numbers.append(f"train loss on the mean of 1e-3 to 5e-3, ZClip minus fixed: {lower.says()}")
    return Verdict(claim, SUPPORTED if difference.above else NOT_SUPPORTED, [*numbers, "rule: the best rate is higher"])


def _saved(found: Found, fixed: Setting, zclip: Setting) -> dict[int, float]:
    """Return the share of tokens that ZClip saves to reach the loss at the end of fixed clipping, by seed."""
    saved = {}
    for seed in found.seeds:
        one, other = found.runs.get((fixed, seed)), found.runs.get((zclip, seed))
        if one is not None and other is not None:
            target = float(one.metrics["loss"][-REACHED_WINDOW:].mean())
            reached = tokens_to_reach(
                other.metrics["loss"], other.metrics["tokens"], target if math.isfinite(target) else math.inf
            )
            saved[seed] = 0.0 if reached is None else 1 - reached / float(one.metrics["tokens"][-1])
    return saved


def _fewer_tokens(found: Found) -> Verdict:
    claim = "ZClip reaches the baseline's loss with 35 % fewer tokens."
    rates = _rates()
    papers = _saved(found, rates[5e-4]["fixed"], rates[3e-3]["zclip"])
    difference = _difference(papers)
    if difference is None:
        return Verdict(claim, NOT_TESTABLE, TOO_FEW)
    equal = {lr: list(_saved(found, row["fixed"], row["zclip"]).values()) for lr, row in rates.items()}
    numbers = [
        f"ZClip at 3e-3 against fixed at 5e-4, as the paper compares: {difference.mean:.0%} fewer tokens "
        f"({', '.join(f'{share:.0%}' for share in papers.values())} by seed; 0 % where it does not get there)",
        "at equal learning rates: "
        + ", ".join(f"{lr:.0e} {np.mean(saved):.0%}" for lr, saved in equal.items() if saved),
        "rule: more than none, and 35 % at least on the mean",
    ]
    return Verdict(claim, SUPPORTED if difference.above and difference.mean >= 0.35 else NOT_SUPPORTED, numbers)


def _reciprocal(found: Found) -> Verdict:
    claim = "Reciprocal clipping beats clipping to the mean and to the maximum."
    own = [VARIANTS["Reciprocal"]]
    compared = {name: _compare(found, "test_loss", own, [VARIANTS[name]]) for name in ("Mean", "Max")}
    differences = {name: difference for name, difference in compared.items() if difference is not None}
    if len(differences) < len(compared):
        return Verdict(claim, NOT_TESTABLE, TOO_FEW)
    numbers = [f"test loss, reciprocal minus {name.lower()}: {each.says(4)}" for name, each in differences.items()]
    better = all(difference.below for difference in differences.values())
    return Verdict(claim, SUPPORTED if better else NOT_SUPPORTED, [*numbers, "rule: it is below both"])


def _best_of(name: str, settings: dict[str, Setting], claimed: str) -> Callable[[Found], Verdict]:
    def judge(found: Found) -> Verdict:
        claim = f"{name} = {claimed} is best."
        values = {label: _by_seed(found, "train_loss", [(setting, None)]) for label, setting in settings.items()}
        means = {label: float(np.mean(list(each.values()))) for label, each in values.items() if each}
        rival = min((label for label in means if label != claimed), key=means.__getitem__, default=None)
        difference = None if rival is None else _difference(values[claimed], values[rival])
        if difference is None or len(means) < len(settings):
            return Verdict(claim, NOT_TESTABLE, TOO_FEW)
        numbers = [
            "mean train loss: " + ", ".join(f"{label} {mean:.3f}" for label, mean in means.items()),
            f"{claimed} minus {rival}, the best of the others: {difference.says(4)}",
            "rule: it is below the best of the others",
        ]
        return Verdict(claim, SUPPORTED if difference.below else NOT_SUPPORTED, numbers)

    return judge


def _normal(found: Found) -> Verdict:
    claim = "Gradient norms are about normally distributed in short windows."
    results: dict[str, list[float]] = {"norms": [], "log norms": []}
    seeds, share = 0, 0.0
    for seed in found.seeds:
        if (run := found.runs.get((STRATEGIES["ZClip"], seed))) is not None:
            seeds += 1
            for first, last in norm_windows(run):
                share = max(share, (last - first + 1) / len(run.metrics["step"]))
                sample = window_norms(run, first, last)
                if len(sample) >= LEAST_NORMS:
                    results["norms"].append(float(stats.shapiro(sample).pvalue))
                    results["log norms"].append(float(stats.shapiro(np.log(sample)).pvalue))
    if seeds < LEAST_SEEDS:
        return Verdict(claim, NOT_TESTABLE, TOO_FEW)
    rejected = {name: sum(p < SIGNIFICANT for p in each) for name, each in results.items()}
    numbers = [
        f"Shapiro-Wilk rejects a normal distribution of {name} in {rejected[name]} of {len(each)} windows (p < 0.05)"
        for name, each in results.items()
    ]
    if share > SHORT:
        numbers.append(f"but the windows are up to {share:.0%} of a run, in which norms fall, and are not short")
        return Verdict(claim, NOT_TESTABLE, numbers)
    few = rejected["norms"] <= REJECTED * len(results["norms"])
    return Verdict(claim, SUPPORTED if few else NOT_SUPPORTED, [*numbers, f"rule: in {REJECTED:.0%} of them at most"])


def _overhead(found: Found) -> Verdict:
    claim = "The overhead is negligible."
    shares = {label: _by_seed(found, "clip_share", [(setting, None)]) for label, setting in STRATEGIES.items()}
    extra = _difference(shares["ZClip"], shares["Fixed 1.0"])
    if extra is None:
        return Verdict(claim, NOT_TESTABLE, TOO_FEW)
    both = sorted(shares["ZClip"].keys() & shares["Fixed 1.0"].keys())
    differences = [shares["ZClip"][seed] - shares["Fixed 1.0"][seed] for seed in both]
    error = float(np.std(differences, ddof=1)) / math.sqrt(len(both))
    most = extra.mean + float(stats.t.ppf(0.975, len(both) - 1)) * error
    numbers = [
        "share of a step that goes to clipping, its norm included (which runs without clipping find too): "
        + ", ".join(f"{label} {np.mean(list(each.values())):.2f} %" for label, each in shares.items() if each),
        f"ZClip minus fixed clipping: {extra.says(2)}, at most {most:.2f} % of a step (95 %)",
        f"rule: that is below {NEGLIGIBLE:g} %; tokens per hour of runs that share a machine are no measure of it",
    ]
    return Verdict(claim, SUPPORTED if most < NEGLIGIBLE else NOT_SUPPORTED, numbers)


CLAIMS: Sequence[Callable[[Found], Verdict]] = (
    _spikes_of_fixed,
    _spikes_of_zclip,
    _higher_rates,
    _fewer_tokens,
    _reciprocal,
    _best_of("z_thresh", THRESHOLDS, "2.5"),
    _best_of("alpha", ALPHAS, "0.97"),
    _normal,
    _overhead,
)
