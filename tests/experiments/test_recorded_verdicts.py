"""The page of verdicts says what follows from the recorded numbers by today's rules.

The runs at micro scale were not kept. Their record has means, and p-values or intervals, of which the errors follow.
"""

import csv
import math
import re

import pytest
from scipy import stats

from experiments.claims.labs import LAB_CLAIMS
from experiments.claims.numbers import ExcessEvents, Mean
from experiments.claims.verdict import NOT_TESTABLE, Findings, NotTestable, Part, Verdict, corrected, judge, judge_claim
from experiments.labs.declaration import ADAM_LAG
from experiments.paper.claims import LOSS, OVERHEAD, PAPER_CLAIMS
from experiments.paper.residual_spikes import EXCESS_LOSS, SPIKES
from experiments.run.archive import restore_archive
from experiments.run.collect import RunCollection
from experiments.run.read import read_run
from tests.helpers import CHECKOUT

RESULTS = CHECKOUT / "experiments" / "results"
PAGE = CHECKOUT / "docs" / "evidence" / "verdicts.md"
NOTHING = RunCollection({}, set(), {}, [], frozenset())
#: The recorded runs of the Adam-lag lab that the page is about: names and seeds by arm. More of them change numbers.
ARMS = {
    "no clipping": ("pico-none-monitor-lr0.01", (0, 1, 2, 3, 4)),
    "ZClip": ("pico-zclip-lr0.01", (0, 1, 2, 3, 4)),
    "fixed 1.0": ("pico-fixed-lr0.01", (0, 1, 2, 3, 4)),
}


def from_p(mean: float, p: float) -> Mean:
    """Return a mean of three seeds from the p-value of the paired t-test."""
    return Mean(mean, abs(mean) / stats.t.isf(p / 2, 2), 3)


def from_interval(low: str, high: str) -> Mean:
    return Mean((float(low) + float(high)) / 2, (float(high) - float(low)) / 2 / stats.t.ppf(0.975, 2), 3)


def recorded_findings() -> list[Findings | None]:
    """Return what the record shows of each of the paper's claims; `None` if it cannot test the claim."""
    sections = re.split("^## .+$", (RESULTS / "micro" / "verdicts.md").read_text(), flags=re.M)[1:]
    assert len(sections) == len(PAPER_CLAIMS)
    found: list[Findings | None] = []
    for section in sections[:2]:
        spikes, runs, dips = re.search(r"(\d+) spikes in (\d+) runs .+ as far down (\d+) times", section).groups()
        net = re.search(r"beyond that ([\d.]+) to ([\d.]+) \(95 %\)", section).groups()
        events = ExcessEvents(int(spikes), int(dips), int(runs))
        found.append(Findings([Part("", events, SPIKES), Part("", from_interval(*net), EXCESS_LOSS)]))
    found.append(None)
    found.append(Findings([Part("", final_difference(), LOSS)]))
    for section in sections[4:7]:
        pairs = re.findall(r"minus .+: ([+-][\d.]+) \(p = ([\d.]+), 3 seeds\)", section)
        found.append(Findings([Part("", from_p(-float(mean), float(p)), LOSS) for mean, p in pairs]))
        assert len(pairs) == section.count(" minus ") > 1
    found.append(None)
    low, high = re.search(r"3 seeds\), (-[\d.]+) to ([\d.]+) \(95 %\)", sections[8]).groups()
    return [*found, Findings([Part("", from_interval(low, high), OVERHEAD)])]


def final_difference() -> Mean:
    """Return the final train loss of ZClip at 3e-3 above that of fixed clipping at 5e-4.

    The loss after 65 % of the tokens is not recorded, and is above the final one. The error is the largest that the
    standard deviations of both allow.
    """
    rows = csv.DictReader((RESULTS / "micro" / "tables" / "table2.csv").open())
    losses = {(row["row"], row["column"]): (float(row["mean"]), float(row["std"])) for row in rows}
    zclip, fixed = losses["3e-3", "train loss, ZClip"], losses["5e-4", "train loss, fixed"]
    return Mean(zclip[0] - fixed[0], (zclip[1] + fixed[1]) / math.sqrt(3), 3)


def from_record(findings: Findings | None) -> Findings:
    if findings is None:
        raise NotTestable("the record does not have it")
    return findings


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> list[Verdict]:
    """The verdicts on all claims that follow from what is recorded."""
    folder, runs = tmp_path_factory.mktemp("recorded"), {}
    for label, (name, seeds) in ARMS.items():
        for seed in seeds:
            (archive,) = (RESULTS / "runs" / "adam-lag").glob(f"{name}-seed{seed}-*.json.xz")
            restore_archive(archive, folder / archive.name)
            runs[ADAM_LAG.arm(label), seed] = read_run(folder / archive.name)
    of_paper = [
        judge_claim(claim._replace(find=lambda _, found=found: from_record(found)), NOTHING)
        for claim, found in zip(PAPER_CLAIMS, recorded_findings(), strict=True)
    ]
    of_labs = judge(LAB_CLAIMS["adam_lag"], RunCollection(runs, set(), {}, [], frozenset()))
    return corrected([*of_paper, *of_labs, *judge(LAB_CLAIMS["rate"], NOTHING)])


def test_page_has_the_verdicts_that_follow_from_the_record(verdicts):
    page = PAGE.read_text()
    rows = re.findall(r"^\| \[(.+?)\]\(#([\w-]+)\) \| ([^|]+) \|", page, re.M)
    assert [(text, outcome) for text, _, outcome in rows] == [
        (verdict.claim.text.rstrip("."), verdict.outcome) for verdict in verdicts
    ]
    headings = {
        re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in re.findall("^#+ (.+)", page, re.M)
    }
    assert {anchor for _, anchor, _ in rows} <= headings


def test_page_has_the_numbers_of_the_verdicts(verdicts):
    """The estimate, its interval and the corrected p-value of each claim that was tested."""
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| [")]
    for verdict, (_, _, estimate, _, p) in zip(verdicts, rows, strict=True):
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
