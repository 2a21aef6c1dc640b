"""The paper's claims, and what the runs at hand say of each.

Runs of the same seed see the same batches, so strategies are compared seed by seed: the mean difference, and the
two-sided paired t-test. A verdict needs three seeds. `supported` needs the claimed direction and p < 0.05; all else is
`not supported`, be it the other way round or within what seeds do. p-values are not corrected for their number.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.catalogue import ALPHAS, LEARNING_RATES, STRATEGIES, TABLES, THRESHOLDS, VARIANTS, Setting
from experiments.collection import Found
from experiments.definitions import REACHED_WINDOW, tokens_to_reach
from experiments.distributions import norm_windows, window_norms
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
        p: of the two-sided paired t-test; 1 where all differences are the same 0.
        pairs: how many there are.
    """

    mean: float
    p: float
    pairs: int

    def says(self, decimals: int = 3) -> str:
        """Return it as a phrase."""
        return f"{self.mean:+.{decimals}f}, p = {self.p:.2g}, {self.pairs} pairs"

    @property
    def below(self) -> bool:
        """Whether it is below zero, and not by chance."""
        return self.mean < 0 and self.p < SIGNIFICANT


def paired(one: Sequence[float], other: Sequence[float]) -> Difference | None:
    """Return the difference of two samples, pair by pair; `None` for fewer pairs than a verdict needs."""
    differences = np.subtract(one, other)
    if len(differences) < LEAST_SEEDS:
        return None
    if np.ptp(differences) == 0:
        return Difference(float(differences[0]), 1.0 if differences[0] == 0 else 0.0, len(differences))
    return Difference(float(differences.mean()), float(stats.ttest_1samp(differences, 0).pvalue), len(differences))


def verdicts(found: Found) -> list[Verdict]:
    """Return what the runs say of each claim."""
    return [claim(found) for claim in CLAIMS]


def _values(found: Found, measure: str, setting: Setting, undisturbed: Setting | None = None) -> dict[int, float]:
    """Return a number of a setting's runs, by seed."""
    values = {}
    for seed in found.seeds:
        run = found.runs.get((setting, seed))
        other = None if undisturbed is None else found.runs.get((undisturbed, seed))
        value = None if run is None else MEASURES[measure].of(run, other)
        if value is not None and np.isfinite(value):
            values[seed] = value
    return values


def _compare(found: Found, measure: str, pairs: Sequence[tuple[Setting, Setting]]) -> Difference | None:
    """Return how far a number of the first settings is above that of the second, over pairs and seeds."""
    one: list[float] = []
    other: list[float] = []
    for first, second in pairs:
        a, b = _values(found, measure, first), _values(found, measure, second)
        for seed in sorted(a.keys() & b.keys()):
            one.append(a[seed])
            other.append(b[seed])
    return paired(one, other) if len({seed for _, seed in found.runs}) >= LEAST_SEEDS else None


def _rates() -> dict[float, dict[str, Setting]]:
    return {lr: dict(row.settings) for lr, row in zip(LEARNING_RATES, TABLES["table2"].rows, strict=True)}


def _lab(label: str) -> tuple[Setting, Setting]:
    settings = next(row.settings for row in TABLES["spike_lab"].rows if row.label == label)
    return settings["bad"], settings["good"]


def _excursions(found: Found, one: str, other: str) -> Difference | None:
    a, b = (_values(found, "excursion", *_lab(label)) for label in (one, other))
    seeds = sorted(a.keys() & b.keys())
    return paired([a[seed] for seed in seeds], [b[seed] for seed in seeds])


def _spikes_of_fixed(found: Found) -> Verdict:
    claim = "Fixed clipping leaves spikes."
    counts = [value for row in _rates().values() for value in _values(found, "spikes", row["fixed"]).values()]
    excursion = _values(found, "excursion", *_lab("Fixed 1.0"))
    if len(counts) < LEAST_SEEDS or len(excursion) < LEAST_SEEDS:
        return Verdict(claim, NOT_TESTABLE, ["there are too few runs"])
    above = paired(list(excursion.values()), [0.0] * len(excursion))
    assert above is not None
    numbers = [
        f"{sum(counts):.0f} spikes in {len(counts)} runs with fixed clipping, over all learning rates",
        f"loss after bad batches minus the undisturbed run's, in nats: {above.says()}",
    ]
    left = sum(counts) > 0 or (above.mean > 0 and above.p < SIGNIFICANT)
    return Verdict(claim, SUPPORTED if left else NOT_SUPPORTED, numbers)


def _spikes_of_zclip(found: Found) -> Verdict:
    claim = "ZClip removes the spikes."
    rates = _rates()
    spikes = _compare(found, "spikes", [(row["zclip"], row["fixed"]) for row in rates.values()])
    none = _compare(found, "spikes", [(STRATEGIES["ZClip"], STRATEGIES["No clipping"])])
    excursion = _excursions(found, "ZClip", "Fixed 1.0")
    plain = _excursions(found, "ZClip", "No clipping")
    if spikes is None or none is None or excursion is None or plain is None:
        return Verdict(claim, NOT_TESTABLE, ["there are too few runs"])
    own = [value for row in rates.values() for value in _values(found, "spikes", row["zclip"]).values()]
    numbers = [
        f"{sum(own):.0f} spikes in {len(own)} runs with ZClip, over all learning rates",
        f"spikes in a run, ZClip minus fixed: {spikes.says(2)}; minus none at 1e-3: {none.says(2)}",
        f"excursion after bad batches in nats, ZClip minus fixed: {excursion.says()}; minus none: {plain.says()}",
    ]
    fewer = sum(own) == 0 and excursion.below and plain.below
    return Verdict(claim, SUPPORTED if fewer else NOT_SUPPORTED, numbers)


def _higher_rates(found: Found) -> Verdict:
    claim = "ZClip allows higher learning rates."
    losses = {
        group: {lr: _values(found, "train_loss", row[group]) for lr, row in _rates().items()}
        for group in ("fixed", "zclip")
    }
    if any(len(values) < LEAST_SEEDS for group in losses.values() for values in group.values()):
        return Verdict(claim, NOT_TESTABLE, ["there are too few runs, or some have no finite loss"])
    best = {
        group: min(rates, key=lambda lr: float(np.mean(list(rates[lr].values())))) for group, rates in losses.items()
    }
    high = _compare(found, "train_loss", [(row["zclip"], row["fixed"]) for lr, row in _rates().items() if lr >= 1e-3])
    assert high is not None
    numbers = [
        f"the best of the learning rates is {best['fixed']:.0e} with fixed clipping and {best['zclip']:.0e} with ZClip",
        f"train loss at 1e-3 to 5e-3, ZClip minus fixed: {high.says()}",
    ]
    return Verdict(claim, SUPPORTED if best["zclip"] > best["fixed"] else NOT_SUPPORTED, numbers)


def _saved(found: Found, fixed: Setting, zclip: Setting) -> list[float]:
    """Return the share of tokens that ZClip saves to reach the loss at the end of fixed clipping, by seed."""
    saved = []
    for seed in found.seeds:
        one, other = found.runs.get((fixed, seed)), found.runs.get((zclip, seed))
        if one is not None and other is not None:
            target = float(one.metrics["loss"][-REACHED_WINDOW:].mean())
            reached = tokens_to_reach(other.metrics["loss"], other.metrics["tokens"], target)
            saved.append(0.0 if reached is None else 1 - reached / float(one.metrics["tokens"][-1]))
    return saved


def _fewer_tokens(found: Found) -> Verdict:
    claim = "ZClip reaches the baseline's loss with 35 % fewer tokens."
    rates = _rates()
    papers = _saved(found, rates[5e-4]["fixed"], rates[3e-3]["zclip"])
    equal = {lr: _saved(found, row["fixed"], row["zclip"]) for lr, row in rates.items()}
    if len(papers) < LEAST_SEEDS or any(len(saved) < LEAST_SEEDS for saved in equal.values()):
        return Verdict(claim, NOT_TESTABLE, ["there are too few runs"])
    numbers = [
        f"ZClip at 3e-3 against fixed at 5e-4, as the paper compares: {np.mean(papers):.0%} fewer tokens "
        f"({', '.join(f'{share:.0%}' for share in papers)} by seed; 0 % where it does not get there)",
        "at equal learning rates: " + ", ".join(f"{lr:.0e} {np.mean(saved):.0%}" for lr, saved in equal.items()),
    ]
    difference = paired(papers, [0.0] * len(papers))
    enough = difference is not None and difference.p < SIGNIFICANT and difference.mean >= 0.35
    return Verdict(claim, SUPPORTED if enough else NOT_SUPPORTED, numbers)


def _reciprocal(found: Found) -> Verdict:
    claim = "Reciprocal clipping beats clipping to the mean and to the maximum."
    compared = {
        name: _compare(found, "test_loss", [(VARIANTS["Reciprocal"], VARIANTS[name])]) for name in ("Mean", "Max")
    }
    numbers = [
        f"test loss, reciprocal minus {name.lower()}: {difference.says(4)}"
        for name, difference in compared.items()
        if difference is not None
    ]
    if len(numbers) < len(compared):
        return Verdict(claim, NOT_TESTABLE, ["there are too few runs"])
    better = all(difference is not None and difference.below for difference in compared.values())
    return Verdict(claim, SUPPORTED if better else NOT_SUPPORTED, numbers)


def _best_of(name: str, settings: dict[str, Setting], claimed: str) -> Callable[[Found], Verdict]:
    def judge(found: Found) -> Verdict:
        claim = f"{name} = {claimed} is best."
        values = {label: _values(found, "train_loss", setting) for label, setting in settings.items()}
        if any(len(each) < LEAST_SEEDS for each in values.values()):
            return Verdict(claim, NOT_TESTABLE, ["there are too few runs"])
        means = {label: float(np.mean(list(each.values()))) for label, each in values.items()}
        order = sorted(means, key=means.__getitem__)
        rival = next(label for label in order if label != claimed)
        difference = _compare(found, "train_loss", [(settings[claimed], settings[rival])])
        assert difference is not None
        numbers = [
            "mean train loss: " + ", ".join(f"{label} {mean:.3f}" for label, mean in means.items()),
            f"{claimed} minus {rival}, the best of the others: {difference.says(4)}",
        ]
        return Verdict(claim, SUPPORTED if difference.below else NOT_SUPPORTED, numbers)

    return judge


def _normal(found: Found) -> Verdict:
    claim = "Gradient norms are about normally distributed in short windows."
    results: dict[str, list[float]] = {"norms": [], "log norms": []}
    for seed in found.seeds:
        if (run := found.runs.get((STRATEGIES["ZClip"], seed))) is not None:
            for window in norm_windows(run):
                sample = window_norms(run, *window)
                if len(sample) >= 3:
                    results["norms"].append(float(stats.shapiro(sample).pvalue))
                    results["log norms"].append(float(stats.shapiro(np.log(sample)).pvalue))
    if len(results["norms"]) < LEAST_SEEDS:
        return Verdict(claim, NOT_TESTABLE, ["there are too few runs"])
    rejected = {name: sum(p < SIGNIFICANT for p in each) for name, each in results.items()}
    numbers = [
        f"Shapiro-Wilk rejects a normal distribution of {name} in {rejected[name]} of {len(each)} windows (p < 0.05)"
        for name, each in results.items()
    ]
    few = rejected["norms"] <= REJECTED * len(results["norms"])
    return Verdict(claim, SUPPORTED if few else NOT_SUPPORTED, numbers)


def _overhead(found: Found) -> Verdict:
    claim = "The overhead is negligible."
    shares = {label: list(_values(found, "clip_share", setting).values()) for label, setting in STRATEGIES.items()}
    if any(len(each) < LEAST_SEEDS for each in (shares["ZClip"], shares["No clipping"])):
        return Verdict(claim, NOT_TESTABLE, ["there are too few runs"])
    extra = float(np.mean(shares["ZClip"]) - np.mean(shares["No clipping"]))
    numbers = [
        "share of a step that goes to clipping, the norm for the records included: "
        + ", ".join(f"{label} {np.mean(each):.2f} %" for label, each in shares.items() if each),
        f"ZClip takes {extra:+.2f} % of a step more than no clipping; below {NEGLIGIBLE:g} % counts as negligible",
    ]
    return Verdict(claim, SUPPORTED if extra < NEGLIGIBLE else NOT_SUPPORTED, numbers)


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
