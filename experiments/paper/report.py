"""The report: a self-contained HTML page with runs, verdicts, figures and tables; and the verdicts in Markdown."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from experiments.escape import escape_markdown, visible
from experiments.paper.claims import __doc__ as how_judged
from experiments.paper.footnotes import describe_runs
from experiments.paper.render import fill_table, footnote, table_rows, title
from experiments.paper.tables_and_figures import Table
from experiments.paper.verdict import Verdict
from experiments.run.collect import RunCollection
from experiments.run.definitions import loss_spikes
from experiments.run.read import Run, corrupted_rows, corrupted_steps
from experiments.run.style import image

HOW_JUDGED = " ".join((how_judged or "").split())


def report(
    collection: RunCollection,
    verdicts: Mapping[str, Verdict],
    tables: Sequence[Table],
    figures: Mapping[str, Figure],
    not_drawn: Sequence[str],
    scale: str,
    commands: Sequence[str],
    made: str,
) -> str:
    """Return the page, with the tables of which any run is finished. The figures are closed.

    Args:
        collection: the runs.
        verdicts: by claim.
        tables: in order.
        figures: by name, in order.
        not_drawn: names of figures without runs.
        scale: of the runs.
        commands: that make the report again.
        made: sentence with date, commit and device.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_visible)
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text())
    runs = _distinct_runs(collection)
    versions = sorted(
        {f"{name} {version}" for run in runs for name, version in run.environment.get("versions", {}).items()}
    )
    devices = sorted({str(run.environment.get("device", "an unknown device")) for run in runs})
    images = []
    for name, figure in figures.items():
        images.append((name, figure.get_suptitle(), base64.b64encode(image(figure, "svg")).decode()))
        plt.close(figure)
    return template.render(
        title=_title(scale),
        paragraphs=_describe_report(collection),
        made=made,
        verdicts=verdicts,
        how_judged=HOW_JUDGED.replace("`", ""),
        figures=images,
        not_drawn=not_drawn,
        tables=[
            {"name": each.table.name, "title": title(each), "header": header, "rows": rows, "footnote": footnote(each)}
            for each in (fill_table(table, collection) for table in tables)
            if any(cell.values or cell.diverged for row in each.cells for cell in row)
            for header, *rows in [table_rows(each, Markup("<b>{}</b>"))]
        ],
        warnings=collection.warnings,
        commands=commands,
        versions=f"Runs were made with {', '.join(versions)} on {' and '.join(devices)}." if runs else "",
    )


def _visible(value: object) -> object:
    """Return what the template prints, without characters that HTML cannot hold."""
    return type(value)(visible(value)) if isinstance(value, str) else value


def verdicts_markdown(collection: RunCollection, verdicts: Mapping[str, Verdict], scale: str) -> str:
    """Return the paper's claims with their verdicts in Markdown."""
    parts = [
        f"# {_title(scale)}, the paper's claims",
        escape_markdown(" ".join(_describe_report(collection))),
        HOW_JUDGED,
    ]
    if collection.warnings:
        parts.append(_bullets(collection.warnings))
    for claim, (outcome, evidence) in verdicts.items():
        parts += [f"## {claim}", f"**{outcome}**", _bullets(evidence)]
    return "\n\n".join(parts) + "\n"


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {escape_markdown(sentence)}" for sentence in sentences)


def _title(scale: str) -> str:
    return f"ZClip (arXiv 2504.02507): results at {scale} scale"


def _distinct_runs(collection: RunCollection) -> list[Run]:
    return list({run.path: run for run in collection.runs.values()}.values())


def _describe_report(collection: RunCollection) -> list[str]:
    """Return a paragraph on the runs of a report, and one on corrupted batches if there are any."""
    if not (runs := _distinct_runs(collection)):
        return ["No run is finished."]
    seeds = sorted({seed for _, seed in collection.runs})
    paragraphs = [f"{len(runs)} runs are finished: {describe_runs(runs, seeds)}."]
    if collection.unfinished:
        paragraphs.append("Some runs are unfinished and not in these numbers.")
    if any(corrupted_steps(run) for run in runs):
        paragraphs.append(_describe_corruption(runs))
    return paragraphs


def _describe_corruption(runs: Sequence[Run]) -> str:
    """Return a paragraph on corrupted batches and their effect on norms."""
    corrupted_runs = [run for run in runs if corrupted_steps(run)]
    other_runs = [run for run in runs if not corrupted_steps(run)]
    ratios = []
    for run in corrupted_runs:
        rows, norms = sorted(corrupted_rows(run)), run.metrics["grad_norm"]
        if rows and np.isfinite(norms[rows]).any():
            ratios.append(float(np.nanmedian(norms[rows]) / np.nanmedian(np.delete(norms, rows))))
    kinds = ", ".join(sorted({str(run.config["data"]["corruption"]["kind"]) for run in corrupted_runs}))
    paragraph = f"Corrupted batches ({kinds}) were injected into {len(corrupted_runs)} of these {len(runs)} runs. "
    if ratios:
        paragraph += (
            f"Their gradients have a norm of {np.median(ratios):.0f} times the median of the other steps (median over "
            "runs). "
        )
    paragraph += (
        "The spike lab compares each run with its baseline run, without corrupted batches, and so shows the effect of "
        "these batches on a strategy. Baseline runs of different strategies differ too, and can differ more: see their "
        "column. This tests the effect of corrupted batches, not spikes that a long run has by itself."
    )
    if other_runs:
        spikes = sum(len(loss_spikes(run.metrics["loss"])) for run in other_runs)
        paragraph += f" The {len(other_runs)} runs without corrupted batches have {spikes} loss spikes."
    return paragraph
