"""The reference pages name what the programs have and write: no file, field, script, target or status is missing."""

import ast
import json
import re
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import zclip
from common.errors import EXIT_CANNOT_CONTINUE, EXIT_USER_ERROR
from common.run_files import Result, Score
from evaluation.scores import KEY
from experiments.labs import natural_spikes, statistics
from experiments.labs.bad_data import SMALLEST_EXCESS
from experiments.labs.spike_tables import AREA_OFFSET
from experiments.run import definitions
from tests.helpers import CHECKOUT, make, read_jsonl
from tests.test_import_boundaries import MAY_IMPORT, PACKAGES
from training.monitor import health
from training.monitor.step_timer import TIMED_PHASES
from training.run_dir import RunDir
from training.runtime.signals import SIGNALS
from zclip import updates

REFERENCE = CHECKOUT / "docs" / "reference"


def page(name: str) -> str:
    return (REFERENCE / name).read_text()


def section(text: str, heading: str) -> str:
    """Return the part of a page below a heading, up to the next one of its level."""
    level = heading.split()[0]
    return text.split(f"{heading}\n", 1)[1].split(f"\n{level} ", 1)[0]


def first_cells(text: str) -> set[str]:
    """Return the words in code font in the first column of the tables in a text."""
    rows = re.findall(r"^\|([^|]*)\|", text, re.M)
    return {word for row in rows for word in re.findall(r"`([^`]+)`", row)}


def telemetry() -> set[str]:
    """Return the fields that the strategies add to a line of metrics, with a scope and a change of arguments too."""
    fields = set()
    for strategy_class in vars(zclip).values():
        if isinstance(strategy_class, type) and issubclass(strategy_class, zclip.ClippingStrategy):
            strategy, model = strategy_class(), nn.Linear(4, 2)
            if strategy_class is not zclip.ClippingStrategy:
                model(torch.ones(3, 4)).sum().backward()
                strategy.step(model, optimizer=torch.optim.SGD(model.parameters()))
            fields |= strategy.telemetry.keys()
    scoped, model = zclip.ZClip(scope="weight"), nn.Linear(4, 2)
    scoped.change(z_thresh=3.0)
    model(torch.ones(3, 4)).sum().backward()
    scoped.step(model)
    return fields | scoped.telemetry.keys() | rule_telemetry()


def rule_telemetry() -> set[str]:
    """Return the fields that the rules over updates add to a line of metrics, with a change of arguments too."""
    bases = (updates.OptimizerRule, updates.UpdateRule)
    classes = [each for each in map(vars(updates).get, updates.__all__) if isinstance(each, type)]
    rules = [each() for each in classes if issubclass(each, bases) and each not in bases]
    changed = updates.UpdateClip()
    changed.change(sigmas=2.0)
    fields: set[str] = set()
    for rule in (*rules, changed):
        model = nn.Linear(4, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        rule.attach(optimizer)
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
        fields |= rule.telemetry.keys()
    return fields


def test_each_field_of_metrics_is_described_and_no_other(finished_run):
    described = first_cells(section(page("metrics.md"), "## metrics.jsonl"))
    (fields,) = {tuple(row) for row in read_jsonl(finished_run / "metrics.jsonl")}
    assert {f"{phase}_seconds" for phase in TIMED_PHASES} <= {*fields}
    assert described == {*fields, "masked_rows"} | telemetry(), "the run has no instance filter"


def test_each_field_of_a_result_is_described_and_no_other(finished_run):
    described = first_cells(section(page("metrics.md"), "## result.json"))
    assert described == json.loads((finished_run / "result.json").read_text()).keys() == Result.model_fields.keys()


def test_each_field_of_a_score_is_described():
    described = first_cells(section(page("metrics.md"), "## task_scores.json"))
    assert {*KEY, *Score.model_fields} <= described


@pytest.mark.slow
def test_each_field_of_a_validation_is_described_and_no_other(tiny, tmp_path):
    from tests.helpers import only_run, train_to_end

    train_to_end(*tiny, "trainer.max_steps=4", "trainer.val_every=2", cwd=tmp_path)
    (row,) = read_jsonl(only_run(tmp_path) / "val_metrics.jsonl")
    assert first_cells(section(page("metrics.md"), "## val_metrics.jsonl")) == row.keys()


def test_each_file_of_a_run_folder_is_described(finished_run):
    described = {name.rstrip("/") for name in first_cells(section(page("run-folder.md"), "## Files"))}
    written = {path.name for path in finished_run.iterdir() if not path.name.startswith(".")}
    paths = [path for path in vars(RunDir(Path("run"))).values() if isinstance(path, Path)]
    declared = {path.relative_to("run").parts[0] for path in paths if path != Path("run")}
    assert written | {name for name in declared if not name.startswith(".")} <= described
    assert all(name in page("run-folder.md") for name in declared)


def test_each_described_file_of_a_run_folder_is_written_by_the_code():
    described = first_cells(section(page("run-folder.md"), "## Files"))
    folders = ("training", "scripts", "common", "evaluation", "experiments", "data")
    code = "".join(file.read_text() for folder in folders for file in (CHECKOUT / folder).rglob("*.py"))
    for name in described:
        assert name.rstrip("/").replace("-N.", "-{len(rewinds)}.") in code, name


def test_each_script_and_target_is_described():
    text = page("command-line.md")
    scripts = {f"scripts/{file.name}" for file in (CHECKOUT / "scripts").glob("[!_]*.py")}
    assert scripts | {"scripts/slurm/train.sbatch"} == first_cells(section(text, "## Scripts"))
    targets = {*re.findall(r"^  make (\S+)", make("help-all"), re.M)}
    assert targets == first_cells(section(text, "## make"))


def test_readme_has_every_option_of_the_groups_of_a_run():
    """A row of several groups separates their options by semicolons."""
    text = (CHECKOUT / "README.md").read_text().split("| group | options |", 1)[1].split("\n\n", 1)[0]
    described = {}
    for groups, options in re.findall(r"^\| (`.*?) \| (.*) \|$", text, re.M):
        names = re.findall(r"`(\w+)`", groups)
        shares = options.split("; ") if len(names) > 1 else [options]
        described |= {g: {*re.findall(r"`(\w+)`", share)} for g, share in zip(names, shares, strict=True)}
    presets = {"experiment", "scale", "eval", "paper", "hydra"}
    folders = {folder for folder in (CHECKOUT / "configs").iterdir() if folder.is_dir() and folder.name not in presets}
    assert described == {folder.name: {file.stem for file in folder.glob("*.yaml")} for folder in folders}


def test_exit_statuses_and_signals_are_described():
    text = page("exit-statuses.md")
    assert f"| {EXIT_USER_ERROR} | a setting" in text and f"| {EXIT_CANNOT_CONTINUE} | the run cannot" in text
    rows = re.findall(r"\| (SIG\w+)[^|]*\| (\d+) \| (\d+) \|", text)
    expected = {(signum.name, str(int(signum)), str(128 + signum)) for signum in map(signal.Signals, SIGNALS)}
    assert {*rows} == expected


def test_definitions_have_the_numbers_of_the_code():
    text = " ".join(page("definitions.md").split())
    for phrase in (
        f"the last {definitions.SPIKE_WINDOW} steps before",
        f"m_t + {definitions.SPIKE_SIGMAS:g} \\cdot 1.4826",
        f"last {definitions.SCORE_WINDOW:,} steps",
        f"fewer than {definitions.SCORE_MIN_STEPS} before",
        f"than {definitions.DIVERGED} nats above the lowest mean",
        f"its last {health.WINDOW} losses are finite, and their median is at most {health.LOSS_MARGIN} nats",
        f"the {definitions.EXCESS_WINDOW} steps after it",
        f"line through {definitions.SLOPE_WINDOW} steps",
        f"mean of {definitions.RECOVERED_WINDOW} losses is first within {definitions.RECOVERED} nats",
        f"mean loss of {definitions.REACHED_WINDOW} steps is first",
        f"median of the last {natural_spikes.WINDOW} steps outside spikes",
        f"\\max({natural_spikes.BEGINS:g}\\, m_t,\\; m_t + {natural_spikes.BEGINS_NATS:g})",
        f"below {natural_spikes.ENDS:g} times the level",
        f"The first {natural_spikes.FIRST} steps",
        f"from {natural_spikes.CALM[0]} to {natural_spikes.CALM[1]} before the spike",
        f"is at least {natural_spikes.MIN_SIGMA:g}",
        f"{natural_spikes.WARNING_GAP} steps below the limit",
        f"| cures | below {statistics.CURE:g} |",
        f"below {statistics.SMALLEST_RATIO:g} | below -{statistics.SMALLEST_NATS:g} nats |",
        f"nats | below -{SMALLEST_EXCESS:g} nats |",
        f"An area of {AREA_OFFSET:g} nat x step",
    ):
        assert phrase in text, phrase
    assert definitions.SCORE_SIGMAS == 7 and "at least seven standard deviations" in text


def test_diagram_of_packages_shows_what_each_may_import():
    svg = (CHECKOUT / "docs" / "images" / "architecture.svg").read_text()
    arrows = dict.fromkeys(re.findall(r'<path id="(\w+)-(\w+)"', svg))
    reached = {package: {package} for package in MAY_IMPORT}
    for _ in MAY_IMPORT:
        for start, end in arrows:
            reached.setdefault(start, {start}).update(reached[end])
    assert {package: reached[package] for package in MAY_IMPORT} == MAY_IMPORT


@pytest.mark.parametrize("name", ["explanation/architecture.md", "how-to/reproduce-the-paper.md"])
def test_named_places_exist(name):
    text = (CHECKOUT / "docs" / name).read_text()
    packages = "training|zclip|models|data|evaluation|experiments|common|configs|scripts"
    places = re.findall(rf"`((?:{packages})/[\w./-]*)`", text)
    assert len(places) > 2
    missing = [place for place in places if not (CHECKOUT / place).exists()]
    assert not missing, missing


@cache
def messages() -> str:
    """Return all texts of the code, one a line, with {} for what is filled in."""
    files = [CHECKOUT / "train.py", *(file for folder in PACKAGES for file in (CHECKOUT / folder).rglob("*.py"))]
    found = []
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n".join(found)


@pytest.mark.parametrize("name, column", [("how-to/troubleshooting.md", 1), ("reference/exit-statuses.md", 2)])
def test_messages_are_those_of_the_code(name, column):
    text = (
        section((CHECKOUT / "docs" / name).read_text(), "## Causes of status 3") if column == 2 else page(f"../{name}")
    )
    cells = [line.split("|")[column] for line in text.splitlines() if line.startswith("|")]
    spans = [span for cell in cells for span in re.findall(r"`([^`]+)`", cell)]
    assert len(spans) > 5
    code = messages()
    unknown = [span for span in spans if not re.search(re.sub(r"\d+", r"(\\d+|{})", re.escape(span)), code)]
    assert not unknown, unknown
