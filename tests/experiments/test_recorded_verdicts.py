"""The recorded tables and verdicts, and the page of verdicts, say what follows from the archived runs."""

import math
import re

import pytest

from experiments.claims.verdict import NOT_TESTABLE
from experiments.paper.render import as_csv, fill_table
from experiments.paper.report import verdicts_markdown
from experiments.paper.tables_and_figures import TABLES
from experiments.run.archive import ENDING, restore_archive
from experiments.run.collect import RunCollection
from scripts.paper_runs import PaperSettings, collect_runs
from scripts.paper_verdicts import Judged, judge_claims
from tests.helpers import CHECKOUT

pytestmark = pytest.mark.slow

RESULTS = CHECKOUT / "experiments" / "results"
RECORD = RESULTS / "micro"
PAGE = CHECKOUT / "docs" / "evidence" / "verdicts.md"
#: The runs of labs that claims are about, by folder. The others would only take time.
LAB_RUNS = {
    "adam-lag": ("pico-none-monitor-lr0.01-seed*", "pico-zclip-lr0.01-seed*", "pico-fixed-lr0.01-seed*"),
    "rate": ("pico-none-lr*", "pico-zclip-lr*", "pico-fixed-lr*"),
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> PaperSettings:
    """The settings of the report, with the archived runs restored."""
    runs = tmp_path_factory.mktemp("recorded")
    archives = [*(RESULTS / "runs" / "paper-micro").glob(f"*{ENDING}")]
    for folder, names in LAB_RUNS.items():
        archives += [path for name in names for path in (RESULTS / "runs" / folder).glob(f"{name}{ENDING}")]
    for archive in archives:
        restore_archive(archive, runs / archive.parent.name / archive.name.removesuffix(ENDING))
    return PaperSettings(
        scale="micro",
        experiment="all",
        seeds=[0, 1, 2],
        overrides=[],
        windows=None,
        out=None,
        paths={"runs": str(runs)},
    )


@pytest.fixture(scope="module")
def collection(settings) -> RunCollection:
    return collect_runs(settings, ["all"])


@pytest.fixture(scope="module")
def judged(settings, collection) -> Judged:
    return judge_claims(settings, collection)


def without_commands(text: str) -> list[str]:
    """Return the lines that do not depend on the folder of the runs."""
    return [line for line in text.splitlines() if not line.startswith("- command: ")]


def test_recorded_verdicts_follow_from_the_archived_runs(collection, judged):
    recorded = (RECORD / "verdicts.md").read_text()
    assert without_commands(verdicts_markdown(collection, judged.verdicts, "micro")) == without_commands(recorded)


@pytest.mark.parametrize("name", TABLES)
def test_recorded_tables_follow_from_the_archived_runs(collection, name):
    assert as_csv(fill_table(TABLES[name], collection)) == (RECORD / "tables" / f"{name}.csv").read_text()


def test_page_has_the_verdicts_that_follow_from_the_runs(judged):
    page = PAGE.read_text()
    rows = re.findall(r"^\| \[(.+?)\]\(#([\w-]+)\) \| ([^|]+) \|", page, re.M)
    assert [(text, outcome) for text, _, outcome in rows] == [
        (verdict.claim.text.rstrip("."), verdict.outcome) for verdict in judged.verdicts
    ]
    headings = {
        re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in re.findall("^#+ (.+)", page, re.M)
    }
    assert {anchor for _, anchor, _ in rows} <= headings


def test_page_has_the_numbers_of_the_verdicts(judged):
    """The estimate, its interval and the corrected p-value of each claim that was tested."""
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| [")]
    for verdict, (_, _, estimate, _, p) in zip(judged.verdicts, rows, strict=True):
        if verdict.part is None:
            assert verdict.outcome == NOT_TESTABLE and estimate == p.strip(" |") == ""
            continue
        low, high = verdict.part.number.interval()
        printed = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", estimate.replace("95 %", ""))]
        exact = [verdict.part.number.value, low, high]
        if verdict.part.smallest.is_ratio:
            exact = [math.exp(number) for number in exact]
        assert printed == [pytest.approx(number, rel=0.02, abs=0.006) for number in exact], verdict.claim.text
        shown = p.strip(" |")
        assert shown == ("below 0.001" if verdict.corrected < 1e-3 else f"{verdict.corrected:.2g}"), verdict.claim.text
