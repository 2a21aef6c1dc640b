"""The numbers of a run that stand in tables, by the names that the catalogue uses."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.run.definitions import (
    DIVERGED,
    EXCURSION,
    REACHED_WINDOW,
    RECOVERED,
    RECOVERED_WINDOW,
    SCORE_LEAST,
    SCORE_SIGMAS,
    SCORE_WINDOW,
    SLOPE_WINDOW,
    SPIKE_SIGMAS,
    SPIKE_WINDOW,
    excursion,
    followed,
    loss_spikes,
    lost_batches,
    recovery,
    spike_score,
    tokens_to_reach,
)
from experiments.run.read import Run, corrupted_rows, corrupted_steps, without_corrupted


class Reached(NamedTuple):
    """Where a run is at the loss that another ends with.

    Attributes:
        loss: nats, the mean of the other's last 20 steps.
        itself: tokens after which the other is there for the first time, which can be before its end.
        tokens: after which the run is; `None` if it never is.
        above: nats by which the run's own last loss is above.
    """

    loss: float
    itself: float
    tokens: float | None
    above: float

    @property
    def saved(self) -> float:
        """Share of tokens that the run saves; 0 if it is there later, or never."""
        return 0.0 if self.tokens is None else max(0.0, 1 - self.tokens / self.itself)

    def says(self) -> str:
        """Return the share as printed."""
        return "never" if self.tokens is None else f"{self.saved:.0%}"


def last_loss_reached(other: Run, run: Run) -> Reached:
    """Find where a run is at the loss that another ends with; see `definitions.tokens_to_reach`.

    Losses at bad batches are taken from the steps around them. If the other's loss is not finite at its end, so is
    the loss to reach, and nothing is saved.
    """
    loss, tokens = without_corrupted(other, "loss"), other.metrics["tokens"]
    end = float(loss[-REACHED_WINDOW:].mean())
    itself = tokens_to_reach(loss, tokens, end)
    own = without_corrupted(run, "loss")
    there = tokens_to_reach(own, run.metrics["tokens"], end)
    above = float(own[-REACHED_WINDOW:].mean()) - end
    return Reached(end, float(tokens[-1]) if itself is None else itself, there, above)


class Measure(NamedTuple):
    """A number of a run.

    Attributes:
        of: finds it in a run that is done; of some, the undisturbed run is needed too. `None` where it is not known,
            not finite where losses that it is made of are not.
        decimals: to print.
        better: `low` or `high`; empty where neither is.
        says: what it is, if its name does not say it.
        beside: whether the undisturbed run is needed.
    """

    of: Callable[[Run, Run | None], float | None]
    decimals: int
    better: str
    says: str = ""
    beside: bool = False


def _result(key: str, times: float = 1.0) -> Callable[[Run, Run | None], float | None]:
    def find(run: Run, _: Run | None) -> float | None:
        value = (run.result or {}).get(key)
        return None if value is None else times * value

    return find


def _score(task: str, metric: str) -> Callable[[Run, Run | None], float | None]:
    def find(run: Run, _: Run | None) -> float | None:
        score = run.score(task)
        return None if score is None or score.get(metric) is None else 100 * score[metric]

    return find


def clip_and_step(run: Run) -> tuple[float, float] | None:
    """Return the seconds of the median step that clipping takes, and those of the step; `None` if not known."""
    seconds = (run.result or {}).get("step_seconds") or {}
    whole = sum(value for value in seconds.values() if value is not None)
    return (seconds["clip"], whole) if seconds.get("clip") is not None and whole > 0 else None


def _clip_share(run: Run, _: Run | None) -> float | None:
    """Return the percentage of the median step's time that clipping takes."""
    return None if (spent := clip_and_step(run)) is None else 100 * spent[0] / spent[1]


def _share(column: str) -> Callable[[Run, Run | None], float | None]:
    """Find the percentage of steps at which a column is above 0, bad batches that were put in left out."""

    def find(run: Run, _: Run | None) -> float | None:
        if column not in run.metrics:
            return None
        there = (run.metrics[column] > 0) & np.isfinite(run.metrics["grad_norm"])
        kept = np.delete(there, sorted(corrupted_rows(run)))
        return 100 * float(np.mean(kept)) if len(kept) else None

    return find


def _beside(
    function: Callable[[np.ndarray, np.ndarray, set[int]], float],
) -> Callable[[Run, Run | None], float | None]:
    def find(run: Run, undisturbed: Run | None) -> float | None:
        bad = corrupted_rows(run)
        if undisturbed is None or not followed(bad, len(run.metrics["loss"])):
            return None
        return function(run.metrics["loss"], undisturbed.metrics["loss"], bad)

    return find


def _spikes(run: Run, _: Run | None) -> float | None:
    """Return the number of loss spikes; `None` for a run too short to have one."""
    loss, bad = run.metrics["loss"], corrupted_rows(run)
    return float(len(loss_spikes(loss, bad))) if len(loss) - len(bad) > SPIKE_WINDOW else None


def _lost(run: Run, undisturbed: Run | None) -> float | None:
    if undisturbed is None or not corrupted_steps(run):
        return None
    own, other = ((each.result or {}).get("test_loss") for each in (run, undisturbed))
    return None if own is None or other is None else own - other


MEASURES = {
    "train_loss": Measure(
        _result("train_loss"),
        3,
        "low",
        "the train loss is the mean of the last tenth of the steps, bad batches left out",
    ),
    "test_loss": Measure(_result("test_loss"), 3, "low", "the test loss is that of held-out documents"),
    "spikes": Measure(
        _spikes,
        1,
        "low",
        f"a spike is a loss that is not finite or {SPIKE_SIGMAS:g} robust standard deviations above the median of "
        f"the last {SPIKE_WINDOW} normal steps, for any number of steps in a row, bad batches themselves not counted; "
        f"in the first {SPIKE_WINDOW} steps only what is not finite; noise makes some too, and verdicts count those "
        "beyond as many dips",
    ),
    "spike_score": Measure(
        lambda run, _: 100 * spike_score(run.metrics["loss"], corrupted_rows(run)),
        2,
        "low",
        f"the spike score is OLMo 2's, the share of losses at least {SCORE_SIGMAS:g} standard deviations from the mean "
        f"of the last {SCORE_WINDOW:,} steps (of as many as there are, from {SCORE_LEAST})",
    ),
    "hellaswag": Measure(_score("hellaswag", "acc_norm"), 2, "high", "HellaSwag is normalised by length (acc_norm)"),
    "winogrande": Measure(_score("winogrande", "acc"), 2, "high"),
    "tokens_per_hour": Measure(_result("tokens_per_second", 3600 / 1e6), 2, "", "speeds are those of the median step"),
    "clip_share": Measure(_clip_share, 2, "", "clipping includes finding the norm, as runs without clipping do too"),
    "clipped_by_z": Measure(_share("spike"), 1, "", "bad batches that were put in are left out"),
    "clipped": Measure(_share("clipped"), 1, "", "clipped at all counts max_grad_norm too"),
    "excursion": Measure(
        _beside(excursion),
        3,
        "low",
        f"the excursion is the mean of the loss above the undisturbed run's over {EXCURSION} steps after a bad "
        "batch, with what earlier ones have left; where losses are not finite the run counts as diverged",
        beside=True,
    ),
    "lost_batches": Measure(
        _beside(lambda _, undisturbed, bad: lost_batches(undisturbed, bad)),
        3,
        "",
        "ignoring bad batches would cost what is learnt from as many others, by the slope of the undisturbed loss over "
        f"{SLOPE_WINDOW} steps",
        beside=True,
    ),
    "recovery": Measure(
        _beside(recovery),
        1,
        "low",
        f"a run has recovered where the mean of {RECOVERED_WINDOW} losses is within {RECOVERED:g} nats of the "
        "undisturbed run's; one that has not by the next bad batch, or the end, counts with all steps until then",
        beside=True,
    ),
    "lost": Measure(_lost, 3, "low", beside=True),
}

#: For the line below tables with a diverged run.
DIVERGED_SAYS = (
    f"a run has diverged whose loss is not finite at its end, or {DIVERGED:g} nats above the lowest it has been "
    "(means of a tenth of the steps)"
)
