"""What wandb would refuse is refused before any work: its environment, tags, and a missing login."""

import pytest
import wandb

from tests.helpers import copy_run, train
from training.monitor.wandb_run import run_id

NO_LOGIN = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "NETRC": "/nowhere"}


def test_finished_run_is_shown_without_a_login(finished_run, tiny, checked, tmp_path, monkeypatch):
    run = copy_run(finished_run, tmp_path)
    for name, value in NO_LOGIN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    _, run_dir = checked(*tiny, f"name={run.name}", "trainer.checkpoint_every=8", "logger=wandb")
    assert run_dir.read_result() is not None


def test_mode_that_wandb_does_not_know_is_refused(tiny, refusal, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    assert "WANDB_MODE=nonsense is not allowed: it must be one of online, off" in refusal(*tiny, "logger=wandb")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("WANDB_BASE_URL", "nonsense", "Input should be a valid URL"),
        ("WANDB_RUN_ID", "a/b", "Run ID cannot contain the characters"),
        ("WANDB_INIT_TIMEOUT", "soon", "Input should be a valid number"),
    ],
)
def test_environment_that_wandb_does_not_take_is_refused(name, value, reason, tiny, refusal, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv(name, value)
    assert f"the environment variable {name} is not allowed: {reason}" in refusal(*tiny, "logger=wandb")


@pytest.mark.parametrize("tags", ["['']", f"[a,{'b' * 65}]"])
def test_tags_that_wandb_does_not_take_are_refused(tags, refusal):
    assert refusal("logger=wandb", f"logger.tags={tags}").endswith("a list of words of at most 64 characters")


def test_wandb_takes_the_identifier_of_every_run():
    short = ["main-a", "main-läuf=1+2"]
    assert [run_id(name) for name in short] == short
    ids = {run_id(f"main-{name}") for name in ("a,b", "a-b", "a;b", "x" * 124, f"{'x' * 199}y", f"{'x' * 199}z")}
    assert len(ids) == 6
    for identifier in ids:
        assert wandb.Settings(run_id=identifier).run_id == identifier and len(identifier) <= 128


def test_wandb_without_a_login_is_refused(tmp_path):
    done = train("logger=wandb", cwd=tmp_path, env=NO_LOGIN)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert "logger=wandb is not possible: wandb is not logged in" in line
    assert not any(tmp_path.iterdir())
