"""Runs next to each other: labels, differences worked out by hand, the picture, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from experiments.run.compare import (
    best,
    compared,
    differences,
    draw_comparison,
    on_same_batches,
    picture_path,
    sentences,
)
from experiments.run.read import Run, read_run
from experiments.run.style import STRATEGY_STYLES
from tests.helpers import RESULT, same_handlers, script
from tests.scripts.loading import load_script
from training.launch.sweep import CompletedJob

BAD = [10, 11]


def write(folder: Path, clip: str, above: float, test_loss: float | None, seed: int = 0, **clip_settings: float) -> Run:
    """Write a run of 30 steps whose loss is `above` 4 after the corrupted batches, and return it."""
    config = {"seed": seed, "lr": 0.01, "clip": {"name": clip, "_target_": clip, **clip_settings}}
    config |= {"data": {"name": "text", "corruption": {"steps": BAD, "kind": "repeat"}}}
    config |= {"trainer": {"global_batch_size": 8}, "model": {"name": "nano"}}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(config))
    rows = [
        {"step": step, "tokens": 8 * step, "loss": 9.0 if step in BAD else 4.0 + above * (step > BAD[-1]),
         "grad_norm": 5.0 if step in BAD else 0.5, "clipped_norm": 0.4 if step in BAD else 0.5,
         "clipped": float(step in BAD)}
        for step in range(1, 31)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "result.json").write_text(json.dumps(RESULT | {"steps": 30, "test_loss": test_loss}))
    return read_run(folder)


def together(*runs: Run):
    return compared(runs, [run.config for run in runs])


@pytest.fixture
def three(tmp_path):
    values = {"none": (0.3, 4.4), "fixed": (0.1, 4.1), "zclip": (0.02, 4.04)}
    return [write(tmp_path / clip, clip, above, test) for clip, (above, test) in values.items()]


def test_differences_from_the_best_run_are_said_in_nats(three):
    runs = together(*three)
    assert best(runs).label == "clip=zclip" and on_same_batches(runs)
    assert [(one.label, round(one.after_corrupted, 3), round(one.test_loss, 3)) for one in differences(runs)] == [
        ("clip=none", 0.28, 0.36), ("clip=fixed", 0.08, 0.06),
    ]  # fmt: skip
    assert sentences(runs) == (
        "In the 10 steps after a corrupted batch, the training loss was 0.28 nats higher with clip=none and 0.08 nats "
        "higher with clip=fixed than with clip=zclip.\n"
        "The final test loss was 0.36 nats higher with clip=none and 0.06 nats higher with clip=fixed."
    )


def test_losses_that_are_the_same_are_not_called_higher(tmp_path):
    """Those of a run and its copy. A difference that two digits do not show is said to be that small."""
    names = {"a": 4.1, "copy": 4.1, "near": 4.1004, "far": 4.3}
    runs = together(*(write(tmp_path / name, "zclip", 0.1, loss) for name, loss in names.items()))
    assert sentences(runs) == (
        "In the 10 steps after a corrupted batch, the training loss was the same with copy, with near and with far as "
        "with a.\n"
        "The final test loss was less than 0.01 nats higher with near and 0.20 nats higher with far.\n"
        "The final test loss was the same with copy as with a."
    )


def test_lower_training_loss_than_the_best_run_is_called_lower(tmp_path):
    runs = together(write(tmp_path / "a", "fixed", 0.0, 4.2), write(tmp_path / "b", "zclip", 0.5, 4.1))
    assert "the training loss was 0.50 nats lower with clip=fixed than with clip=zclip." in sentences(runs)


def test_runs_on_other_batches_are_compared_by_their_test_loss_alone(tmp_path):
    runs = together(write(tmp_path / "a", "zclip", 0.0, 4.1), write(tmp_path / "b", "zclip", 0.1, None, seed=1))
    assert not on_same_batches(runs) and [one.label for one in runs] == ["seed=0", "seed=1"]
    assert sentences(runs) == "The final test loss was not finite with seed=1."
    assert len(draw_comparison(runs).axes) == 2


def test_no_run_is_called_the_best_if_none_has_a_test_loss(tmp_path):
    runs = together(*(write(tmp_path / clip, clip, 0.0, None) for clip in ("fixed", "zclip")))
    assert sentences(runs) == "No run has a finite test loss."


def test_training_losses_that_are_not_finite_are_named_beside_the_differences(three):
    three[1].metrics["loss"][15] = np.nan
    assert sentences(together(*three)).splitlines()[:2] == [
        "In the 10 steps after a corrupted batch, the training loss was 0.28 nats higher with clip=none than with "
        "clip=zclip.",
        "In the 10 steps after a corrupted batch, the training loss was not finite with clip=fixed.",
    ]


def test_setting_that_was_changed_in_a_run_is_named(three):
    change = {"setting": "clip.z_thresh", "from": 2.5, "to": None}
    three[2] = three[2]._replace(starts=[{"step": 0}, {"step": 8, "changes": [change]}])
    line = "With clip=zclip, clip.z_thresh is null since step 8, and was 2.5 before."
    assert sentences(together(*three)).splitlines()[-1] == line


def test_steps_are_not_compared_with_those_of_a_run_that_has_skipped_batches_or_lacks_steps(three):
    skipped = [{"from_step": 20, "to_step": 15, "skipped_batches": 5}]
    later = {name: column + (name == "step") for name, column in three[0].metrics.items()}
    assert not on_same_batches(together(three[0], three[1]._replace(rewinds=skipped)))
    assert not on_same_batches(together(three[0]._replace(metrics=later), three[1]))


def test_picture_of_runs_named_in_both_ways_is_in_the_folder_that_has_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert picture_path([Path("runs/a/1"), Path("runs/b/1")]) == Path("runs/comparison.png")
    assert picture_path([Path("runs/a/1"), tmp_path / "runs/a/2"]) == tmp_path / "runs/a/comparison.png"


@pytest.mark.parametrize(
    ("clips", "labels"),
    [
        ([("zclip", {"alpha": 0.9}), ("fixed", {"max_norm": 1.0})], ["clip=zclip", "clip=fixed"]),
        ([("zclip", {"alpha": 0.9}), ("zclip", {"alpha": 0.5})], ["clip.alpha=0.9", "clip.alpha=0.5"]),
        (
            [("zclip", {"alpha": 0.9}), ("zclip", {"alpha": 0.5}), ("none", {})],
            ["clip=zclip clip.alpha=0.9", "clip=zclip clip.alpha=0.5", "clip=none"],
        ),
        ([("zclip", {}), ("zclip", {})], ["0", "1"]),
    ],
)
def test_label_of_a_run_has_the_settings_in_which_it_differs(clips, labels, tmp_path):
    runs = [write(tmp_path / str(i), clip, 0.0, 4.0, **more) for i, (clip, more) in enumerate(clips)]
    assert [one.label for one in together(*runs)] == labels


def test_run_without_a_group_that_another_has_is_labelled_as_having_none(tmp_path):
    runs = [write(tmp_path / str(i), "zclip", 0.0, 4.0) for i in range(3)]
    rules = [{}, {"update": {"name": "brake", "release": 0.9}}, {"update": {"name": "monitor"}}]
    labelled = compared(runs, [run.config | rule for run, rule in zip(runs, rules, strict=True)])
    assert [one.label for one in labelled] == ["update=none", "update=brake", "update=monitor"]


def test_copies_of_a_run_in_folders_of_the_same_name_are_told_apart(tmp_path):
    runs = [write(tmp_path / parent / "run", "zclip", 0.0, 4.0) for parent in "ab"]
    assert [one.label for one in together(*runs)] == [str(tmp_path / parent / "run") for parent in "ab"]


def test_long_lists_are_shortened_in_labels(three):
    identities = [{"steps": steps} for steps in ([], [120, 121, 155, 192], [5])]
    assert [one.label for one in compared(three, identities)] == ["steps=[]", "steps=[120, ..., 192]", "steps=[5]"]


def test_picture_has_losses_differences_and_norms_in_the_colours_of_the_strategies(three):
    loss, difference, norm = draw_comparison(together(*three)).axes
    assert [line.get_color() for line in loss.lines] == [
        STRATEGY_STYLES[clip].color for clip in ("none", "fixed", "zclip")
    ]
    assert np.isnan(loss.lines[0].get_ydata()[9:11]).all(), "corrupted batches have no loss"
    assert difference.lines[0].get_ydata()[15] == pytest.approx(0.28)
    assert norm.get_yscale() == "log"
    assert "clip=zclip, test loss 4.04" in loss.get_legend_handles_labels()[1]
    assert "clip=fixed, 7% of steps clipped" in norm.get_legend_handles_labels()[1]


def test_command_prints_the_table_and_writes_the_picture(finished_run, diverged_run, tmp_path):
    runs = f"run=[{finished_run},{diverged_run}]"
    done = script("compare.py", runs, "out=new/both.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "clip=zclip" in done.stdout and done.stdout.endswith("picture  new/both.png\n")
    assert (tmp_path / "new/both.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_without_a_picture_ends_with_its_table_and_says_why(three, capsys):
    with same_handlers():
        from train import report_sweep
    jobs = [CompletedJob({"clip": run.path.name}, RESULT, run.path) for run in three]
    report_sweep(jobs)
    printed = capsys.readouterr().out
    assert "│ zclip │" in printed and "comparison.png cannot be drawn (name is not set" in printed
    report_sweep([job._replace(path=job.path / str(i)) for job in jobs for i in range(3)])
    assert capsys.readouterr().out.endswith("draws some of them\n")


def test_mistakes_of_the_command_are_one_sentence(three, tmp_path):
    compare = load_script("compare")
    for settings, problem in (
        ({"run": str(tmp_path / "zclip")}, "has 1 finished runs: 2 to 7 can be compared"),
        ({"run": [str(tmp_path / "zclip")] * 2}, "has 1 finished runs"),
        ({"run": str(tmp_path / "gone")}, "does not exist"),
        ({"run": str(tmp_path), "out": str(tmp_path)}, "must be a file that ends in .png"),
    ):
        with pytest.raises(UserError, match=problem):
            compare.main(settings)
    with pytest.raises(UserError, match=r"run=.*/fixed cannot be read \(name is not set"):
        compare.main({"run": str(tmp_path)})
    (tmp_path / "zclip" / "metrics.jsonl").write_text("x\n")
    with pytest.raises(UserError, match=r"run=.*/zclip cannot be read \(metrics.jsonl, line 1"):
        compare.main({"run": [str(tmp_path / "zclip"), str(tmp_path / "none")]})
    (tmp_path / "zclip" / "result.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        compare.main({"run": [str(tmp_path / "zclip")]})
