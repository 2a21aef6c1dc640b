"""The report from run folders: a page that is small, whose numbers lead to their runs, and the verdicts."""

import base64
import html
import html.parser
import io
import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from experiments.claims.labs import LAB_CLAIMS
from experiments.claims.verdict import NOT_TESTABLE, OUTCOMES, UNDECIDED, corrected, judge
from experiments.paper.claims import PAPER_CLAIMS
from experiments.paper.figures import FIGURES
from experiments.paper.images import small_png, small_svg
from experiments.paper.render import fill_table
from experiments.paper.report import report, verdicts_markdown
from experiments.paper.tables_and_figures import (
    RATES,
    STRATEGIES,
    TABLES,
)
from experiments.run.collect import RunCollection
from experiments.run.style import STRATEGY_STYLES, image
from tests.experiments.modified_runs import with_result
from tests.experiments.written_runs import SEEDS, modify, without
from tests.helpers import SLOW


@pytest.mark.parametrize("names", [("figure2", "figure9"), SLOW(tuple(FIGURES))], ids=["two", "all"])
def test_report_has_tables_verdicts_and_figures(names, everything, figures):
    verdicts = all_verdicts(everything)
    drawn = {name: figures[name] for name in names}
    page = report(
        everything,
        verdicts,
        list(TABLES.values()),
        drawn,
        ["figure99"],
        "micro",
        ["make it so"],
        "Made today.",
        ["scale=micro", "seed=0,1,2"],
        ["a lab's run is excluded"],
    )
    found = re.findall(r"data:image/(svg\+xml|png);base64,([^\"]+)", page)
    images = [(kind, base64.b64decode(content)) for kind, content in found]
    assert len(images) == len(names) + 1 and "figure99" in page, "and the picture of the verdicts"
    assert all(image.startswith(b"<?xml" if "svg" in kind else b"\x89PNG") for kind, image in images)
    assert not any(b"dc:date" in image for _, image in images), "equal figures are equal files"
    assert 'alt="Figure 2: fixed clipping at 1e-3" src=' in page
    assert not re.search(r'(src|href)="(?!data:|#)', page), "it is self-contained"
    assert "<b>" in page and "&lt;b&gt;" not in page and "norm of 14 times the" in page
    assert all(f">{label}<" in page for label in STRATEGIES), "tables have their rows"
    assert "a lab&#39;s run is excluded" in page
    assert page.index("What we asked") < page.index("What we found") < page.index("data:image")
    assert page.index("data:image") < page.index('id="verdicts"') < page.index("<h2>The runs</h2>")
    if len(names) > 2:
        assert 300_000 < len(page.encode()) < 1_000_000, "it loads at once"
    text = verdicts_markdown(everything, verdicts, "micro")
    claims = [*PAPER_CLAIMS, *(claim for claims in LAB_CLAIMS.values() for claim in claims)]
    assert re.findall("^## (.+)", text, re.M) == [claim.text for claim in claims]
    shown = re.findall(r"^\*\*(.+)\*\*$", text, re.M)
    decided = sum(outcome not in (UNDECIDED, NOT_TESTABLE) for outcome in shown)
    assert f"They decide {decided} of the claims. None of them gives the size" in page
    assert {*shown} <= {*OUTCOMES}
    rows = [row.strip("| ").split(" | ") for row in re.findall(r"^\| .+", text, re.M)[2:]]
    assert [row[:2] for row in rows] == [[c.text.rstrip("."), o] for c, o in zip(claims, shown, strict=True)]
    assert "| p, corrected |\n| --- | --- | --- | --- | --- |\n| Fixed clipping" in text
    tested = next(verdict for verdict in verdicts if verdict.part is not None)
    assert f" | {tested.part.estimate} ({tested.part.interval}) | " in text


def test_report_of_runs_that_test_no_claim_begins_with_their_results(everything, figures):
    """Two seeds are too few. Table 3's picture comes first, and the claims are named where the reader opens them."""
    two = everything._replace(runs={key: run for key, run in everything.runs.items() if key[1] < 2})
    verdicts = all_verdicts(two)
    shown = {name: figures[name] for name in ("figure2", "table3")}
    page = report(two, verdicts, [TABLES["table3"]], shown, [], "micro", [], "Made today.")
    assert f"These runs test none of the {len(verdicts)} claims." in page
    first = re.search('id="first-picture"><img alt="([^"]+)"', page).group(1)
    assert html.unescape(first) == figures["table3"].get_suptitle()
    places = [page.index(text) for text in ("<h2>Tables</h2>", "<h2>Figures</h2>", 'id="verdicts"')]
    assert places == sorted(places)
    some = report(everything, all_verdicts(everything), [], {}, [], "micro", [], "Made today.")
    assert re.search(r"Not testable with these runs: \d+ of the 18 claims\.", some)


def all_verdicts(collection: RunCollection) -> list:
    """Return the verdicts on all claims; the labs have no runs."""
    nothing = RunCollection({}, set(), {}, [], frozenset())
    of_labs = [verdict for claims in LAB_CLAIMS.values() for verdict in judge(claims, nothing)]
    return corrected([*judge(PAPER_CLAIMS, collection, ["scale=micro", "seed=0,1,2"]), *of_labs])


class Links(html.parser.HTMLParser):
    """Anchors, and the texts that link to them, by the table or section that they are in."""

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.texts, self.open = set(), [], {}, []
        self.link = None

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        assert values.get("id") not in self.ids, "an anchor is unique"
        self.ids |= {values["id"]} if "id" in values else set()
        if tag not in ("meta", "img"):
            self.open.append((tag, values.get("id")))
        self.link = values.get("href") if tag == "a" else self.link

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, "what was opened last is closed first"
        self.link = None if tag == "a" else self.link

    def handle_data(self, data):
        if self.link:
            self.links.append((data, self.link.removeprefix("#")))
        for _, anchor in self.open:
            if anchor:
                self.texts[anchor] = self.texts.get(anchor, "") + data


def test_numbers_of_the_page_lead_to_their_runs_and_commands(everything):
    """Each number in a verdict or table is a link to the folders of its runs and the command that makes them."""
    verdicts, settings = all_verdicts(everything), ["scale=micro", "seed=0,1,2"]
    page = report(everything, verdicts, [TABLES["table2"]], {}, [], "micro", [], "", settings)
    links = Links()
    links.feed(page)
    assert not links.open and {anchor for _, anchor in links.links} <= links.ids
    filled = fill_table(TABLES["table2"], everything)
    linked = [(text, anchor) for text, anchor in links.links if anchor.startswith("run-")]
    assert [text for text, _ in linked] == [cell.text for row in filled.cells for cell in row], (
        "ours in their order, and none of the paper's"
    )
    spec = RATES[3e-3]["fixed"]
    _, anchor = linked[len(filled.cells[0])]
    names = [everything.runs[spec, seed].path.name for seed in SEEDS]
    command = "python train.py -m experiment=paper scale=micro seed=0,1,2 clip=fixed paper.lr=0.003"
    assert links.texts[anchor] == ", ".join(names) + command
    leaves = verdicts[0]
    assert (leaves.part.estimate, "claim-1") in links.links and (leaves.part.interval, "claim-1") in links.links
    assert all(name in links.texts["claim-1"] for name in leaves.runs) and leaves.command in links.texts["claim-1"]
    assert f"{leaves.scale}." in links.texts["claim-1"]


def test_pictures_of_the_page_have_the_colours_of_strategies(figures):
    """A large figure is a PNG with few colours; those of lines are exact."""
    for figure, strategies in (
        (figures["table3"], ("none", "fixed", "zclip")),
        (figures["figure5"], ("zclip", "fixed")),
    ):
        with Image.open(io.BytesIO(small_png(figure))) as picture:
            assert picture.mode == "P"
            colors = {color for _, color in picture.convert("RGB").getcolors(1 << 16)}
        for strategy in strategies:
            color = tuple(round(255 * part) for part in to_rgb(STRATEGY_STYLES[strategy].color))
            assert color in colors, strategy
    assert small_svg(figures["figure2"]).startswith(b"<?xml")
    small, whole = small_svg(figures["figure2"]), image(figures["figure2"], "svg")
    paths = re.findall(rb' d="([^"]*)"', small)
    assert paths and not any(re.search(rb"\d\.\d{3}", path) for path in paths)
    for transform in (rb'transform="[^"]*"', rb'style="[^"]*"'):
        assert re.findall(transform, small) == re.findall(transform, whole), "letters keep their size"


def test_report_names_unfinished_runs_warnings_spikes_and_norms(everything):
    """Of the other steps' norms 69 are 1 and 68 are 3, so that their median is 1."""

    def change(spec, seed, run):
        step = run.metrics["step"]
        norms = np.where(step <= 69, 1.0, 3.0)
        norms[np.isin(step, [80, 100, 120])] = 15.0
        return run._replace(metrics={**run.metrics, "grad_norm": norms})

    key = (STRATEGIES["AutoClip"], 1)
    collection = modify(without(everything, key), change)._replace(unfinished={key: 7}, warnings=["<x> is excluded"])
    page = report(collection, [], [TABLES["throughput"]], {}, [], "micro", [], "")
    text = verdicts_markdown(collection, [], "micro")
    assert "\n- \\<x\\> is excluded\n" in text and "&lt;x&gt; is excluded" in page
    for shown in (page, text):
        assert "Some runs are unfinished and not in these numbers." in shown
        assert "The 30 runs without corrupted batches have 0 loss spikes." in shown
        assert "Their gradients have a norm of 15 times the median of the other steps" in shown


@pytest.mark.parametrize("diverged", [True, False])
def test_table_without_numbers_is_reported_if_runs_have_diverged(diverged, everything):
    numbers = {spec: {"tokens_per_second": None, "step_seconds": {}} for spec in STRATEGIES.values()}
    collection = with_result(everything, numbers, {*everything.runs} if diverged else None)
    page = report(collection, [], [TABLES["throughput"]], {}, [], "micro", [], "")
    assert ("Speed of training" in page) == diverged
