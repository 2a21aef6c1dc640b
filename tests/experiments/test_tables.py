"""From run folders to tables; folders that are not what they should be."""

import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.paper.claims import NOT_TESTABLE, verdicts
from experiments.paper.collect import collect
from experiments.paper.drawing import NothingToDraw
from experiments.paper.figures import DRAWN, draw
from experiments.paper.suites import STRATEGIES, TABLES
from experiments.paper.tables import about, as_csv, fill, latex, markdown
from tests.experiments.conftest import BAD, expected, write_run
from training.config.checks import identity


@pytest.mark.parametrize("name", TABLES)
def test_each_table_to_the_letter(name, everything):
    """The files were held against the runs by hand; what changes a table on purpose writes them again."""
    assert markdown(fill(TABLES[name], everything)) == (Path(__file__).parent / "tables" / f"{name}.md").read_text()


def test_numbers_of_fewer_seeds_say_so_and_are_not_the_best(everything):
    others = {(STRATEGIES["ZClip"], seed) for seed in (1, 2)}
    found = everything._replace(runs={key: run for key, run in everything.runs.items() if key not in others})
    text = markdown(fill(TABLES["table3"], found))
    assert "| 4.950 (1 of 3 seeds) |" in text and "**4.965 ± 0.015**" in text, text


def test_the_best_is_of_the_same_seeds(everything):
    """Fixed clipping lacks the worst seed, and ZClip the best: neither is compared."""
    gone = {(STRATEGIES["Fixed 1.0"], 2), (STRATEGIES["ZClip"], 0)}
    losses = {"No clipping": 7.0, "Fixed 1.0": 4.1, "AutoClip": 6.0, "ZClip": 4.0}
    runs = {key: run for key, run in everything.runs.items() if key not in gone}
    for label, loss in losses.items():
        for seed in (0, 1, 2):
            if (key := (STRATEGIES[label], seed)) in runs:
                runs[key] = runs[key]._replace(result={**runs[key].result, "test_loss": loss + seed})
    text = markdown(fill(TABLES["table3"], everything._replace(runs=runs)))
    assert "| 4.600 ± 0.707 (2 of 3 seeds) |" in text and "| **7.000 ± 1.000** |" in text, text


def test_where_some_have_diverged_and_others_have_no_number(everything):
    runs = {key: run._replace(scores=()) for key, run in everything.runs.items()}
    table = TABLES["table3"]
    for gone, said in (((1,), "| 1 diverged | "), ((0, 1, 2), "| diverged | ")):
        found = everything._replace(runs=runs, diverged={(STRATEGIES["AutoClip"], seed) for seed in gone})
        (row,) = (row for row in markdown(fill(table, found)).splitlines() if row.startswith("| AutoClip |"))
        assert row.count(said) == 2, row


def test_an_undisturbed_run_that_diverged_is_no_measure(everything):
    lab = {row.label: row.settings for row in TABLES["spike_lab"].rows}
    runs = everything.runs | {
        (lab["AutoClip"]["bad"], seed): run._replace(result={**run.result, "test_loss": 4.0})
        for seed in (0, 1, 2)
        for run in (everything.runs[lab["AutoClip"]["bad"], seed],)
    }
    gone = everything._replace(runs=runs, diverged={(lab["AutoClip"]["good"], 1)})
    (row,) = (row for row in markdown(fill(TABLES["spike_lab"], gone)).splitlines() if row.startswith("| AutoClip |"))
    assert row.count("(1 diverged)") == 5 and row.count("**") == 2, "the disturbed run's own loss is none of them"
    key = (lab["ZClip"]["bad"], 1)
    loss = everything.runs[key].metrics["loss"].copy()
    loss[83] = float("nan")
    runs = everything.runs | {
        key: everything.runs[key]._replace(metrics={**everything.runs[key].metrics, "loss": loss})
    }
    text = markdown(fill(TABLES["spike_lab"], everything._replace(runs=runs)))
    assert "| ZClip | 0.027 ± 0.004 (1 diverged, 2 of 3 seeds) |" in text and "where losses are not finite" in text
    fewer = {other: run for other, run in everything.runs.items() if other != key}
    assert "Not run: ZClip, with bad batches (seed 1)." in markdown(
        fill(TABLES["spike_lab"], everything._replace(runs=fewer))
    )


def test_bad_batches_at_other_steps_in_the_lab(everything):
    """One list of steps may begin as another."""
    runs = dict(everything.runs)
    key = next(key for key, run in runs.items() if run.config["data"]["corruption"]["steps"])
    config = {
        **runs[key].config,
        "data": {**runs[key].config["data"], "corruption": {"steps": [80], "kind": "repeat"}},
    }
    said = about([runs[key], runs[key]._replace(config=config)], [0])
    assert "put in at steps 80, bad batches of kind repeat put in at steps 80, 100, 120" in said


def test_latex_and_csv(table3):
    _, places = table3
    filled = fill(TABLES["table3"], collect(places, identity))
    assert "No clipping & 3.0 $\\pm$ 0.0 & 12 &" in latex(filled) and "\\textbf{4.910 $\\pm$ 0.010}" in latex(filled)
    rows = as_csv(filled).splitlines()
    assert rows[0] == "table,row,column,paper,mean,std,runs,diverged"
    assert "table3,No clipping,test loss,2.9,6.91,0.01,3,0" in rows


def test_runs_that_are_not_what_they_should_be_are_named(table3, tmp_path):
    labels = list(STRATEGIES)
    places = expected(STRATEGIES.values(), tmp_path, seeds=(0, 1))
    folders = {(label, seed): places[STRATEGIES[label], seed] for label in labels for seed in (0, 1)}
    for (label, seed), (place, cfg) in folders.items():
        if (label, seed) == ("AutoClip", 1):
            continue
        gone = {"train_loss": None, "test_loss": None} if (label, seed) == ("No clipping", 1) else {}
        write_run(place.path, cfg, seed, done=(label, seed) != ("Fixed 1.0", 1), **gone)
    first, cfg = folders["ZClip", 0]
    for name, change in (("again", {}), ("longer", {"trainer": {"max_steps": 400}}), ("other-seed", {"seed": 7})):
        write_run(first.path.with_name(name), OmegaConf.merge(cfg, change, {"name": name}), 0)
    broken = first.path.with_name("broken")
    broken.mkdir()
    (broken / "config.yaml").write_text("{")
    changed, cfg = folders["ZClip", 1]
    OmegaConf.save(OmegaConf.merge(cfg, {"clip": {"alpha": 0.5}}), changed.path / "config.yaml")
    found = collect({key: place for key, (place, _) in places.items()}, identity)
    text = markdown(fill(TABLES["table3"], found))
    assert (
        "Not run: AutoClip (seed 1). Left out: ZClip (seed 1). Unfinished: Fixed 1.0 (seed 1 after 140 steps)." in text
    )
    assert "Diverged: No clipping (seed 1)." in text and "4.900 (1 diverged, 1 of 2 seeds)" in text
    assert sorted(found.others) == sorted(
        [
            f"again is left out: {first.path.name} again, under a name of its own",
            "longer is left out: no run of these experiments (trainer.max_steps=400, not 140)",
            "broken is left out: config.yaml cannot be read",
            f"{changed.path.name} is left out: config.yaml was changed (clip.alpha=0.5, not 0.97)",
        ]
    )


def moved_to(folder: Path, table3: tuple[Path, dict]) -> dict:
    """Copy the runs of Table 3, and return where each is then."""
    runs, places = table3
    shutil.copytree(runs, folder / "runs")
    return {key: place._replace(path=folder / "runs" / place.path.relative_to(runs)) for key, place in places.items()}


def test_what_has_diverged_is_seen_on_the_disk(table3, tmp_path):
    """By its losses, where they are finite too; those of bad batches do not count, nor an end that was not found."""
    moved = moved_to(tmp_path, table3)

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
    write("ZClip", 2, lambda row: -5.0 if row["step"] in BAD else 5.0)
    write("Fixed 1.0", 0, test_loss=float("inf"))
    write("Fixed 1.0", 1, train_loss=None)
    found = collect(moved, identity)
    assert len(found.runs) == 12
    assert found.diverged == {(STRATEGIES["ZClip"], 0), (STRATEGIES["Fixed 1.0"], 0), (STRATEGIES["Fixed 1.0"], 1)}


def test_seeds_that_are_not_there_are_named_and_those_left_out_are_not_said_to_be_missing(table3, tmp_path):
    moved = moved_to(tmp_path, table3)
    for (_, seed), place in moved.items():
        if seed == 1:
            (place.path / "config.yaml").unlink()
        if seed == 2:
            shutil.rmtree(place.path)
    found = collect(moved, identity)
    assert found.seeds == [0, 1] and found.refused == {key for key in moved if key[1] == 1}
    assert found.others[-1] == "there is no run of seed 2" and found.others[0].endswith("left out: no config.yaml")
    assert "Left out: No clipping (seed 1), Fixed 1.0 (seed 1)" in markdown(fill(TABLES["table3"], found))


def test_what_was_not_run_is_empty_and_never_guessed(tmp_path):
    places = {key: place for key, (place, _) in expected(STRATEGIES.values(), tmp_path).items()}
    found = collect(places, identity)
    for table in TABLES.values():
        text = markdown(fill(table, found))
        assert text.endswith("\n\nNo run of this table is done.\n")
        assert all(not cell.values for row in fill(table, found).cells for cell in row)
    for name in DRAWN:
        with pytest.raises(NothingToDraw):
            draw(name, found)
    assert {verdict.verdict for verdict in verdicts(found)} == {NOT_TESTABLE}


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("metrics.jsonl", "", "metrics.jsonl has no step, tokens"),
        ("metrics.jsonl", "[1]\n", "damaged ("),
        ("metrics.jsonl", '{"step": 1}\n{"st', "damaged (metrics.jsonl, line 2: "),
        ("result.json", "{", "damaged (result.json: "),
        ("task_scores.json", "{", "damaged (task_scores.json: "),
        ("metrics.jsonl", None, "not of one run"),
        ("result.json", '{"steps": 140, "tokens": 1}', "result.json has parameters=None, which is no number"),
        ("result.json", '{"steps": 140, "tokens": 1, "parameters": 1, "test_loss": "4"}', "test_loss='4', which is no"),
        ("result.json", '{"steps": 140, "tokens": 1, "parameters": 1}', "result.json has no data_fingerprint"),
        (
            "result.json",
            '{"steps": 140, "tokens": 1, "parameters": 1, "data_fingerprint": "x", "step_seconds": [1]}',
            "step_seconds=[1], which are no parts",
        ),
        ("environment.json", "[]", "damaged ("),
        ("environment.json", '{"starts": [null]}', "environment.json holds no list of starts"),
        ("task_scores.json", '{"scores": null}', "damaged ("),
        ("task_scores.json", '{"scores": [{}]}', "task_scores.json has a score that is none"),
        ("config.yaml", "[1]", "cannot be read"),
        ("config.yaml", "trainer: x", "cannot be read"),
    ],
)
def test_a_damaged_file_is_named_and_its_run_left_out(file, text, said, table3, tmp_path):
    moved, key = moved_to(tmp_path, table3), (STRATEGIES["AutoClip"], 1)
    damaged = moved[key].path / file
    lines = damaged.read_text().splitlines(keepends=True) if text is None else []
    damaged.write_text("".join([*lines[:-1], lines[0]]) if text is None else text)
    stranger = moved[key].path.with_name("stranger")
    stranger.mkdir()
    (stranger / "config.yaml").write_text("[1]")
    found = collect(moved, identity)
    assert key not in found.runs and len(found.runs) == 11 and found.refused == {key}
    assert file == "config.yaml" or "a folder that is removed is trained again" in "".join(found.others)
    assert any(said in line and moved[key].path.name in line for line in found.others), found.others
    (unread,) = [line for line in found.others if "stranger" in line]
    assert unread.endswith(" left out: config.yaml cannot be read")


def test_folders_left_out_for_one_reason_are_said_together(table3, tmp_path):
    moved = moved_to(tmp_path, table3)
    (folder,) = {place.path.parent for place in moved.values()}
    for name in "edcba":
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text("{")
    found = collect(moved, identity)
    assert found.others == ["a, b, c and 2 more are left out: config.yaml cannot be read"]
