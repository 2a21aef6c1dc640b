"""Runs with a rule over updates: its columns, its name, its state in checkpoints."""

import json
from pathlib import Path

import pytest

from tests.helpers import compose_config, only_run, read_jsonl, train_to_end
from training.config.identity import identity, run_name

COLUMNS = {"update_norm", "update_scale", "update_clipped", "update_bound"}


def test_runs_without_a_rule_keep_their_names():
    assert "update" not in identity(compose_config())
    assert run_name(compose_config("model=nano", "clip=fixed")) == run_name(
        compose_config("model=nano", "clip=fixed", "update=none")
    )
    assert run_name(compose_config()) == "micro-zclip-lr0.003-seed0-" + run_name(compose_config())[-8:]
    assert run_name(compose_config("update=monitor")).startswith("micro-zclip-monitor-lr0.003-seed0-")
    two, point = (run_name(compose_config("update=brake", f"update.sigmas={k}")) for k in ("2", "2.0"))
    assert two == point != run_name(compose_config("update=brake"))


def test_monitor_records_norms_and_changes_no_loss(tiny, finished_run: Path, tmp_path):
    train_to_end(*tiny, "trainer.checkpoint_every=8", "trainer.keep_last=9", "update=monitor", cwd=tmp_path)
    run = only_run(tmp_path)
    rows, without = read_jsonl(run / "metrics.jsonl"), read_jsonl(finished_run / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [row["loss"] for row in without]
    assert all(row.keys() - other.keys() == COLUMNS for row, other in zip(rows, without, strict=True))
    assert all(row["update_norm"] > 0 and row["update_scale"] == 1.0 for row in rows)
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, finished_run)]
    assert results[0]["test_loss"] == results[1]["test_loss"]


def test_argument_of_no_rule_is_refused():
    from training.config.strategy import update_rule

    with pytest.raises(Exception, match=r"update.release=0.9 is not possible with update=none, which has no argum"):
        update_rule(compose_config("+update.release=0.9").update)
    with pytest.raises(Exception, match=r"update.release=2 is not allowed: it must be a number from 0 to below 1"):
        update_rule(compose_config("update=brake", "update.release=2").update)
    with pytest.raises(Exception, match=r"update._target_=os.system is not allowed: it must be a class of zclip.updat"):
        compose_config("update=brake", "update._target_=os.system")
    with pytest.raises(Exception, match=r"update._target_=zclip.updates.update_norm is not allowed: it must be a subc"):
        update_rule(compose_config("update=brake", "update._target_=zclip.updates.update_norm").update)
