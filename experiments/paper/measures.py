"""The numbers of a run that tables show, by the names that suites use."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np

from experiments.run import definitions
from experiments.run.read import Run, corrupted_rows, corrupted_steps, without_corrupted


class Reached(NamedTuple):
    """When a run reaches the final loss of a reference run."""

    loss: float  # nats, mean of the reference run's last 20 steps
    reference_tokens: float  # after which the reference run first reaches it, possibly before its end
    tokens: float | None  # after which the run reaches it; `None` if it never does
    final_difference: float  # the run's own final loss minus `loss`, in nats

    @property
    def saved(self) -> float:
        """Fraction of tokens that the run saves; 0 if it reaches the loss later, or never."""
        return 0.0 if self.tokens is None else max(0.0, 1 - self.tokens / self.reference_tokens)


def reach_final_loss(reference: Run, run: Run) -> Reached:
    """Find when a run reaches the final loss of a reference run. Losses at corrupted batches are interpolated."""
    reference_loss, loss = without_corrupted(reference, "loss"), without_corrupted(run, "loss")
    target = float(reference_loss[-definitions.REACHED_WINDOW :].mean())
    first = definitions.tokens_to_reach(reference_loss, reference.metrics["tokens"], target)
    tokens = definitions.tokens_to_reach(loss, run.metrics["tokens"], target)
    final_difference = float(loss[-definitions.REACHED_WINDOW :].mean()) - target
    return Reached(target, reference.metrics["tokens"][-1] if first is None else first, tokens, final_difference)


#: Computes a number from a run and its baseline run: `None` if it is unknown, not finite if it depends on losses that
#: are not finite.
Compute = Callable[[Run, Run | None], float | None]


class Task(NamedTuple):
    """A task, and what tables show of it."""

    task: str  # as printed
    metric: str  # that tables show


#: The paper's tasks, by their measures. A small model can only guess in them.
GUESSED_TASKS = {"hellaswag": Task("HellaSwag", "acc_norm"), "winogrande": Task("WinoGrande", "acc")}
#: Scales whose models only guess in these tasks.
GUESSING_SCALES = {"micro"}


def guessed_measures(runs: Iterable[Run]) -> frozenset[str]:
    """Return the measures that differ between these runs by chance alone: those of the tasks at a small scale."""
    is_guessed = any(run.config["paper"]["scale"] in GUESSING_SCALES for run in runs)
    return frozenset(GUESSED_TASKS) if is_guessed else frozenset()


class Measure(NamedTuple):
    """A number of a run."""

    compute: Compute
    decimals: int  # to print
    better: str = ""  # `low` or `high`; empty if neither is better
    note: str = ""  # definition for the footnote; empty if the name says it
    needs_baseline: bool = False  # the same run without corrupted batches


def _result(key: str, run: Run, _: Run | None, scale: float = 1.0) -> float | None:
    value = run.result.get(key)
    return None if value is None else scale * value


def _score(task: str, metric: str, run: Run, _: Run | None, scale: float = 100.0) -> float | None:
    value = (run.score(task) or {}).get(metric)
    return None if value is None else scale * value


def clip_and_step_seconds(run: Run) -> tuple[float, float] | None:
    """Return the seconds that the median step spends on clipping, and in all; `None` if unknown."""
    seconds = run.result.get("step_seconds") or {}
    total = sum(value for value in seconds.values() if value is not None)
    return (seconds["clip"], total) if seconds.get("clip") is not None and total > 0 else None


def _clip_share(run: Run, _: Run | None) -> float | None:
    """Return the percentage of the median step's time that is spent on clipping."""
    return None if (seconds := clip_and_step_seconds(run)) is None else 100 * seconds[0] / seconds[1]


def _step_share(column: str, run: Run, _: Run | None) -> float | None:
    """Return the percentage of steps at which a column is above 0, corrupted batches excluded."""
    if column not in run.metrics:
        return None
    positive = (run.metrics[column] > 0) & np.isfinite(run.metrics["grad_norm"])
    positive = np.delete(positive, sorted(corrupted_rows(run)))
    return 100 * float(np.mean(positive)) if len(positive) else None


def _against_baseline(
    function: Callable[[np.ndarray, np.ndarray, set[int]], float], run: Run, baseline: Run | None
) -> float | None:
    loss, corrupted = run.metrics["loss"], corrupted_rows(run)
    if baseline is None or not definitions.corrupted_spans(corrupted, len(loss)):
        return None
    return function(loss, baseline.metrics["loss"], corrupted)


def _spikes(run: Run, _: Run | None) -> float | None:
    """Return the number of loss spikes; `None` for a run that is too short to have one."""
    loss, corrupted = run.metrics["loss"], corrupted_rows(run)
    is_long = len(loss) - len(corrupted) > definitions.SPIKE_WINDOW
    return float(len(definitions.loss_spikes(loss, corrupted))) if is_long else None


def _test_loss_increase(run: Run, baseline: Run | None) -> float | None:
    if baseline is None or not corrupted_steps(run):
        return None
    loss, baseline_loss = (each.result.get("test_loss") for each in (run, baseline))
    return None if loss is None or baseline_loss is None else loss - baseline_loss


MEASURES = {
    "train_loss": Measure(
        partial(_result, "train_loss"),
        3,
        "low",
        "the train loss is the mean of the last tenth of the steps, corrupted batches excluded",
    ),
    "test_loss": Measure(partial(_result, "test_loss"), 3, "low", "the test loss is measured on held-out documents"),
    "spikes": Measure(
        _spikes,
        1,
        "low",
        f"a spike is a loss that is not finite, or {definitions.SPIKE_SIGMAS:g} robust standard deviations above the "
        f"median of the last {definitions.SPIKE_WINDOW} normal steps. Several such steps in a row are one spike. "
        f"Corrupted batches are not counted. In the first {definitions.SPIKE_WINDOW} steps only a loss that is not "
        "finite is a spike. Noise makes spikes too, so verdicts count only the excess of spikes over dips",
    ),
    "spike_score": Measure(
        lambda run, _: 100 * definitions.spike_score(run.metrics["loss"], corrupted_rows(run)),
        2,
        "low",
        f"the spike score is OLMo 2's: the share of losses at least {definitions.SCORE_SIGMAS:g} standard deviations "
        f"from the mean of the last {definitions.SCORE_WINDOW:,} steps. If there are fewer, it is the mean of all "
        f"earlier steps, of which there must be {definitions.SCORE_MIN_STEPS}",
    ),
    "bits_per_byte": Measure(
        partial(_result, "test_bits_per_byte"),
        3,
        "low",
        "bits per byte are the test loss in bits, for each byte of the text",
    ),
    "last_word": Measure(
        partial(_score, "last_word", "loss", scale=1.0),
        3,
        "low",
        "the last-word loss is that of the last word of held-out passages, in nats for the whole word",
    ),
    "hellaswag": Measure(
        partial(_score, "hellaswag", "acc_norm"), 2, "high", "HellaSwag is normalised by length (acc_norm)"
    ),
    "winogrande": Measure(partial(_score, "winogrande", "acc"), 2, "high"),
    "tokens_per_hour": Measure(
        partial(_result, "tokens_per_second", scale=3600 / 1e6), 2, note="speeds are those of the median step"
    ),
    "clip_share": Measure(
        _clip_share, 2, note="clipping includes computing the norm, which runs without clipping compute too"
    ),
    "clipped_by_z": Measure(partial(_step_share, "spike"), 1, note="corrupted batches are excluded"),
    "clipped": Measure(partial(_step_share, "clipped"), 1, note="clipped at all includes clipping by max_grad_norm"),
    "excess_loss": Measure(
        partial(_against_baseline, definitions.excess_loss),
        3,
        "low",
        f"the excess loss is the loss minus the baseline run's, averaged over {definitions.EXCESS_WINDOW} steps after "
        "a corrupted batch. It includes the remaining effect of earlier ones. A run whose losses are not finite there "
        "counts as diverged",
        needs_baseline=True,
    ),
    "skip_cost": Measure(
        partial(_against_baseline, lambda _, baseline, corrupted: definitions.skip_cost(baseline, corrupted)),
        3,
        note="the cost of skipping is the excess loss of a run that skips the corrupted batches, because it learns "
        f"from fewer. It follows from the slope of the baseline run's loss over {definitions.SLOPE_WINDOW} steps",
        needs_baseline=True,
    ),
    "recovery_steps": Measure(
        partial(_against_baseline, definitions.recovery_steps),
        1,
        "low",
        f"a run has recovered where the mean of {definitions.RECOVERED_WINDOW} losses is within "
        f"{definitions.RECOVERED:g} nats of the baseline run's. If it has not by the next corrupted batch, or the end, "
        "all steps until then count",
        needs_baseline=True,
    ),
    "test_loss_increase": Measure(_test_loss_increase, 3, "low", needs_baseline=True),
}

#: Footnote of tables with a diverged run.
DIVERGED_NOTE = (
    f"a run has diverged if its loss is not finite at the end, or {definitions.DIVERGED:g} nats above its lowest level "
    "(means over a tenth of the steps)"
)
