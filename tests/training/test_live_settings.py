"""Arguments of the clipping strategy may change on resume; the run folder says so, and they stay."""

import json
import math

import pytest
from rich.console import Console

from common.reading import check_record
from common.run_files import Environment, setting_changes
from tests.helpers import final_state, interrupt, interrupted, only_run, read_jsonl, same, train_to_end
from training.checkpoint.format import load_full
from training.config.compose import read_config
from training.config.identity import identity, run_name
from training.config.live import describe_changes
from training.run import prepare_tokens
from training.run_dir import RunDir


@pytest.fixture
def run(finished_run, tmp_path, monkeypatch):
    """The folder of a run that was interrupted after step 16 of 40."""
    monkeypatch.chdir(tmp_path)
    return interrupted(finished_run, tmp_path, 16)


def starts(run) -> list[dict]:
    return json.loads((run / "environment.json").read_text())["starts"]


def clipper(run, step: int) -> dict:
    (state,) = load_full(RunDir(run).checkpoint(step))["callbacks"]["TimedClippingCallback"]["strategies"]
    return state


CHANGES = [
    {"setting": "clip.max_grad_norm", "from": 1.0, "to": 0.25},
    {"setting": "clip.z_thresh", "from": 2.5, "to": 0.5},
]


def test_changed_arguments_act_and_stay(run, tiny, checked, tmp_path):
    begun, before = (run / "config.yaml").read_text(), read_jsonl(run / "metrics.jsonl")
    out = train_to_end(f"resume={run}", "clip.z_thresh=0.5", "clip.max_grad_norm=0.25", cwd=tmp_path)
    assert "clip.z_thresh=0.5 since step 16 (it was 2.5)" in out
    assert "changed setting" in out and "since step 16; it was 2.5" in out
    assert (run / "config.yaml").read_text() == begun
    assert [start.get("changes") for start in starts(run)] == [None, CHANGES]
    rows, (_, _, test_loss) = read_jsonl(run / "metrics.jsonl"), final_state(tmp_path)
    assert [row["loss"] for row in rows[:17]] == [row["loss"] for row in before[:17]]
    assert [row.get("changes") for row in rows] == [None] * 16 + [2.0] * 24
    assert [row["clipped_norm"] for row in rows[:16]] == [row["clipped_norm"] for row in before[:16]]
    assert all(row["clipped_norm"] <= 0.2501 for row in rows[16:]) and before[16]["clipped_norm"] > 0.2501
    assert json.loads((run / "result.json").read_text())["changes"] == [{"step": 16, **change} for change in CHANGES]
    state = clipper(run, 40)
    assert (state["config"]["z_thresh"], state["config"]["max_grad_norm"]) == (0.5, 0.25)
    assert state["changes"] == [["max_grad_norm", 1.0, 0.25], ["z_thresh", 2.5, 0.5]]

    interrupt(run, 24)
    train_to_end(f"resume={run}", cwd=tmp_path)
    assert final_state(tmp_path)[2] == test_loss and same(clipper(run, 40), state)
    assert [start.get("changes") for start in starts(run)] == [None, CHANGES, None]
    command = (*tiny, "trainer.checkpoint_every=8", "trainer.keep_last=9")  # with which it began
    for again in (command, (f"resume={run}", "clip.z_thresh=0.5")):
        config, run_dir = checked(*again)
        assert run_dir.path.samefile(run) and run_name(config) == run.name
        assert config.clip.arguments["max_grad_norm"] == 0.25 and config.clip.arguments["z_thresh"] == 0.5


@pytest.mark.slow
def test_changed_arguments_act_in_a_sharded_run(sharded_run, tmp_path):
    folder = interrupted(sharded_run, tmp_path, 16)
    train_to_end(f"resume={folder}", "clip.max_grad_norm=0.25", cwd=tmp_path, processes=2)
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row.get("changes") for row in rows] == [None] * 16 + [1.0] * 24
    assert all(row["clipped_norm"] <= 0.2501 for row in rows[16:])


def start_with(config, run_dir) -> None:
    """Start a run and end it before its first step."""
    with run_dir.acquire(config, prepare_tokens(config, Console(quiet=True))):
        pass


def test_change_of_a_start_that_saved_nothing_stays(run, checked):
    start_with(*checked(f"resume={run}", "clip.z_thresh=0.5"))
    assert starts(run)[-1]["changes"] == [{"setting": "clip.z_thresh", "from": 2.5, "to": 0.5}]
    config, run_dir = checked(f"resume={run}")
    assert config.clip.arguments["z_thresh"] == 0.5 and run_name(config) == run.name
    (run / "config.yaml").unlink()
    start_with(*checked(f"resume={run}", "clip.z_thresh=2"))
    assert starts(run)[-1]["changes"] == [{"setting": "clip.z_thresh", "from": 0.5, "to": 2}]
    assert read_config(run / "config.yaml").clip.arguments["z_thresh"] == 2.5, "that with which the run began"
    start_with(*checked(f"resume={run}"))
    assert "changes" not in starts(run)[-1]
    assert [change["to"] for change in run_dir.setting_changes()] == [0.5, 2]


def test_arguments_may_be_named_with_their_strategy(run, checked):
    config, _ = checked(f"resume={run}", "clip=zclip", "+clip.scope=['*norm*']", "clip.recovery_window=null")
    assert config.clip.arguments["scope"] == ["*norm*"] and config.clip.arguments["recovery_window"] is None


def rule(run, step: int) -> dict:
    return load_full(RunDir(run).checkpoint(step))["callbacks"]["UpdateRuleCallback"]["rule"]


#: A rule that never acts in a tiny run.
RULE = ("update=update_clip", "update.sigmas=90", "update.window=4")


@pytest.fixture(scope="module")
def ruled_run(tiny, once):
    """The folder of a finished run with a rule over updates that never acts."""
    settings = (*tiny, *RULE, "trainer.checkpoint_every=8", "trainer.keep_last=9")
    return only_run(once("ruled", lambda folder: train_to_end(*settings, cwd=folder)))


@pytest.fixture
def ruled(ruled_run, tmp_path, monkeypatch):
    """The folder of that run, interrupted after step 16 of 40."""
    monkeypatch.chdir(tmp_path)
    return interrupted(ruled_run, tmp_path, 16)


def test_changed_arguments_of_a_rule_act_and_stay(ruled, tiny, checked, tmp_path):
    """The strategy's change and the rule's are counted apart."""
    settings = ("update=update_clip", "update.sigmas=0.01", "clip.z_thresh=0.5")
    out = train_to_end(f"resume={ruled}", *settings, cwd=tmp_path)
    assert "update.sigmas=0.01 since step 16 (it was 90" in out and "clip.z_thresh=0.5 since step 16" in out
    assert [change["setting"] for change in starts(ruled)[1]["changes"]] == ["clip.z_thresh", "update.sigmas"]
    rows = read_jsonl(ruled / "metrics.jsonl")
    assert (
        [row.get("update_changes") for row in rows] == [row.get("changes") for row in rows] == [None] * 16 + [1.0] * 24
    )
    assert not any(row["update_clipped"] for row in rows[:16]) and any(row["update_clipped"] for row in rows[16:])
    state = rule(ruled, 40)
    assert state["config"]["sigmas"] == 0.01 and state["changes"] == [["sigmas", 90, 0.01]]
    assert {change["setting"] for change in json.loads((ruled / "result.json").read_text())["changes"]} == {
        "clip.z_thresh",
        "update.sigmas",
    }

    (ruled / "result.json").unlink()
    (ruled / "config.yaml").unlink()
    for again in ((f"resume={ruled}",), (f"resume={ruled}", "update=update_clip"), (f"resume={ruled}", *settings)):
        config, run_dir = checked(*again)
        assert run_dir.path.samefile(ruled) and run_name(config) == ruled.name
        assert config.update.arguments == {"sigmas": 0.01, "window": 4}


def test_change_of_a_rule_that_is_not_possible_is_refused(ruled, refusal, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    named = (f"resume={ruled}", "update=update_clip")
    assert "update.sigmas=-1 is not allowed: it must be" in refusal(*named, "update.sigmas=-1")
    assert refusal(f"resume={ruled}", "update=brake").endswith(
        f"update=brake is not possible with resume={ruled}: the run keeps its rule over updates, update_clip, of which "
        "arguments may change, as update.KEY=VALUE; fork_from= takes another one"
    )
    assert "the run keeps its rule over updates, update_clip" in refusal(f"resume={ruled}", "update=none")
    line = refusal(*named, "update.window=64")
    assert (
        f"update.window=64 is not possible with resume={ruled}: the statistics do not fit window=64 (was 4): " in line
    )
    assert line.endswith("keep update.window=4, or fork the run")
    assert "update.foo=1 is not an argument of UpdateClip" in refusal(*named, "+update.foo=1")
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_arguments_that_are_possible_only_together_change_together(tiny, refusal, checked, tmp_path, monkeypatch):
    """What the run did not name had its default before, and has it again without the change."""
    monkeypatch.chdir(tmp_path)
    settings = (*tiny, "trainer.max_steps=4", "update=spam", "name=spam")
    train_to_end(*(each for each in settings if not each.startswith("clip.")), "clip=none", cwd=tmp_path)
    run = tmp_path / "runs" / "main" / "spam"
    (run / "result.json").unlink()
    named = (f"resume={run}", "clip=none", "update=spam")
    assert "update.reset_warmup_steps=150 is not allowed: it must be below reset_every=10" in refusal(
        *named, "+update.reset_every=10"
    )
    both = ("+update.reset_every=10", "+update.reset_warmup_steps=5")
    config, run_dir = checked(*named, *both)
    assert config.update.arguments == {"theta": 5000.0, "reset_every": 10, "reset_warmup_steps": 5}
    start_with(config, run_dir)
    assert starts(run)[-1]["changes"] == [
        {"setting": "update.reset_every", "to": 10},
        {"setting": "update.reset_warmup_steps", "to": 5},
    ]
    assert describe_changes(run_dir.setting_changes())[1] == (
        "update.reset_warmup_steps=5 since step 4 (it was at its default)"
    )
    (run / "config.yaml").unlink()
    start_with(*checked(f"resume={run}"))
    assert read_config(run / "config.yaml").update.arguments == {"theta": 5000.0}


def test_run_without_a_rule_stays_without_one(run, refusal):
    line = refusal(f"resume={run}", "update=brake")
    assert line.endswith("the run keeps its rule over updates, none; fork_from= takes another one")


@pytest.mark.slow
def test_argument_that_the_run_did_not_name_may_change(run, checked, tmp_path):
    train_to_end(f"resume={run}", "+clip.scope=['*norm*']", cwd=tmp_path)
    rows = read_jsonl(run / "metrics.jsonl")
    assert "other_norm" not in rows[15] and rows[16]["other_norm"] > rows[16]["grad_norm"]
    (run / "config.yaml").unlink()
    begun, _ = checked(f"resume={run}")
    assert identity(begun)["clip"]["scope"] == ["*norm*"]


def test_change_that_is_not_possible_is_refused(run, refusal, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    line = refusal(f"resume={run}", "clip.z_thresh=-1")
    assert "clip.z_thresh=-1 is not allowed: it must be a number above 0" in line
    line = refusal(f"resume={run}", "clip=autoclip", "clip.percentile=20")
    assert f"clip=autoclip is not possible with resume={run}: the run keeps its strategy, zclip, of which" in line
    assert "clip.name=other is not possible with resume=" in refusal(f"resume={run}", "clip.name=other")
    assert "clip.foo=1 is not an argument of ZClip" in refusal(f"resume={run}", "+clip.foo=1")
    assert "clip.alpha=... is not possible with resume=" in refusal(f"resume={run}", "~clip.alpha")
    line = refusal(f"resume={run}", "clip={z_thresh:3}")
    assert line.endswith(f"clip={{z_thresh:3}} is not possible with resume={run}: change arguments as clip.KEY=VALUE")
    for value in ("inf", "nan", "-inf", "1e400"):
        shown = "inf" if value == "1e400" else value
        line = refusal(f"resume={run}", f"clip.max_grad_norm={value}")
        assert f"clip.max_grad_norm={shown} is not allowed: it must be a number above 0, or null" in line
    assert "is not allowed: it must be a number above 0" in refusal(f"resume={run}", f"clip.z_thresh=1{'0' * 400}")
    assert "lr=0.1 is not possible with resume=" in refusal(f"resume={run}", "clip.z_thresh=3", "lr=0.1")
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_finished_run_does_not_change(finished_run, refusal, checked):
    line = refusal(f"resume={finished_run}", "clip.z_thresh=3")
    assert f"clip.z_thresh=3 is not possible with resume={finished_run}: the run is finished" in line
    checked(f"resume={finished_run}", "clip.z_thresh=2.5")


def test_statistics_of_another_window_are_refused(tiny, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [each for each in tiny if not each.startswith(("clip.", "trainer.max_steps"))]
    train_to_end(*settings, "trainer.max_steps=4", "clip=skip_step", "name=skips", cwd=tmp_path)
    run = tmp_path / "runs" / "main" / "skips"
    (run / "result.json").unlink()
    line = refusal(f"resume={run}", "clip=skip_step", "clip.sigma=3", "clip.window=64")
    assert f"clip.window=64 is not possible with resume={run}: the statistics do not fit window=64 (was 128): " in line
    assert line.endswith("keep clip.window=128, or fork the run")


def test_config_that_was_edited_is_refused_although_settings_have_changed(run, checked, refusal):
    start_with(*checked(f"resume={run}", "clip.z_thresh=0.5"))
    file = run / "config.yaml"
    written = file.read_text()
    file.write_text(written.replace("z_thresh: 2.5", "z_thresh: 0.5"))
    assert "says what the run was not trained with, clip.z_thresh=0.5 (trained: 2.5): restore both" in refusal(
        f"resume={run}"
    )
    file.write_text(written)
    environment = json.loads((run / "environment.json").read_text())
    for damaged in ({"setting": "lr", "from": 1, "to": 2}, {"setting": "update.name", "from": 1, "to": 2}, {}, 3):
        environment["starts"][-1]["changes"] = [damaged]
        (run / "environment.json").write_text(json.dumps(environment))
        assert "environment.json is damaged (starts.1.changes.0" in refusal(f"resume={run}")


def test_run_whose_changes_are_lost_continues_as_the_sentence_says(run, checked, refusal):
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("z_thresh: 2.5", "z_thresh: 0.5"))
    (run / "environment.json").unlink()
    assert refusal(f"resume={run}").endswith(f"restore both, or remove both and continue by resume={run}")
    file.unlink()
    config, _ = checked(f"resume={run}")
    assert config.clip.arguments["z_thresh"] == 2.5, "that of its checkpoint"


def test_recorded_change_that_the_checkpoint_was_not_trained_with_is_refused(run, refusal, checked):
    file = run / "environment.json"
    environment = json.loads(file.read_text())
    for before, after in ((2.5, 0.7), (0.5, 0.7), (2.5, 2.5)):  # the checkpoint has 2.5
        change = {"setting": "clip.z_thresh", "from": before, "to": after}
        file.write_text(json.dumps({"starts": [{**environment["starts"][0], "changes": [change]}]}))
        if before == 2.5:
            checked(f"resume={run}")
        else:
            line = refusal(f"resume={run}")
            assert "says what the run was not trained with, clip.z_thresh=0.7 (trained: 2.5): restore it" in line


def test_change_holds_since_the_step_to_which_a_later_start_went_back():
    first, second = (
        {"setting": "clip.z_thresh", "from": 2.5, "to": 3},
        {"setting": "clip.alpha", "from": 0, "to": 0.5},
    )
    starts = [{"step": 0}, {"step": 16, "changes": [first]}, {"step": 8, "changes": [second]}, {"step": 24}]
    assert [change["step"] for change in setting_changes(starts)] == [8, 8]
    assert setting_changes(starts[:2]) == [{"step": 16, **first}]


@pytest.mark.parametrize("value", [math.nan, math.inf, [-math.inf], {"a": 10**400}])
def test_recorded_change_has_only_finite_numbers(value):
    for change in ({"from": value, "to": 1}, {"from": 1, "to": value}):
        with pytest.raises(ValueError, match=r"^starts\.0\.changes\.0\.(from|to)=.* a number must be finite$"):
            check_record(Environment, {"starts": [{"changes": [{"setting": "clip.z_thresh", **change}]}]})
