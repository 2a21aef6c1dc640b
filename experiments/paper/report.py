"""The report: a self-contained HTML page with verdicts, figures, tables and runs; and the verdicts in Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from experiments.claims.forest import draw_verdicts
from experiments.claims.numbers import Certain
from experiments.claims.verdict import (
    ABOVE,
    BELOW,
    NOT_TESTABLE,
    OUTCOMES,
    UNDECIDED,
    WITHIN,
    Verdict,
    train_command,
)
from experiments.claims.verdict import __doc__ as how_judged
from experiments.escape import escape_markdown, escaped_list, escaped_table, visible
from experiments.paper.footnotes import describe_runs
from experiments.paper.images import MAX_SVG, data_uri
from experiments.paper.render import FilledTable, fill_table, footnotes, table_rows, title
from experiments.paper.tables_and_figures import SUITES, RunSpec, Table
from experiments.run.collect import RunCollection
from experiments.run.definitions import loss_spikes
from experiments.run.read import Run, corrupted_rows, corrupted_steps

#: How the page names where an interval must lie.
LIMITS = {ABOVE: "more than", BELOW: "at most", WITHIN: "plus or minus"}
HOW_JUDGED = " ".join((how_judged or "").split())


def report(
    collection: RunCollection,
    verdicts: Sequence[Verdict],
    tables: Sequence[Table],
    figures: Mapping[str, Figure],
    not_drawn: Sequence[str],
    scale: str,
    commands: Sequence[str],
    made: str,
    settings: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> str:
    """Return the page, with the tables of which any run is finished. The figures are closed.

    Args:
        collection: the paper's runs.
        verdicts: on all claims, corrected together.
        tables: in order.
        figures: by name, in order.
        not_drawn: names of figures without runs.
        scale: of the paper's runs.
        commands: that make the report again.
        made: sentence with date, commit and device.
        settings: words of the command that trains the paper's runs, such as `scale=micro` and `seed=0,1,2`.
        warnings: about further runs, such as those of the labs.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_visible)
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text())
    runs = _distinct_runs(collection)
    versions = sorted(
        {f"{name} {version}" for run in runs for name, version in run.environment.get("versions", {}).items()}
    )
    devices = sorted({str(run.environment.get("device", "an unknown device")) for run in runs})
    filled = [fill_table(table, collection) for table in tables]
    ids = {spec: f"run-{number}" for number, spec in enumerate(_specs(collection), 1)}
    by_outcome = _by_outcome(verdicts)
    shown = {name: (figure.get_suptitle(), data_uri(figure)) for name, figure in figures.items()}
    return template.render(
        title=_title(scale),
        asked=_asked(verdicts, runs),
        found=[(outcome, claims) for outcome, claims in by_outcome.items() if claims and outcome != NOT_TESTABLE],
        not_testable=by_outcome[NOT_TESTABLE],
        picture=_first_picture(verdicts, shown),
        paragraphs=_describe_report(collection),
        made=made,
        verdicts=[_shown_verdict(verdict, number) for number, verdict in enumerate(verdicts, 1)],
        how_judged=HOW_JUDGED.replace("`", ""),
        figures=[
            (name, heading, image, train_command([name], settings) if name in SUITES else "")
            for name, (heading, image) in shown.items()
        ],
        not_drawn=not_drawn,
        tables=[
            {
                "name": each.table.name,
                "title": title(each),
                "rows": _linked_rows(each, ids),
                "footnotes": footnotes(each),
                "command": train_command([each.table.name], settings),
            }
            for each in filled
            if any(cell.values or cell.diverged for row in each.cells for cell in row)
        ],
        runs=[_shown_spec(spec, ids[spec], collection, settings) for spec in ids],
        warnings=[*collection.warnings, *warnings],
        commands=commands,
        versions=f"Runs were made with {', '.join(versions)} on {' and '.join(devices)}." if runs else "",
    )


def _visible(value: object) -> object:
    """Return what the template prints, without characters that HTML cannot hold."""
    return type(value)(visible(value)) if isinstance(value, str) else value


def _asked(verdicts: Sequence[Verdict], runs: Sequence[Run]) -> str:
    claims = decided = ""
    if verdicts:
        claims = f"Which of {len(verdicts)} claims about gradient clipping hold in small language models? "
        number = sum(verdict.outcome not in (UNDECIDED, NOT_TESTABLE) for verdict in verdicts)
        decided = f"They decide {number} of the claims. "
    return (
        f"{claims}The paper trained a model of a billion parameters on 50 billion tokens. Here are {len(runs)} runs of "
        f"its experiments at another scale, and the runs of the labs as far as there are any. {decided}None of them "
        "gives the size of a difference at the paper's scale."
    )


def _first_picture(verdicts: Sequence[Verdict], shown: Mapping[str, tuple[str, str]]) -> tuple[str, str] | None:
    """Return description and image of the picture on the first screen: the verdicts, or one of the figures.

    Where no claim can be tested, it is that of Table 3 if there is one, and else the first one.
    """
    if (picture := draw_verdicts(verdicts)) is not None:
        description = (
            "Estimate and 95 % interval of each testable claim, as multiples of the smallest effect of interest; the "
            "table below has the numbers"
        )
        return description, data_uri(picture, max_svg=2 * MAX_SVG)
    return shown.get("table3") or next(iter(shown.values()), None)


def _by_outcome(verdicts: Sequence[Verdict]) -> dict[str, list[str]]:
    return {
        outcome: [verdict.claim.text.rstrip(".") for verdict in verdicts if verdict.outcome == outcome]
        for outcome in OUTCOMES
    }


def _specs(collection: RunCollection) -> list[RunSpec]:
    """Return the specs that have a finished run."""
    return list(dict.fromkeys(spec for spec, _ in collection.runs))


def _shown_verdict(verdict: Verdict, number: int) -> dict[str, Any]:
    """Return what the page shows of a verdict."""
    part = verdict.part
    return {
        "id": f"claim-{number}",
        "claim": verdict.claim.text,
        "source": verdict.claim.source,
        "outcome": verdict.outcome,
        "estimate": "" if part is None else part.estimate,
        "interval": "" if part is None else part.interval,
        "smallest": f"{LIMITS[verdict.claim.asserts]} {' or '.join(each.text for each in verdict.claim.smallest)}",
        "p": p_text(verdict),
        "scale": verdict.scale or "no runs",
        "evidence": verdict.evidence,
        "runs": verdict.runs,
        "command": verdict.command,
    }


def p_text(verdict: Verdict) -> str:
    """Return the corrected p-value of a verdict; empty if nothing was tested."""
    if verdict.corrected is None or verdict.part is None or isinstance(verdict.part.number, Certain):
        return ""
    return "below 0.001" if verdict.corrected < 0.001 else f"{verdict.corrected:.2g}"


def _linked_rows(filled: FilledTable, ids: Mapping[RunSpec, str]) -> list[list[tuple[str, str, bool]]]:
    """Return header and rows: the text of each cell, the anchor of its run, and whether it is the paper's number."""
    groups: list[str | None] = [
        None
    ]  # of the run behind each printed column; `None` for labels and the paper's numbers
    for c, column in enumerate(filled.table.columns):
        groups.append(column.group)
        if any(row[c].paper is not None for row in filled.cells):
            groups.append(None)
    header, *rows = table_rows(filled, Markup("<b>{}</b>"))
    is_paper = [c > 0 and group is None for c, group in enumerate(groups)]
    shown = [[(text, "", paper) for text, paper in zip(header, is_paper, strict=True)]]
    for specs, row in zip(filled.table.rows.values(), rows, strict=True):
        anchors = [ids.get(specs[group], "") if group is not None else "" for group in groups]
        shown.append([*zip(row, anchors, is_paper, strict=True)])
    return shown


def _shown_spec(spec: RunSpec, anchor: str, collection: RunCollection, settings: Sequence[str]) -> dict[str, Any]:
    """Return what the page shows of the runs of a spec: their folders by seed, and the command that trains them."""
    return {
        "id": anchor,
        "folders": [run.path.name for run in collection.runs_of(spec)],
        "command": train_command(["paper"], [*settings, *spec.overrides]),
    }


def verdicts_markdown(collection: RunCollection, verdicts: Sequence[Verdict], scale: str) -> str:
    """Return the claims with their verdicts in Markdown."""
    parts = [f"# {_title(scale)}, the claims", escape_markdown(" ".join(_describe_report(collection)))]
    parts += [_verdict_table(verdicts), HOW_JUDGED]
    if collection.warnings:
        parts.append(escaped_list(collection.warnings))
    for verdict in verdicts:
        sentences = [f"claimed by {verdict.claim.source}", *verdict.evidence]
        sentences += [f"p, corrected: {p_text(verdict)}"] if p_text(verdict) else []
        if verdict.runs:
            sentences += [f"scale: {verdict.scale}", f"runs: {', '.join(verdict.runs)}"]
        sentences.append(f"command: {verdict.command}")
        parts += [f"## {verdict.claim.text}", f"**{verdict.outcome}**", escaped_list(sentences)]
    return "\n\n".join(parts) + "\n"


def _verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Return the outcome and the estimate of each claim as a table in Markdown."""
    header = ("claim", "verdict", "estimate (95 %)", "smallest effect of interest", "p, corrected")
    rows = []
    for verdict in verdicts:
        shown = _shown_verdict(verdict, 0)
        estimate = f"{shown['estimate']} ({shown['interval']})" if shown["estimate"] else ""
        rows.append((shown["claim"].rstrip("."), shown["outcome"], estimate, shown["smallest"], shown["p"]))
    return escaped_table(header, rows, left=len(header))


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
