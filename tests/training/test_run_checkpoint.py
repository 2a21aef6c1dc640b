"""Export, evaluation and forks take shape and settings from the checkpoint, not from config.yaml beside it."""

import shutil
from pathlib import Path

import pytest

from common.errors import ConfigError, UserError
from tests.helpers import compose_config, copy_run
from training.checkpoint.fork import find_fork_source
from training.checkpoint.load import RunCheckpoint
from training.run_dir import RunDir


def edit(run: Path, old: str, new: str) -> None:
    file = run / "config.yaml"
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("  num_hidden_layers: 2\n", "  num_hidden_layers: 3\n", "model.num_hidden_layers=3 (trained: 2)"),
        ("  hidden_size: 64\n", "  hidden_size: 128\n", "model.hidden_size=128 (trained: 64)"),
        ("  rope_theta: 10000.0\n", "  rope_theta: 20000.0\n", "model.rope_theta=20000.0 (trained: 10000.0)"),
        ("lr: 0.003\nseed", "lr: 0.004\nseed", "lr=0.004 (trained: 0.003)"),
    ],
)
@pytest.mark.parametrize("step", [None, 24])
def test_edited_config_is_refused(old, new, problem, step, finished_run, tmp_path):
    run = copy_run(finished_run, tmp_path)
    edit(run, old, new)
    with pytest.raises(UserError) as error:
        RunCheckpoint(run, step, print)
    assert f"config.yaml says what the run was not trained with, {problem}: restore it" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_settings_of_the_output_may_be_edited(finished_run, tmp_path):
    run = copy_run(finished_run, tmp_path)
    edit(run, "  name: jsonl\n", "  name: wandb\n")
    assert RunCheckpoint(run, None, print).step == 40


def test_checkpoint_without_a_config_file_has_its_shape(finished_run, tmp_path):
    expected = RunCheckpoint(finished_run, None, print)
    run = copy_run(finished_run, tmp_path)
    (run / "config.yaml").unlink()
    found = RunCheckpoint(run, None, print)
    assert (found.config, found.description) == (expected.config, expected.description)


@pytest.mark.parametrize("change", ["removed", "edited"])
def test_fork_has_the_settings_of_the_checkpoint(change, tiny, finished_run, tmp_path):
    run = copy_run(finished_run, tmp_path)
    if change == "removed":
        (run / "config.yaml").unlink()
    else:
        edit(run, "lr: 0.003\nseed: 0", "lr: 0.003\nseed: 1")
    new, fork = RunDir(tmp_path / "new"), f"fork_from={run}@24"
    source = find_fork_source(compose_config(*tiny, fork), new)
    assert source is not None and source.keeps_clipping and source.checkpoint == RunDir(run).checkpoint(24)
    assert not find_fork_source(compose_config(*tiny, fork, "fork_statistics=reset"), new).keeps_clipping
    with pytest.raises(ConfigError, match="is not possible with seed=1: that run has seed=0"):
        find_fork_source(compose_config(*tiny, fork, "seed=1"), new)


def test_fork_keeps_a_setting_that_its_own_default_would_leave_out(tiny, run_in_process, tmp_path, monkeypatch):
    """Such a setting is in the identity of the old run only."""
    monkeypatch.chdir(tmp_path)
    short = (*tiny, "trainer.max_steps=8", "trainer.checkpoint_every=4")
    run_in_process(*short, "model.embedding_initializer_range=1", "name=old")
    new, fork = RunDir(tmp_path / "new"), f"fork_from={tmp_path / 'runs' / 'main' / 'old'}@4"
    with pytest.raises(ConfigError, match=r"with model.embedding_initializer_range=null: that run has model.\w+=1.0"):
        find_fork_source(compose_config(*short, fork), new)
    assert find_fork_source(compose_config(*short, fork, "model.embedding_initializer_range=1"), new) is not None


def test_edited_tokenizer_of_a_finished_run_is_refused(finished_run, tmp_path):
    run = copy_run(finished_run, tmp_path)
    assert RunCheckpoint(run, None, print).tokenizer().size == 512
    file = run / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    problem = "is not the tokenizer that the run was trained with: restore it"
    with pytest.raises(UserError, match=rf"^{file} {problem} \(its SHA-256 was [0-9a-f]{{64}}\)$"):
        RunCheckpoint(run, None, print).tokenizer()


@pytest.mark.parametrize("step", [None, 8])
def test_finished_run_without_checkpoints_is_not_called_untrained(step, finished_run, tmp_path):
    """As after its archive was restored. Nothing can be loaded, whichever step is asked for."""
    run = copy_run(finished_run, tmp_path)
    shutil.rmtree(run / "checkpoints")
    restored = (
        r"^run=\S+ has no checkpoints, as after scripts/archive\.py has restored it; remove \S+ to train it again$"
    )
    with pytest.raises(UserError, match=restored):
        RunCheckpoint(run, step, print)
    (run / "result.json").unlink()
    with pytest.raises(UserError, match=r"^run=\S+ has no checkpoint yet: train it first$"):
        RunCheckpoint(run, step, print)
