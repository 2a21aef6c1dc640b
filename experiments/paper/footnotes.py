"""Footnotes of tables: the runs, the definitions of their numbers, and missing runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.claims.verdict import short
from experiments.paper.measures import DIVERGED_NOTE, GUESSED_TASKS, MEASURES, guessed_measures
from experiments.paper.tables_and_figures import Table
from experiments.run.collect import RunCollection, seeds_text
from experiments.run.definitions import min_spike_height, recovery_steps
from experiments.run.read import Run, corrupted_rows, corrupted_steps


def table_notes(table: Table, collection: RunCollection, seeds: Sequence[int]) -> list[str]:
    """Return the notes below a table, without a period each; `seeds` are those of its finished runs."""
    specs = {spec for _, spec in table.labelled_specs()}
    runs = [run for (spec, _), run in collection.runs.items() if spec in specs]
    missing = collection.notes(table.labelled_specs())
    if not runs:
        return ["no run of this table is finished", *missing]
    measures = {column.measure: MEASURES[column.measure] for column in table.columns}
    notes = [describe_runs(runs, seeds), table.note, *(measure.note for measure in measures.values())]
    if "spikes" in measures:
        heights = [min_spike_height(run.metrics["loss"], corrupted_rows(run)) for run in runs]
        if not np.isnan(heights).all():
            notes.append(f"at the median step of these runs, a spike is a jump by {np.nanmedian(heights):.2f} nats")
    if "hellaswag" in measures:
        notes += _describe_scores(runs)
    if any(spec in specs for spec, _ in collection.diverged):
        notes.append(DIVERGED_NOTE)
    if "recovery_steps" in measures and (corrupted := [run for run in runs if corrupted_rows(run)]):
        never = np.full(len(corrupted[0].metrics["step"]), np.inf)
        longest = recovery_steps(never, np.zeros(1), corrupted_rows(corrupted[0]))
        notes.append(f"a run that never recovers has {longest:.{measures['recovery_steps'].decimals}f} steps")
    if any(measure.better for measure in measures.values()):
        but = ". Scores at chance are not" if measures.keys() & guessed_measures(runs) else ""
        notes.append(f"the best numbers are in bold, whatever their error{but}")
    if len(seeds) > 1:
        notes.append("± is the standard deviation over seeds")
    return [note for note in notes if note] + missing


def describe_runs(runs: Sequence[Run], seeds: Sequence[int]) -> str:
    """Return a phrase with scale, model, tokens, seeds, text, learning rate, corrupted batches and commit of runs."""
    starts = [start for run in runs for start in run.starts]
    commits = sorted({str(start.get("commit"))[:8] for start in starts}) or ["not known"]
    changed = " with uncommitted changes" if any(start.get("uncommitted_changes") for start in starts) else ""
    parts = [
        f"{_joined(run.config['paper']['scale'] for run in runs)} scale",
        f"model {_joined(run.config['model']['name'] for run in runs)} "
        f"({_joined(sorted({short(run.result['parameters']) for run in runs}))} parameters)",
        f"{_joined(sorted({short(run.result['tokens']) for run in runs}))} tokens",
        seeds_text(seeds),
        f"text {_joined(run.config['data']['name'] for run in runs)} "
        f"(fingerprint {_joined(sorted({run.result['data_fingerprint'] for run in runs}))})",
        *_describe_rates(runs),
        *_describe_corruption(runs),
        *_describe_recovery(runs),
        f"commit {_joined(commits)}{changed}",
    ]
    return ", ".join(parts)


def _joined(values: Iterable[object]) -> str:
    return " and ".join(map(str, dict.fromkeys(values)))


def _describe_rates(runs: Sequence[Run]) -> list[str]:
    scales = {run.config["paper"]["lr_scale"] for run in runs}
    rates = {float(run.config["paper"]["lr"]) for run in runs}
    if len(rates) == len(scales) == 1:
        rate, scale = rates.pop(), scales.pop()
        return [f"learning rate {rate:g} in the paper" + (f", here {rate * scale:g}" if scale != 1 else "")]
    return [f"learning rates {scale:g} times the paper's, which are named" for scale in sorted(scales) if scale != 1]


def _describe_corruption(runs: Sequence[Run]) -> list[str]:
    corruptions = {
        (run.config["data"]["corruption"]["kind"], *corrupted_steps(run)) for run in runs if corrupted_steps(run)
    }
    parts = [
        f"corrupted batches of kind {kind} injected at steps {', '.join(map(str, steps))}"
        for kind, *steps in sorted(corruptions)
    ]
    is_everywhere = all(corrupted_steps(run) for run in runs)
    return parts if is_everywhere or not parts else [*parts, "none in the baseline runs"]


def _describe_recovery(runs: Sequence[Run]) -> list[str]:
    recovering = [window for run in runs if (window := run.config["clip"].get("recovery_window")) is not None]
    share = f" in {len(recovering)} of the {len(runs)} runs" if len(recovering) < len(runs) else ""
    return [
        f"ZClip with recovery (the library's default, not in the paper) in windows of {window} steps{share}"
        for window in sorted({str(window) for window in recovering})
    ]


def _describe_scores(runs: Sequence[Run]) -> list[str]:
    """Return notes on the items behind the scores, their standard errors, chance, and the truncated share."""
    items, errors = [], []
    for name, (task, metric) in GUESSED_TASKS.items():
        if scores := _scores(runs, name):
            items.append(f"{task} on {_counts(scores)} items")
            errors += [100 * error for error in _errors(scores, metric)]
    phrases = []
    if errors and guessed_measures(runs):
        phrases.append(
            "at this scale HellaSwag and WinoGrande are at chance, 25 and 50, with a standard error of up to "
            f"{max(errors):.1f}. Their differences mean nothing"
        )
    elif errors:
        phrases.append(f"the standard error of these scores is up to {max(errors):.1f}, and chance is 25 and 50")
    if scores := _scores(runs, "last_word"):
        items.append(f"the last word of {_counts(scores)} passages")
        if errors := _errors(scores, "loss"):
            phrases.append(
                f"the last-word loss has a standard error of up to {max(errors):.3f}. Most of it is that of the "
                "passages, which are the same for all runs"
            )
    if not items:
        return ["the tasks were not scored"]
    share = max((score.get("truncated_fraction") or 0.0 for run in runs for score in run.scores), default=0.0)
    if share >= 0.005:
        phrases.append(f"up to {share:.0%} of the texts are longer than the context, and are truncated")
    return [f"scored: {', '.join(items)}", *phrases]


def _scores(runs: Sequence[Run], task: str) -> list[dict[str, Any]]:
    return [score for run in runs if (score := run.score(task)) is not None]


def _counts(scores: Sequence[Mapping[str, Any]]) -> str:
    return " or ".join(f"{count:,}" for count in sorted({score["items"] for score in scores}))


def _errors(scores: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    return [error for score in scores if (error := score.get(f"{metric}_stderr")) is not None]
