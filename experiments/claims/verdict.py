"""Claims, and verdicts on them by where a confidence interval lies.

Each claim declares the smallest effect of interest, the least that would matter. Its verdict is by where the 95 %
confidence interval of the estimate lies. A claim that a number is larger is supported if the interval is above the
smallest effect, contradicted if it is below its negative, and there is no relevant effect if it is between both. A
claim that a number is at most so large is supported below and contradicted above. A claim that there is no difference
is supported between both and contradicted outside. Otherwise the claim is undecided. A claim of several comparisons
holds if each of them shows it, or any of them where it says so.

A verdict has a p-value, of the one-sided test that the number lies where the verdict says. The p-values of all testable
claims are corrected together by Holm's method. A claim whose corrected p-value is not below 0.05 is undecided, wherever
its interval lies; the evidence says what it would be by itself.

Runs of the same seed see the same batches, so runs are compared seed by seed, and a comparison needs three seeds with
all compared runs, on the same text. A diverged run is never excluded: it counts against its strategy, and if it is a
required reference, the claim is not testable. A claim is not decided while any of its runs is unfinished or excluded;
such runs, and seeds that were not run, are named.
"""

import math
import shlex
from collections.abc import Callable, Hashable, Mapping, Sequence, Sized
from typing import NamedTuple

from experiments.claims.numbers import Mean, Number, mean_of
from experiments.labs.statistics import MIN_SEEDS as MIN_SEEDS
from experiments.labs.statistics import SIGNIFICANT as SIGNIFICANT
from experiments.labs.statistics import holm
from experiments.run.collect import RunCollection, seeds_text
from experiments.run.read import Run

SUPPORTED, CONTRADICTED, NO_EFFECT = "supported", "contradicted", "no relevant effect"
UNDECIDED, NOT_TESTABLE = "undecided", "not testable"
#: All outcomes, in the order of reports.
OUTCOMES = (SUPPORTED, CONTRADICTED, NO_EFFECT, UNDECIDED, NOT_TESTABLE)

#: What a claim says of its number: it is above the smallest effect, below it, or within it on both sides.
ABOVE, BELOW, WITHIN = "above", "below", "within"

#: One-sided p below which a 95 % interval is beyond a bound.
BEYOND = 0.025

TOO_FEW_SEEDS = "it needs three seeds that have all the compared runs, and there are fewer"


class NotTestable(Exception):
    """The runs cannot test a claim; the message is the reason, and `evidence` has further sentences."""

    def __init__(self, reason: str, evidence: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.evidence = evidence


class SmallestEffect(NamedTuple):
    """The smallest effect of interest.

    Attributes:
        value: in `unit`, above 0.
        unit: such as "nats".
        why: a phrase on why less does not matter.
        decimals: of numbers in this unit.
        is_ratio: whether numbers are ratios. Then intervals and comparisons are those of their logarithms.
    """

    value: float
    unit: str
    why: str
    decimals: int = 3
    is_ratio: bool = False

    @property
    def bound(self) -> float:
        """The value on the scale of the numbers."""
        return math.log(self.value) if self.is_ratio else self.value

    def shown(self, number: float, sign: str = "") -> str:
        """Return a number of this unit as text, without the unit."""
        if math.isnan(number):
            return "unknown"
        if not math.isfinite(number):
            return "infinite" if number > 0 else "minus infinite"
        return f"{math.exp(number) if self.is_ratio else number:{'' if self.is_ratio else sign}.{self.decimals}f}"

    @property
    def text(self) -> str:
        """The value with its unit."""
        return f"{self.value:g} {self.unit.removesuffix('s') if self.value == 1 else self.unit}"


class Part(NamedTuple):
    """An estimate that a claim is about.

    Attributes:
        what: a phrase on what the number is.
        number: the number, on the scale of `smallest`.
        smallest: the smallest effect of interest.
    """

    what: str
    number: Number
    smallest: SmallestEffect

    @property
    def estimate(self) -> str:
        """The number with its unit."""
        return f"{self.smallest.shown(self.number.value, '+')} {self.smallest.unit}"

    @property
    def interval(self) -> str:
        """The 95 % interval, without the unit."""
        low, high = self.number.interval()
        return f"{self.smallest.shown(low)} to {self.smallest.shown(high)}"

    @property
    def text(self) -> str:
        """A sentence with the number, its interval and the number of seeds."""
        seeds = f", {self.number.seeds} seeds" if self.number.seeds else ""
        return f"{self.what}: {self.estimate} (95 %: {self.interval}{seeds})"


class Findings(NamedTuple):
    """What runs show of a claim.

    Attributes:
        parts: the estimates. A part that cannot be measured is left out, and `unmeasured` says why.
        evidence: further sentences.
        unmeasured: why a part is missing; empty if none is.
    """

    parts: Sequence[Part]
    evidence: Sequence[str] = ()
    unmeasured: str = ""


class Claim(NamedTuple):
    """A claim that runs can test.

    Attributes:
        text: a sentence.
        source: who claims it.
        asserts: `ABOVE`, `BELOW` or `WITHIN`.
        smallest: the smallest effects of interest; several if it has estimates in several units.
        experiments: the sets of runs that it needs, as `experiment=` names them.
        specs: these runs, with their labels.
        find: returns what the runs show; raises `NotTestable`.
        needs_all: whether each of several estimates must show it; otherwise any does.
    """

    text: str
    source: str
    asserts: str
    smallest: Sequence[SmallestEffect]
    experiments: Sequence[str]
    specs: Sequence[tuple[str, Hashable]]
    find: Callable[[RunCollection], Findings]
    needs_all: bool = True

    @property
    def rule(self) -> str:
        """A sentence on when it is supported."""
        limits = " and ".join(f"{each.text} ({each.why})" for each in self.smallest)
        where = {ABOVE: "above", BELOW: "below", WITHIN: "within plus and minus"}[self.asserts]
        many = {True: "", False: ", for any of its estimates"}[self.needs_all]
        return f"it is supported if the 95 % interval is {where} the smallest effect of interest: {limits}{many}"


class Verdict(NamedTuple):
    """What runs show about a claim.

    Attributes:
        claim: the claim.
        outcome: one of `OUTCOMES`.
        evidence: sentences with the numbers.
        part: the estimate that decides, or is nearest to deciding; `None` if the claim is not testable.
        p: p-value of the outcome to which the estimates point; `None` if the claim is not testable.
        corrected: the p-value corrected by Holm's method over all testable claims.
        scale: parameters, tokens and seeds of the runs.
        runs: names of their folders.
        command: trains them.
    """

    claim: Claim
    outcome: str
    evidence: Sequence[str]
    part: Part | None = None
    p: float | None = None
    corrected: float | None = None
    scale: str = ""
    runs: Sequence[str] = ()
    command: str = ""


def judge(claims: Sequence[Claim], collection: RunCollection, settings: Sequence[str] = ()) -> list[Verdict]:
    """Return the verdict on each claim, before the correction for the number of claims.

    `settings` are further words of the command that trains the runs, such as `scale=micro` and `seed=0,1,2`.
    """
    return [judge_claim(claim, collection, settings) for claim in claims]


def judge_claim(claim: Claim, collection: RunCollection, settings: Sequence[str] = ()) -> Verdict:
    """Return the verdict on one claim, as if it were the only one, with the runs that are missing."""
    specs = {spec for _, spec in claim.specs}
    incomplete = {spec for spec, _ in [*collection.unfinished, *collection.excluded]}
    runs = {key: run for key, run in collection.runs.items() if key[0] in specs}
    if specs & incomplete or runs:
        missing = collection.notes(claim.specs, with_diverged=False)
    else:
        missing = ["none of its runs has begun"]
    part, p = None, None
    try:
        texts = sorted({str(run.result.get("data_fingerprint")) for run in runs.values()})
        if len(texts) > 1:
            raise NotTestable(f"the runs are of different texts (fingerprints {' and '.join(texts)})")
        findings = claim.find(collection)
        outcome, p, lies_there, part = pointed_at(claim, findings.parts)
        p = 1.0 if math.isnan(p) else p
        evidence = [*(each.text for each in findings.parts), *findings.evidence, claim.rule]
        decides = SUPPORTED if not claim.needs_all else CONTRADICTED
        outcome = outcome if lies_there and p < SIGNIFICANT else UNDECIDED
        if findings.unmeasured and outcome != decides:
            raise NotTestable(findings.unmeasured, evidence)
        if outcome != UNDECIDED and specs & incomplete:
            raise NotTestable(f"{outcome}, but for runs that are unfinished or excluded", evidence)
    except NotTestable as reason:
        outcome, part, p = NOT_TESTABLE, None, None
        evidence = [str(reason), *reason.evidence]
    return Verdict(
        claim,
        outcome,
        [*evidence, *missing],
        part,
        p,
        p,
        scale_text([*runs.values()], sorted({seed for _, seed in runs})),
        sorted({run.path.name for run in runs.values()}),
        train_command(claim.experiments, settings),
    )


def pointed_at(claim: Claim, parts: Sequence[Part]) -> tuple[str, float, bool, Part | None]:
    """Return the outcome to which the estimates point, its p-value, whether intervals lie there, and the part of p."""
    if not parts:
        return UNDECIDED, 1.0, False, None
    found = [(*_outcome(claim.asserts, part), part) for part in parts]
    decides, rest = (CONTRADICTED, SUPPORTED) if claim.needs_all else (SUPPORTED, CONTRADICTED)
    if deciding := [each for each in found if each[0] == decides]:
        outcome, p, part = min(deciding, key=lambda each: each[1])
        return outcome, min(1.0, len(parts) * p), p < BEYOND, part
    if all(outcome == rest for outcome, _, _ in found):
        outcome, p, part = max(found, key=lambda each: each[1])
        return outcome, p, p < BEYOND, part
    # No part decides, and one or more have no relevant effect: then no part may be beyond on the deciding side.
    inside = [_not_beyond(part, claim.needs_all) for part in parts]
    _, p, part = max((each for each in found if each[0] == NO_EFFECT), key=lambda each: each[1])
    p = max([p, *inside])
    return NO_EFFECT, p, p < BEYOND, part


def _outcome(asserts: str, part: Part) -> tuple[str, float]:
    """Return the outcome to which one estimate points, and its p-value."""
    number, bound = part.number, part.smallest.bound
    if asserts == BELOW:
        return (SUPPORTED, number.below(bound)) if number.value < bound else (CONTRADICTED, number.above(bound))
    if number.value > bound:
        return (SUPPORTED if asserts == ABOVE else CONTRADICTED), number.above(bound)
    if number.value < -bound:
        return CONTRADICTED, number.below(-bound)
    return (SUPPORTED if asserts == WITHIN else NO_EFFECT), max(number.above(-bound), number.below(bound))


def _not_beyond(part: Part, is_low: bool) -> float:
    """Return the p-value of an estimate's being not beyond the smallest effect, on the low or the high side."""
    bound = part.smallest.bound
    return part.number.above(-bound) if is_low else part.number.below(bound)


def corrected(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts with p-values corrected by Holm's method over all testable claims.

    A claim whose corrected p-value is not below 0.05 is undecided.
    """
    tested = [verdict.p for verdict in verdicts if verdict.p is not None]
    values = iter(holm(tested))
    result = []
    for verdict in verdicts:
        if verdict.p is None:
            result.append(verdict)
            continue
        p, evidence, outcome = next(values), list(verdict.evidence), verdict.outcome
        if outcome != UNDECIDED and p >= SIGNIFICANT:
            evidence.append(
                f"by itself it would be {outcome} (p = {verdict.p:.2g}), but not among {len(tested)} testable claims "
                f"(corrected p = {p:.2g})"
            )
            outcome = UNDECIDED
        result.append(verdict._replace(outcome=outcome, corrected=p, evidence=evidence))
    return result


def train_command(experiments: Sequence[str], settings: Sequence[str]) -> str:
    """Return the command that trains sets of runs, as a shell takes it; `settings` are further words."""
    names = experiments[0] if len(experiments) == 1 else f"[{','.join(experiments)}]"
    return shlex.join(["python", "train.py", "-m", f"experiment={names}", *settings])


def scale_text(runs: Sequence[Run], seeds: Sequence[int]) -> str:
    """Return a phrase on parameters, tokens and seeds of runs; empty without runs."""
    if not runs:
        return ""
    parameters, tokens = (
        " and ".join(short(number) for number in sorted({run.result[key] for run in runs if run.result.get(key)}))
        for key in ("parameters", "tokens")
    )
    return f"{parameters or 'unknown'} parameters, {tokens or 'unknown'} tokens, {seeds_text(seeds)}"


def short(number: float) -> str:
    """Format a number of parameters or tokens like `287k`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if float(f"{number:.3g}") >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def require_seeds(values: Sized) -> None:
    """Raise `NotTestable` if there are fewer values, one for each seed, than a comparison needs."""
    if len(values) < MIN_SEEDS:
        raise NotTestable(TOO_FEW_SEEDS)


def difference_by_seed(one: Mapping[int, float], other: Mapping[int, float] | None = None) -> Mean:
    """Return the mean difference of numbers by seed, or from zero, over the seeds that both have.

    Raises `NotTestable` if there are fewer than three seeds.
    """
    if other is None:
        other = dict.fromkeys(one, 0.0)
    differences = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    require_seeds(differences)
    return mean_of(differences)
