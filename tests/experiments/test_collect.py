"""Runs that are collected from folders, some of which are missing, damaged or unexpected."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments.claims.verdict import NOT_TESTABLE, judge
from experiments.paper.claims import PAPER_CLAIMS
from experiments.paper.drawing import NothingToDraw
from experiments.paper.figures import FIGURES
from experiments.paper.render import fill_table, markdown
from experiments.paper.tables_and_figures import STRATEGIES, TABLES
from experiments.run.collect import collect
from tests.experiments.written_runs import (
    CORRUPTED_STEPS,
    expected_runs,
    places,
    run_of,
    score,
    with_settings,
    without,
    write_run,
)
from training.config.compose import saved_identity, to_yaml


def test_collected_runs_have_what_was_written(tmp_path):
    """Other tests have these contents in memory, and no files."""
    (key, (place, config)), *_ = expected_runs([STRATEGIES["ZClip"]], tmp_path).items()
    contents = {"bump": 0.3, "scores": [score("hellaswag", 100, acc=0.3)], "train_loss": 4.5}
    write_run(place.path, config, 0, **contents)
    run, expected = collect({key: place}, saved_identity).runs[key], run_of(place.path, config, 0, **contents)
    assert run.metrics.keys() == expected.metrics.keys()
    assert all(np.array_equal(run.metrics[name], column) for name, column in expected.metrics.items())
    assert run._replace(metrics={}) == expected._replace(metrics={})


def test_unexpected_and_modified_folders_are_named(table3, tmp_path):
    labels = list(STRATEGIES)
    expected = expected_runs(STRATEGIES.values(), tmp_path, seeds=(0, 1))
    folders = {(label, seed): expected[STRATEGIES[label], seed] for label in labels for seed in (0, 1)}
    for (label, seed), (place, config) in folders.items():
        if (label, seed) == ("AutoClip", 1):
            continue
        numbers = {"train_loss": None, "test_loss": None} if (label, seed) == ("No clipping", 1) else {}
        write_run(place.path, config, seed, done=(label, seed) != ("Fixed 1.0", 1), **numbers)
    first, config = folders["ZClip", 0]
    for name, change in (("again", {}), ("longer", {"trainer.max_steps": 400}), ("other-seed", {"seed": 7})):
        write_run(first.path.with_name(name), with_settings(config, {**change, "name": name}), 0)
    broken = first.path.with_name("broken")
    broken.mkdir()
    (broken / "config.yaml").write_text("{")
    changed, config = folders["ZClip", 1]
    (changed.path / "config.yaml").write_text(to_yaml(with_settings(config, {"clip.alpha": 0.5})))
    while_training, _ = folders["ZClip", 0]
    change = {"setting": "clip.z_thresh", "from": 2.5, "to": 3.0}
    (while_training.path / "environment.json").write_text(json.dumps({"starts": [{"step": 8, "changes": [change]}]}))
    collection = collect(places(expected), saved_identity)
    text = markdown(fill_table(TABLES["table3"], collection))
    for note in (
        "Not run: AutoClip (seed 1)",
        "Excluded: ZClip (seeds 0, 1)",
        "Unfinished: Fixed 1.0 (seed 1 after 140",
    ):
        assert f"\n- {note}" in text, note
    assert "Diverged: No clipping (seed 1)." in text and "4.900 (1 diverged, 1 of 2 seeds)" in text
    assert sorted(collection.warnings) == sorted(
        [
            f"again is excluded: a copy of {first.path.name} under another name",
            "longer is excluded: not a run of these experiments (trainer.max_steps=400, not 140)",
            "broken is excluded: config.yaml cannot be read",
            f"{changed.path.name} is excluded: config.yaml was changed (clip.alpha=0.5, not 0.97)",
            f"{while_training.path.name} is excluded: clip.z_thresh was changed while it trained",
        ]
    )


def moved_to(folder: Path, table3: tuple[Path, dict], *labels: str) -> dict:
    """Copy the runs of some strategies, or of all, and return where each is then."""
    runs, expected = table3
    specs = [STRATEGIES[label] for label in labels or STRATEGIES]
    moved = {
        key: place._replace(path=folder / "runs" / place.path.relative_to(runs))
        for key, place in expected.items()
        if key[0] in specs
    }
    for key, place in moved.items():
        shutil.copytree(expected[key].path, place.path)
    return moved


def test_integer_and_the_equal_float_are_one_setting(table3, tmp_path):
    """A class of one's own is not imported to read a folder, so it is not known which of them it declares."""
    expected = moved_to(tmp_path, table3, "ZClip")
    known = {
        key: run._replace(identity={"update": {"sigmas": 5.0, "betas": [1.0, 0.5]}}) for key, run in expected.items()
    }
    for sigmas, runs in ((5, len(known)), (6, 0)):
        saved = {"update": {"sigmas": sigmas, "betas": [1, 0.5]}}
        assert len(collect(known, lambda config, saved=saved: saved).runs) == runs


def test_divergence_is_detected_from_losses_and_results(table3, tmp_path):
    """Finite losses can have diverged; those of corrupted batches do not count."""
    moved = moved_to(tmp_path, table3, "ZClip", "Fixed 1.0")

    def write(label, seed, loss=None, **numbers):
        path = moved[STRATEGIES[label], seed].path
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        if loss is not None:
            rows = [row | {"loss": loss(row)} for row in rows]
            (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = json.loads((path / "result.json").read_text())
        (path / "result.json").write_text(json.dumps(result | numbers))

    write("ZClip", 0, lambda row: 5.0 if row["step"] < 120 else 5.7)
    write("ZClip", 1, lambda row: 5.0 if row["step"] < 120 else 5.3)
    write("ZClip", 2, lambda row: -5.0 if row["step"] in CORRUPTED_STEPS else 5.0)
    write("Fixed 1.0", 0, test_loss=None)
    write("Fixed 1.0", 1, train_loss=None)
    collection = collect(moved, saved_identity)
    assert len(collection.runs) == 6
    assert collection.diverged == {(STRATEGIES["ZClip"], 0), (STRATEGIES["Fixed 1.0"], 0), (STRATEGIES["Fixed 1.0"], 1)}


def test_missing_seeds_are_named_and_excluded_ones_are_not_missing(table3, tmp_path):
    moved = moved_to(tmp_path, table3)
    for (_, seed), place in moved.items():
        if seed == 1:
            (place.path / "config.yaml").unlink()
        if seed == 2:
            shutil.rmtree(place.path)
    collection = collect(moved, saved_identity)
    assert collection.seeds == [0, 1] and collection.excluded == {key for key in moved if key[1] == 1}
    assert collection.warnings[-1] == "there is no run of seed 2" and collection.warnings[0].endswith(
        "excluded: no config.yaml"
    )
    assert "Excluded: No clipping (seed 1), Fixed 1.0 (seed 1)" in markdown(fill_table(TABLES["table3"], collection))


def test_tables_and_figures_without_runs_are_empty(tmp_path):
    collection = collect(places(expected_runs(STRATEGIES.values(), tmp_path)), saved_identity)
    for table in TABLES.values():
        text = markdown(fill_table(table, collection))
        assert text.endswith("\n\n- No run of this table is finished.\n")
        assert all(not cell.values for row in fill_table(table, collection).cells for cell in row)
    for name in FIGURES:
        with pytest.raises(NothingToDraw):
            FIGURES[name](collection)
    assert {verdict.outcome for verdict in judge(PAPER_CLAIMS, collection)} == {NOT_TESTABLE}


def damage(file: Path, content) -> None:
    """Write a file, change keys of its object, repeat its first line as its last, or make something else of it."""
    if content is None:
        lines = file.read_text().splitlines(keepends=True)
        content = "".join([*lines[:-1], lines[0]])
    elif isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content) if file.exists() else json.dumps(content)
    file.unlink(missing_ok=True)
    if callable(content):
        content(file)
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.jsonl", "", "metrics.jsonl: all lines are lost"),
        ("metrics.jsonl", "[1]\n", "damaged ("),
        ("metrics.jsonl", '{"step": 1}\n{"st', "damaged (metrics.jsonl, line 1: tokens={'step': 1}: "),
        ("metrics.jsonl", '{"step":1,"tokens":1,"loss":1,"grad_norm":1}\n{"st', "damaged (metrics.jsonl, line 2: "),
        ("result.json", "{", "damaged (result.json: "),
        ("task_scores.json", "{", "damaged (task_scores.json: "),
        ("metrics.jsonl", None, "not of the same run"),
        ("result.json", {"steps": 10**15}, "not of the same run"),
        (
            "result.json",
            '{"steps": 140, "tokens": 1}',
            "damaged (result.json: train_loss={'steps': 140, 'tokens': 1}: ",
        ),
        ("result.json", {"test_loss": "4"}, "damaged (result.json: test_loss='4': Input should be a valid number)"),
        ("result.json", {"test_loss": float("nan")}, "damaged (result.json: test_loss=nan: "),
        ("result.json", {"steps": True}, "damaged (result.json: steps=True: Input should be a valid integer)"),
        ("result.json", {"data_fingerprint": None}, "damaged (result.json: data_fingerprint=None: "),
        ("result.json", {"data_fingerprint": "\ud800"}, "damaged (result.json: "),
        ("result.json", {"step_seconds": [1]}, "damaged (result.json: step_seconds=[1]: "),
        ("result.json", '{"tokens": ' + "1" * 5000 + "}", "damaged (result.json: "),
        ("result.json", {"tokens": 10**4000}, "damaged (result.json: tokens=1000"),
        ("result.json", "[" * 100_000, "damaged (result.json: nested too deeply)"),
        ("result.json", '{"a":' * 1000, "damaged (result.json: "),
        ("metrics.jsonl", "[1, 2]\n", "damaged (metrics.jsonl, line 1: not an object)"),
        ("metrics.jsonl", '{"step": 1}' * 2_000_000, "damaged (metrics.jsonl, line 1: "),
        ("metrics.jsonl", '{"step": 1e400}', "damaged (metrics.jsonl, line 1: step=inf: "),
        ("metrics.jsonl", "\0\0\0", "damaged (metrics.jsonl, line 1: "),
        ("metrics.jsonl", b"\xff\xfe", "damaged (metrics.jsonl, line 1: "),
        ("environment.json", "[]", "damaged (environment.json: not an object)"),
        ("environment.json", '{"starts": [null]}', "damaged (environment.json: starts.0=None: "),
        ("environment.json", '{"starts": [{"versions": 3}]}', "damaged (environment.json: starts.0.versions=3: "),
        ("task_scores.json", '{"scores": null}', "damaged (task_scores.json: scores=None: "),
        ("task_scores.json", '{"scores": [{}]}', "damaged (task_scores.json: scores.0.task={}: "),
        (
            "task_scores.json",
            {"scores": [score("winogrande", 1, acc=True)]},
            "has a score of winogrande that is not a nu",
        ),
        ("task_scores.json", {"scores": [score("winogrande", 1, acc=float("nan"))]}, "damaged ("),
        ("task_scores.json", {"scores": [score("winogrande", 1, truncated_fraction=[1])]}, "damaged ("),
        (
            "metrics.jsonl",
            '{"step": 1, "tokens": 1, "loss": 1e200, "grad_norm": 1}',
            "damaged (metrics.jsonl: loss has 1e+200, which is no measurement)",
        ),
        (
            "metrics.jsonl",
            '{"step": 1, "tokens": 1, "loss": 1, "grad_norm": -1, "clipped_norm": 1, "clipped": 0}',
            "damaged (metrics.jsonl has grad_norm below 0)",
        ),
        ("metrics.jsonl", os.mkfifo, "damaged ("),
        ("metrics.jsonl", os.mkdir, "damaged ("),
        ("environment.json", os.mkdir, "damaged ("),
        ("config.yaml", os.mkfifo, "no config.yaml"),
        ("config.yaml", "a: " * 1000, "cannot be read"),
        ("config.yaml", "[" * 1000, "cannot be read"),
        ("config.yaml", "a: &a [1]\nb: [*a, *a]\n", "cannot be read"),
        ("config.yaml", "[1]", "cannot be read"),
        ("config.yaml", "trainer: x", "cannot be read"),
    ],
)
def test_damaged_files_are_named_and_their_run_excluded(file, text, message, table3, tmp_path):
    moved, key = moved_to(tmp_path, table3, "AutoClip"), (STRATEGIES["AutoClip"], 1)
    damage(moved[key].path / file, text)
    unexpected = moved[key].path.with_name("unexpected")
    unexpected.mkdir()
    (unexpected / "config.yaml").write_text("[1]")
    collection = collect(moved, saved_identity)
    assert key not in collection.runs and len(collection.runs) == 2 and collection.excluded == {key}
    assert file == "config.yaml" or "remove the folder to train it again" in "".join(collection.warnings)
    assert any(message in line and moved[key].path.name in line for line in collection.warnings), collection.warnings
    (unread,) = [line for line in collection.warnings if "unexpected" in line]
    assert unread.endswith(" excluded: config.yaml cannot be read")


def test_zclip_run_needs_its_statistics_and_scores_may_lack_a_number(table3, tmp_path):
    moved = moved_to(tmp_path, table3, "ZClip")
    for (_, seed), place in moved.items():
        metrics, scores = place.path / "metrics.jsonl", place.path / "task_scores.json"
        if seed == 1:
            metrics.write_text(metrics.read_text().replace('"std"', '"deviation"'))
        scores.write_text(json.dumps({"scores": [score("hellaswag", 100, acc=None)]}))
    collection = collect(moved, saved_identity)
    assert collection.excluded == {(STRATEGIES["ZClip"], 1)}
    assert collection.warnings[0].endswith(
        "damaged (metrics.jsonl has no std): restore the file, or remove the folder to train it again"
    )


def test_tokens_of_a_run_grow_with_its_steps(table3, tmp_path):
    moved, key = moved_to(tmp_path, table3, "AutoClip"), (STRATEGIES["AutoClip"], 1)
    metrics = moved[key].path / "metrics.jsonl"
    metrics.write_text(re.sub('"tokens": [0-9]+', '"tokens": 0', metrics.read_text()))
    collection = collect(moved, saved_identity)
    assert collection.excluded == {key} and "has tokens that do not grow" in collection.warnings[0]


def test_notes_name_each_run_once(everything):
    missing = without(everything, (STRATEGIES["ZClip"], 1))
    assert missing.notes([("ZClip", STRATEGIES["ZClip"])] * 2) == ["not run: ZClip (seed 1)"]


def test_folders_excluded_for_the_same_reason_are_listed_together(table3, tmp_path):
    moved = moved_to(tmp_path, table3, "ZClip")
    (folder,) = {place.path.parent for place in moved.values()}
    for name in "edcba":
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text("{")
    collection = collect(moved, saved_identity)
    assert collection.warnings == ["a, b, c and 2 more are excluded: config.yaml cannot be read"]
