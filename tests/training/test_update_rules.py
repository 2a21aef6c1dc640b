"""Runs with a rule over updates: its columns, its name, its state in checkpoints."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from common.errors import UserError
from common.settings import parse
from tests.helpers import (
    FSDP,
    SLOW,
    Once,
    compose_config,
    copy_run,
    final_state,
    interrupted,
    only_run,
    read_jsonl,
    same,
    script,
    train_to_end,
)
from training.checkpoint.state import find_problem
from training.config.identity import differences, identity, run_name
from training.config.schema import Config
from training.config.strategy import clipping_strategy, update_rule
from training.monitor.low_rate import STEPS, LowRateWarning

#: A brake that acts in the 40 steps of a tiny run, and checkpoints to go back to.
BRAKE = (
    "update=brake", "update.margin=1.01", "update.fall_steps=3", "update.warmup_steps=5", "update.release=0.9",
    "update.sigmas=0", "trainer.checkpoint_every=8", "trainer.keep_last=9",
)  # fmt: skip
COLUMNS = {"update_norm", "update_scale", "update_clipped", "update_bound"}


def test_runs_without_a_rule_keep_their_names():
    assert "update" not in identity(compose_config())
    assert run_name(compose_config("model=nano", "clip=fixed")) == run_name(
        compose_config("model=nano", "clip=fixed", "update=none")
    )
    assert run_name(compose_config()) == "micro-zclip-lr0.003-seed0-" + run_name(compose_config())[-8:]
    assert run_name(compose_config("update=monitor")).startswith("micro-zclip-monitor-lr0.003-seed0-")
    two, point = (run_name(compose_config("update=brake", f"update.margin={k}")) for k in ("2", "2.0"))
    assert two == point != run_name(compose_config("update=brake"))


def test_configurations_from_before_there_were_rules_are_those_without_one():
    config = compose_config("model=nano")
    plain = config.model_dump(mode="json", by_alias=True)
    assert plain.pop("update") == {"_target_": None, "name": "none"}
    assert parse(Config, plain) == config and differences(config, parse(Config, plain)) == {}
    changed = differences(compose_config("model=nano", "update=monitor"), config)
    assert changed == {"update._target_": ("zclip.updates.UpdateMonitor", None), "update.name": ("monitor", "none")}


def test_setting_that_was_added_later_differs_from_null():
    """Runs with its default keep their names, and null is another run. A class of one's own has defaults of its own."""
    default, null = (compose_config("update=brake", *more) for more in ((), ("update.recovery_window=null",)))
    assert differences(default, null) == {"update.recovery_window": (500, None)}
    assert differences(null, default) == {"update.recovery_window": (None, 500)}
    assert "recovery_window" not in identity(default)["update"] and run_name(default) != run_name(null)
    own = ("update=monitor", "update._target_=elsewhere.Own", "update.name=own")
    named = [identity(compose_config(*own, *more), is_named=False) for more in ((), ("+update.recovery_window=500",))]
    assert named[0] != named[1]


def test_monitor_records_norms_and_changes_no_loss(tiny, finished_run: Path, tmp_path):
    train_to_end(*tiny, "trainer.checkpoint_every=8", "trainer.keep_last=9", "update=monitor", cwd=tmp_path)
    run = only_run(tmp_path)
    rows, without = read_jsonl(run / "metrics.jsonl"), read_jsonl(finished_run / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [row["loss"] for row in without]
    assert all(row.keys() - other.keys() == COLUMNS for row, other in zip(rows, without, strict=True))
    assert all(row["update_norm"] > 0 and row["update_scale"] == 1.0 for row in rows)
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, finished_run)]
    assert results[0]["test_loss"] == results[1]["test_loss"]


def test_rule_of_your_own_trains_and_resumes_where_the_command_names_it(tiny, run_in_process, tmp_path, monkeypatch):
    (tmp_path / "my_rule.py").write_text(
        "from pathlib import Path\nimport torch\nfrom zclip.updates import UpdateDecision, UpdateRule\n"
        "Path('imported').touch()\n\nclass Halved(UpdateRule):\n    def __init__(self, share: float = 1.0) -> None:\n"
        "        super().__init__()\n        self.share = share\n\n    def decide(self, norm, state):\n"
        "        return UpdateDecision(torch.full_like(norm, self.share), norm > 0, norm * self.share, state)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = ("update=monitor", "update._target_=my_rule.Halved", "update.name=halved", "+update.share=0.5")
    _, output = run_in_process(*tiny, *own, "name=own", "trainer.checkpoint_every=8", "trainer.keep_last=9")
    folder = tmp_path / "runs" / "main" / "own"
    assert {row["update_scale"] for row in read_jsonl(folder / "metrics.jsonl")} == {0.5}, output
    resumed = interrupted(folder, tmp_path / "again", 32)
    (tmp_path / "imported").unlink()
    sys.modules.pop("my_rule")
    with pytest.raises(UserError, match=r"update._target_=my_rule.Halved is not a class of zclip, and not imported"):
        run_in_process(f"resume={resumed}")
    assert find_problem(resumed / "checkpoints" / "step-00000032.ckpt") is None
    run_in_process(*tiny, f"fork_from={resumed}@32", "name=forked")
    assert not (tmp_path / "imported").exists()
    _, output = run_in_process(f"resume={resumed}", "update._target_=my_rule.Halved")
    assert (tmp_path / "imported").exists() and "after step 32 of 40" in output
    losses = [[row["loss"] for row in read_jsonl(run / "metrics.jsonl")] for run in (folder, resumed)]
    assert losses[0] == losses[1]


def test_argument_of_no_rule_is_refused():
    with pytest.raises(Exception, match=r"update.release=0.9 is not possible with update=none, which has no argum"):
        update_rule(compose_config("+update.release=0.9").update)
    with pytest.raises(Exception, match=r"update.release=2 is not allowed: it must be a number from 0 to below 1"):
        update_rule(compose_config("update=brake", "update.release=2").update)
    for target in ("nowhere.Rule", ".relative.Rule", "Rule"):
        with pytest.raises(UserError, match=rf"update._target_={target} cannot be imported"):
            update_rule(compose_config("update=monitor", f"update._target_={target}").update)
    for target, methods in (("UpdateRule", "decide or before_step"), ("OptimizerRule", "before_step")):
        with pytest.raises(UserError, match=rf"update._target_=\S+{target} decides nothing: \D+ the method {methods}$"):
            update_rule(compose_config("update=monitor", f"update._target_=zclip.updates.{target}").update)
    with pytest.raises(UserError, match=r"clip._target_=zclip.ClippingStrategy decides nothing: \D+ decide or clip$"):
        clipping_strategy(compose_config("clip=none", "clip._target_=zclip.ClippingStrategy").clip)
    with pytest.raises(Exception, match=r"update._target_=zclip.updates.update_norm is not allowed: it must be a subc"):
        update_rule(compose_config("update=brake", "update._target_=zclip.updates.update_norm").update)


@pytest.fixture(scope="module")
def braked_run(tiny: tuple[str, ...], once: Once) -> Path:
    """The folder of a finished run whose brake has acted before and after step 32."""
    return only_run(once("braked", lambda folder: train_to_end(*tiny, *BRAKE, cwd=folder)))


def test_run_with_a_brake_resumes_to_the_same_bits(braked_run, tiny, run_in_process, tmp_path):
    scales = [row["update_scale"] for row in read_jsonl(braked_run / "metrics.jsonl")]
    assert scales[0] == 1 > scales[31] > min(scales[32:])
    interrupted(braked_run, tmp_path, 32)
    _, output = run_in_process(*tiny, *BRAKE)
    assert "after step 32 of 40" in output
    (whole, rows, loss), (resumed, others, other_loss) = map(final_state, (braked_run.parents[2], tmp_path))
    assert rows == others and loss == other_loss
    assert same(whole["state_dict"], resumed["state_dict"]) and same(whole["callbacks"], resumed["callbacks"])
    assert same(whole["optimizer_states"], resumed["optimizer_states"])


#: Rules over tensors and elements, so that they act in the 40 steps of a tiny run, and their columns.
OTHERS = {
    "stable_adamw": (
        ("update=stable_adamw", "optim.amsgrad=true", "optim.betas=[0.9,0.9]"),
        {"update_rms", "lowest_update_scale", "update_clipped", "update_clipped_tensors"},
    ),
    "spam": (("update=spam", "update.theta=50"), {"clipped_element_share", "update_clipped"}),
    "spam_reset": (
        ("update=spam_reset", "update.theta=50", "update.reset_every=11", "update.reset_warmup_steps=5"),
        {"clipped_element_share", "update_clipped", "update_scale"},
    ),
}


@pytest.mark.parametrize("name", ["stable_adamw", SLOW("spam"), SLOW("spam_reset")])
def test_run_with_a_rule_over_tensors_or_elements_resumes_to_the_same_bits(name, tiny, run_in_process, tmp_path):
    rule, columns = OTHERS[name]
    settings = (*tiny, *rule, "trainer.checkpoint_every=8", "trainer.keep_last=9")
    (tmp_path / "whole").mkdir()
    assert "clipped" in train_to_end(*settings, cwd=tmp_path / "whole")
    run = only_run(tmp_path / "whole")
    rows = read_jsonl(run / "metrics.jsonl")
    assert all(columns <= row.keys() for row in rows) and (run / "plots" / "run.png").exists()
    assert sum(row["update_clipped"] for row in rows[:24]) > 0 and sum(row["update_clipped"] for row in rows[24:]) > 0
    interrupted(run, tmp_path, 24)
    _, output = run_in_process(*settings)
    assert "after step 24 of 40" in output
    (whole, lines, loss), (resumed, others, other_loss) = map(final_state, (tmp_path / "whole", tmp_path))
    assert lines == others and loss == other_loss
    assert same(whole["state_dict"], resumed["state_dict"]) and same(whole["callbacks"], resumed["callbacks"])
    assert same(whole["optimizer_states"], resumed["optimizer_states"])
    (group,) = whole["optimizer_states"][0]["param_groups"]
    assert len(group["params"]) == len(whole["optimizer_states"][0]["state"])


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_sharded_run_acts_on_tensors_and_elements_as_one_process_does(name, tiny, tmp_path):
    rule, columns = OTHERS[name]
    for folder, settings, processes in (("one", (), 1), ("two", FSDP, 2)):
        (tmp_path / folder).mkdir()
        train_to_end(*tiny, *rule, *settings, cwd=tmp_path / folder, processes=processes)
    rows, others = (read_jsonl(only_run(tmp_path / folder) / "metrics.jsonl") for folder in ("one", "two"))
    for key in ("loss", *columns - {"update_clipped_tensors", "clipped_element_share"}):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in others], rel=1e-3), key
    for key in columns & {"update_clipped_tensors", "clipped_element_share"}:
        assert sum(row[key] for row in rows) == pytest.approx(sum(row[key] for row in others), rel=0.02), key


def test_checkpoints_have_the_rate_of_the_schedule_and_the_state_of_the_rule(braked_run):
    state, rows, _ = final_state(braked_run.parents[2])
    assert rows[-1]["update_scale"] < 1
    without = compose_config()
    (group,) = state["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(without.lr * without.optim.final_lr_fraction)
    assert state["callbacks"]["UpdateRuleCallback"]["rule"]["strategy"] == "UpdateBrake"
    result = json.loads((braked_run / "result.json").read_text())
    assert 0 < result["update_clipped_share"] < 1 and 0 < result["lowest_update_scale"] < 1
    assert (braked_run / "plots" / "run.png").exists()


def test_damaged_state_of_a_rule_is_a_damaged_checkpoint(braked_run, tmp_path):
    checkpoint = copy_run(braked_run, tmp_path) / "checkpoints" / "step-00000040.ckpt"
    assert find_problem(checkpoint) is None
    state = torch.load(checkpoint, weights_only=True)
    state["callbacks"]["UpdateRuleCallback"]["rule"]["state"]["log_scale"].fill_(1.0)
    torch.save(state, checkpoint)
    problem = find_problem(checkpoint)
    assert problem and "its rule over updates" in problem and "log_scale=1.0 is not allowed" in problem


@pytest.mark.slow
def test_forks_begin_with_and_without_a_rule(braked_run, finished_run, tiny, tmp_path):
    old, braked = (copy_run(run, tmp_path) for run in (finished_run, braked_run))
    output = train_to_end(*tiny, *BRAKE, f"fork_from=runs/main/{old.name}@24", "name=new", cwd=tmp_path)
    assert "statistics reset" not in output
    rows = read_jsonl(tmp_path / "runs" / "main" / "new" / "metrics.jsonl")
    assert all((row.get("update_scale") is not None) == (row["step"] > 24) for row in rows)
    from_braked = f"fork_from=runs/main/{braked.name}@24"
    output = train_to_end(*tiny, from_braked, "name=without", cwd=tmp_path)
    assert "statistics reset" not in output and "callbacks" not in output
    output = train_to_end(*tiny, "update=update_clip", from_braked, "name=other", cwd=tmp_path)
    assert "with the update rule's statistics reset" in output


@pytest.mark.slow
def test_fork_with_reset_statistics_counts_its_own_steps(braked_run, tiny, tmp_path):
    """Resumed in between, it counts on. With the same settings and without the reset, it counts all steps."""
    braked = copy_run(braked_run, tmp_path)
    settings = (*tiny, *BRAKE, f"fork_from=runs/main/{braked.name}@16", "trainer.max_steps=40")
    reset = (*settings, "fork_statistics=reset", "name=reset")
    output = train_to_end(*reset, cwd=tmp_path)
    assert "with the clipper's and the update rule's statistics reset" in output
    run = tmp_path / "runs" / "main" / "reset"
    resumed = interrupted(run, tmp_path / "half", 32)
    output = train_to_end(*reset, f"paths.runs={tmp_path / 'half' / 'runs'}", cwd=tmp_path)
    assert "after step 32 of 40" in output and "statistics reset" not in output
    train_to_end(*settings, "name=same", cwd=tmp_path)
    assert [steps_counted(path) for path in (run, resumed, run.with_name("same"))] == [24, 24, 40]


def steps_counted(run):
    checkpoint = torch.load(run / "checkpoints" / "step-00000040.ckpt", weights_only=True)
    return checkpoint["callbacks"]["UpdateRuleCallback"]["rule"]["state"]["count"]


@pytest.mark.slow
def test_sharded_run_brakes_as_one_process_does_and_resumes(braked_run, tiny, tmp_path):
    settings = (*tiny, *BRAKE, *FSDP)
    for folder in ("whole", "resumed"):
        (tmp_path / folder).mkdir()
    train_to_end(*settings, cwd=tmp_path / "whole", processes=2)
    rows, others = (read_jsonl(run / "metrics.jsonl") for run in (only_run(tmp_path / "whole"), braked_run))
    for key in ("loss", "update_norm", "update_scale"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in others], rel=1e-3)
    path = interrupted(only_run(tmp_path / "whole"), tmp_path / "resumed", 32)
    train_to_end(*settings, cwd=tmp_path / "resumed", processes=2)
    resumed = read_jsonl(path / "metrics.jsonl")
    assert [(row["loss"], row["update_scale"]) for row in resumed] == [(r["loss"], r["update_scale"]) for r in rows]


def test_status_shows_the_scale_of_the_rate(braked_run, finished_run):
    scale = read_jsonl(braked_run / "metrics.jsonl")[-1]["update_scale"]
    for run, shown in ((braked_run, f"{scale:.2f}"), (finished_run, None)):
        lines = script("status.py", f"folder={run.parent}", cwd=run.parent, COLUMNS="160").stdout.splitlines()
        assert ("rate scale" in lines[2]) == (shown is not None)
        if shown is not None:
            (line,) = [line for line in lines if run.name in line]
            assert f" {shown} " in line
    assert scale < 1


def test_warning_comes_once_while_the_rate_stays_low():
    output = io.StringIO()
    warning = LowRateWarning(Console(file=output, width=300))

    def steps(count: int, scale: float | None) -> list[str]:
        for step in range(1, count + 1):
            warning(step, {"update_scale": scale})
        text = output.getvalue().splitlines()
        output.seek(0), output.truncate()
        return text

    assert steps(STEPS - 1, 0.4) == steps(5, None) == []
    (line,) = steps(STEPS, 0.4)
    assert line.startswith(
        "step 1: for 200 steps the rule over updates has held the learning rate below 0.5 of the sch"
    )
    assert steps(1, 0.6) == steps(STEPS - 1, 0.1) == [] != steps(1, 0.1)
