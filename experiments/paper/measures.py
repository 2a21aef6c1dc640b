"""The numbers of a run that tables show, by the names that suites use."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.run.definitions import (
    DIVERGED,
    EXCESS_WINDOW,
    REACHED_WINDOW,
    RECOVERED,
    RECOVERED_WINDOW,
    SCORE_MIN_STEPS,
    SCORE_SIGMAS,
    SCORE_WINDOW,
    SLOPE_WINDOW,
    SPIKE_SIGMAS,
    SPIKE_WINDOW,
    corrupted_spans,
    excess_loss,
    loss_spikes,
    recovery_steps,
    skip_cost,
    spike_score,
    tokens_to_reach,
)
from experiments.run.read import Run, corrupted_rows, corrupted_steps, without_corrupted


class Reached(NamedTuple):
    """When a run reaches the final loss of a reference run.

    Attributes:
        loss: nats, mean of the reference run's last 20 steps.
        reference_tokens: tokens after which the reference run first reaches it, possibly before its end.
        tokens: tokens after which the run reaches it; `None` if it never does.
        final_difference: the run's own final loss minus `loss`, in nats.
    """

    loss: float
    reference_tokens: float
    tokens: float | None
    final_difference: float

    @property
    def saved(self) -> float:
        """Fraction of tokens that the run saves; 0 if it reaches the loss later, or never."""
        return 0.0 if self.tokens is None else max(0.0, 1 - self.tokens / self.reference_tokens)

    @property
    def saved_text(self) -> str:
        """The fraction as printed."""
        return "never" if self.tokens is None else f"{self.saved:.0%}"


def reach_final_loss(reference: Run, run: Run) -> Reached:
    """Find when a run reaches the final loss of a reference run. Losses at corrupted batches are interpolated."""
    reference_loss, loss = without_corrupted(reference, "loss"), without_corrupted(run, "loss")
    target = float(reference_loss[-REACHED_WINDOW:].mean())
    first = tokens_to_reach(reference_loss, reference.metrics["tokens"], target)
    tokens = tokens_to_reach(loss, run.metrics["tokens"], target)
    final_difference = float(loss[-REACHED_WINDOW:].mean()) - target
    return Reached(target, reference.metrics["tokens"][-1] if first is None else first, tokens, final_difference)


#: Computes a number from a run and its baseline run: `None` if it is unknown, not finite if it depends on losses that
#: are not finite.
Compute = Callable[[Run, Run | None], float | None]


class Measure(NamedTuple):
    """A number of a run.

    Attributes:
        compute: computes it for a finished run.
        decimals: to print.
        better: `low` or `high`; empty if neither is better.
        note: definition for the footnote; empty if the name says it.
        needs_baseline: whether the baseline run is needed: the same run without corrupted batches.
    """

    compute: Compute
    decimals: int
    better: str = ""
    note: str = ""
    needs_baseline: bool = False


def _result(key: str, scale: float = 1.0) -> Compute:
    def compute(run: Run, _: Run | None) -> float | None:
        value = run.result.get(key)
        return None if value is None else scale * value

    return compute


def _score(task: str, metric: str) -> Compute:
    def compute(run: Run, _: Run | None) -> float | None:
        value = (run.score(task) or {}).get(metric)
        return None if value is None else 100 * value

    return compute


def clip_and_step_seconds(run: Run) -> tuple[float, float] | None:
    """Return the seconds that the median step spends on clipping, and in all; `None` if unknown."""
    seconds = run.result.get("step_seconds") or {}
    total = sum(value for value in seconds.values() if value is not None)
    return (seconds["clip"], total) if seconds.get("clip") is not None and total > 0 else None


def _clip_share(run: Run, _: Run | None) -> float | None:
    """Return the percentage of the median step's time that is spent on clipping."""
    return None if (seconds := clip_and_step_seconds(run)) is None else 100 * seconds[0] / seconds[1]


def _step_share(column: str) -> Compute:
    """Compute the percentage of steps at which a column is above 0, corrupted batches excluded."""

    def compute(run: Run, _: Run | None) -> float | None:
        if column not in run.metrics:
            return None
        positive = (run.metrics[column] > 0) & np.isfinite(run.metrics["grad_norm"])
        positive = np.delete(positive, sorted(corrupted_rows(run)))
        return 100 * float(np.mean(positive)) if len(positive) else None

    return compute


def _against_baseline(function: Callable[[np.ndarray, np.ndarray, set[int]], float]) -> Compute:
    def compute(run: Run, baseline: Run | None) -> float | None:
        corrupted = corrupted_rows(run)
        if baseline is None or not corrupted_spans(corrupted, len(run.metrics["loss"])):
            return None
        return function(run.metrics["loss"], baseline.metrics["loss"], corrupted)

    return compute


def _spikes(run: Run, _: Run | None) -> float | None:
    """Return the number of loss spikes; `None` for a run that is too short to have one."""
    loss, corrupted = run.metrics["loss"], corrupted_rows(run)
    return float(len(loss_spikes(loss, corrupted))) if len(loss) - len(corrupted) > SPIKE_WINDOW else None


def _test_loss_increase(run: Run, baseline: Run | None) -> float | None:
    if baseline is None or not corrupted_steps(run):
        return None
    loss, baseline_loss = (each.result.get("test_loss") for each in (run, baseline))
    return None if loss is None or baseline_loss is None else loss - baseline_loss


MEASURES = {
    "train_loss": Measure(
        _result("train_loss"),
        3,
        "low",
        "the train loss is the mean of the last tenth of the steps, corrupted batches excluded",
    ),
    "test_loss": Measure(_result("test_loss"), 3, "low", "the test loss is measured on held-out documents"),
    "spikes": Measure(
        _spikes,
        1,
        "low",
        f"a spike is a loss that is not finite or {SPIKE_SIGMAS:g} robust standard deviations above the median of "
        f"the last {SPIKE_WINDOW} normal steps, for any number of consecutive steps; corrupted batches are not "
        f"counted; in the first {SPIKE_WINDOW} steps only a loss that is not finite is a spike; noise makes spikes "
        "too, and verdicts count only the excess of spikes over dips",
    ),
    "spike_score": Measure(
        lambda run, _: 100 * spike_score(run.metrics["loss"], corrupted_rows(run)),
        2,
        "low",
        f"the spike score is OLMo 2's: the share of losses at least {SCORE_SIGMAS:g} standard deviations from the mean "
        f"of the last {SCORE_WINDOW:,} steps (of all earlier steps if there are fewer, from {SCORE_MIN_STEPS})",
    ),
    "hellaswag": Measure(_score("hellaswag", "acc_norm"), 2, "high", "HellaSwag is normalised by length (acc_norm)"),
    "winogrande": Measure(_score("winogrande", "acc"), 2, "high"),
    "tokens_per_hour": Measure(_result("tokens_per_second", 3600 / 1e6), 2, note="speeds are those of the median step"),
    "clip_share": Measure(
        _clip_share, 2, note="clipping includes computing the norm, which runs without clipping compute too"
    ),
    "clipped_by_z": Measure(_step_share("spike"), 1, note="corrupted batches are excluded"),
    "clipped": Measure(_step_share("clipped"), 1, note="clipped at all includes clipping by max_grad_norm"),
    "excess_loss": Measure(
        _against_baseline(excess_loss),
        3,
        "low",
        f"the excess loss is the loss minus the baseline run's, averaged over {EXCESS_WINDOW} steps after a corrupted "
        "batch, and includes the remaining effect of earlier ones; a run whose losses are not finite there counts as "
        "diverged",
        needs_baseline=True,
    ),
    "skip_cost": Measure(
        _against_baseline(lambda _, baseline, corrupted: skip_cost(baseline, corrupted)),
        3,
        note="the cost of skipping is the excess loss of a run that skips the corrupted batches and so learns from "
        f"fewer, by the slope of the baseline run's loss over {SLOPE_WINDOW} steps",
        needs_baseline=True,
    ),
    "recovery_steps": Measure(
        _against_baseline(recovery_steps),
        1,
        "low",
        f"a run has recovered where the mean of {RECOVERED_WINDOW} losses is within {RECOVERED:g} nats of the "
        "baseline run's; if it has not by the next corrupted batch, or the end, all steps until then count",
        needs_baseline=True,
    ),
    "test_loss_increase": Measure(_test_loss_increase, 3, "low", needs_baseline=True),
}

#: Footnote of tables with a diverged run.
DIVERGED_NOTE = (
    f"a run has diverged if its loss is not finite at the end, or {DIVERGED:g} nats above its lowest level (means over "
    "a tenth of the steps)"
)
