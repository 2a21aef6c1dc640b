"""The report: one page of HTML that needs nothing else, with what was run, verdicts, figures and tables.

The verdicts are there in Markdown too, for those who read them where the page cannot be shown.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from experiments.paper.claims import Verdict
from experiments.paper.claims import __doc__ as how_judged
from experiments.paper.collect import Found
from experiments.paper.suites import Table
from experiments.paper.tables import about, below, fill, grid, title
from experiments.run.definitions import loss_spikes
from experiments.run.read import Run, corrupted_rows, corrupted_steps

LEAD = (
    "What runs at this scale say of the paper's tables, figures and claims. The paper trained a model of a billion "
    "parameters on 50 billion tokens; numbers at another scale are for the direction of differences, not their size."
)


def report(
    found: Found,
    judged: Sequence[Verdict],
    tables: Sequence[Table],
    figures: Mapping[str, Figure],
    undrawn: Sequence[str],
    scale: str,
    commands: Sequence[str],
    made: str,
) -> str:
    """Return the page.

    Args:
        found: the runs.
        judged: the claims.
        tables: to show, where any run of theirs is done.
        figures: by name, in order.
        undrawn: names of figures without runs.
        scale: of the runs.
        commands: that make it again.
        made: when and on what.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text())
    runs = _runs(found)
    filled = [fill(table, found) for table in tables]
    shown = [each for each in filled if any(cell.values or cell.diverged for row in each.cells for cell in row)]
    versions = sorted(
        {f"{name} {number}" for run in runs for name, number in run.environment.get("versions", {}).items()}
    )
    devices = sorted({str(run.environment.get("device", "a device that is not known")) for run in runs})
    return template.render(
        title=_title(scale),
        lead=LEAD,
        what=_what(found),
        made=made,
        verdicts=judged,
        how_judged=_how_judged().replace("`", ""),
        figures=[(name, figure.get_suptitle(), _encoded(figure)) for name, figure in figures.items()],
        undrawn=undrawn,
        tables=[
            {"name": each.table.name, "title": title(each), "header": header, "rows": rows, "below": below(each)}
            for each in shown
            for header, *rows in [grid(each, Markup("<b>{}</b>"), " ± ")]
        ],
        others=found.others,
        commands=commands,
        versions=f"Runs were made with {', '.join(versions)} on {' and '.join(devices)}." if runs else "",
    )


def verdicts_in_markdown(found: Found, judged: Sequence[Verdict], scale: str) -> str:
    """Return the paper's claims and what runs say of each.

    Args:
        found: the runs.
        judged: the claims.
        scale: of the runs.
    """
    parts = [f"# {_title(scale)}, the paper's claims", " ".join(_what(found)), _how_judged()]
    if found.others:
        parts.append("\n".join(f"- {said}" for said in found.others))
    for each in judged:
        parts += [f"## {each.claim}", f"**{each.verdict}**", "\n".join(f"- {number}" for number in each.numbers)]
    return "\n\n".join(parts) + "\n"


def _runs(found: Found) -> list[Run]:
    return list({run.path: run for run in found.runs.values()}.values())


def _what(found: Found) -> list[str]:
    """Say of what runs a report is, and what makes them differ, in a paragraph each."""
    if not (runs := _runs(found)):
        return ["No run is done."]
    what = [f"{len(runs)} runs are done: {about(runs, sorted({seed for _, seed in found.runs}))}."]
    if found.unfinished:
        what.append("Some runs are not finished, and not in these numbers.")
    return [*what, said] if (said := _why(runs)) else what


def _title(scale: str) -> str:
    return f"ZClip (arXiv 2504.02507): the evidence at {scale} scale"


def _how_judged() -> str:
    return " ".join((how_judged or "").split())


def _why(runs: Sequence[Run]) -> str:
    """Say what makes the strategies differ where bad batches are put in; empty where none are."""
    disturbed = [run for run in runs if corrupted_steps(run)]
    calm = [run for run in runs if not corrupted_steps(run)]
    if not disturbed:
        return ""
    times = []
    for run in disturbed:
        bad = sorted(corrupted_rows(run))
        norms = run.metrics["grad_norm"]
        if bad and np.isfinite(norms[bad]).any():
            times.append(float(np.nanmedian(norms[bad]) / np.nanmedian(np.delete(norms, bad))))
    kinds = {str(run.config["data"]["corruption"]["kind"]) for run in disturbed}
    large = (
        f"Their gradients have a norm of {np.median(times):.0f} times the median of the other steps (median over "
        "runs). "
        if times
        else ""
    )
    said = (
        f"Bad batches ({', '.join(sorted(kinds))}) were put in on purpose into {len(disturbed)} of these {len(runs)} "
        f"runs. {large}What the spike lab shows of a strategy, against the same run undisturbed, is what "
        "it lets through of them. Differences between undisturbed runs are others, and can be larger: see its columns. "
        "This tests what a bad batch does, not what happens in a long run by itself."
    )
    if calm:
        spikes = sum(len(loss_spikes(run.metrics["loss"])) for run in calm)
        said += f" The {len(calm)} runs without bad batches have {spikes} loss spikes."
    return said


def _encoded(figure: Figure) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return base64.b64encode(out.getvalue()).decode()
