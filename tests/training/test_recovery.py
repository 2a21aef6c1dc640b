"""Non-finite losses, runs forked from another, and wandb out of reach."""

import json
import shutil
import time
from pathlib import Path

import pytest

from common.errors import ConfigError
from tests.helpers import FSDP, SLOW, TINY, read_jsonl, same, start, train
from training.checkpoint.fork import find_fork_source
from training.checkpoint.format import load_model_state
from training.config.compose import read_config
from training.run_dir import RunDir

#: A clipper that makes the gradients of a batch of random tokens non-finite.
FRAGILE = """
import torch
from zclip import ZClip

class Fragile(ZClip):
    uses_loss = True

    def step(self, parameters, optimizer=None, loss=None):
        parameters = list(parameters)
        for parameter in parameters:
            parameter.grad.mul_(torch.where(loss > 6.4, torch.nan, 1.0))
        return super().step(parameters, optimizer=optimizer, loss=loss)
"""


@pytest.fixture(scope="module")
def settings(corpus: Path, cache: Path) -> tuple[str, ...]:
    return (f"data.path={corpus}", f"paths.cache={cache}", *TINY, "trainer.checkpoint_every=5", "lr=1e-2")


@pytest.fixture
def fragile(settings, tmp_path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return settings and environment of a run in which batches 21 to 26 give non-finite steps."""
    (tmp_path / "fragile.py").write_text(FRAGILE)
    overrides = (
        *settings, "clip._target_=fragile.Fragile", "data.corruption.steps=[21,22,23,24,25,26]",
        "data.corruption.kind=random", "trainer.max_consecutive_nonfinite=3", "trainer.log_every=2", "name=x",
    )  # fmt: skip
    return overrides, {"PYTHONPATH": str(tmp_path)}


def losses(path: Path) -> list[float | None]:
    return [row["loss"] for row in read_jsonl(path)]


@pytest.mark.parametrize("mode", [(), SLOW(FSDP)])
def test_run_is_rewound_and_skips_the_corrupted_batches(mode, fragile, tmp_path):
    settings, env = fragile
    done = train(*settings, *mode, "trainer.on_nonfinite=rewind", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "runs" / "main" / "x"
    assert "for 3 steps in a row, up to step 23: rewinding to step 20 and skipping the 3 batches since" in done.stdout
    assert json.loads((path / "rewinds.json").read_text()) == {
        "rewinds": [{"from_step": 23, "to_step": 20, "skipped_batches": number} for number in (3, 6)]
    }
    assert [row["step"] for row in read_jsonl(path / "metrics.jsonl")] == list(range(1, 41))
    assert [row["step"] for row in read_jsonl(path / "metrics.jsonl") if row["grad_norm"] is None] == []
    removed = read_jsonl(path / "rewound-1.jsonl")
    assert [row["step"] for row in removed] == [21, 22, 23, 24] and {row["grad_norm"] for row in removed} == {None}
    overrides = ("trainer.on_nonfinite=rewind", "name=fork", "fork_from=runs/main/x@35")
    done = train(*settings, *mode, *overrides, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    fork = read_jsonl(tmp_path / "runs" / "main" / "fork" / "metrics.jsonl")
    assert [row["loss"] for row in fork] == losses(path / "metrics.jsonl")


def test_rewind_depends_neither_on_log_every_nor_on_an_interruption(fragile, tmp_path):
    settings, env = fragile
    settings = tuple(s for s in settings if not s.startswith(("trainer.log_every", "name")))
    settings = (*settings, "trainer.on_nonfinite=rewind")
    ends = []
    for log_every in (1, 7):
        done = train(*settings, f"trainer.log_every={log_every}", f"name=every{log_every}", cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        ends.append(tmp_path / "runs" / "main" / f"every{log_every}")
    job = start(*settings, "trainer.log_every=1", "name=stopped", cwd=tmp_path, **env)
    path = tmp_path / "runs" / "main" / "stopped"
    while not path.exists() or not (path / "metrics.jsonl").exists() or len(read_jsonl(path / "metrics.jsonl")) < 17:
        assert job.poll() is None, job.communicate()
        time.sleep(0.001)
    job.terminate()
    job.wait()
    done = train(*settings, "trainer.log_every=1", "name=stopped", cwd=tmp_path, env=env)
    assert done.returncode == 0 and "continuing" in done.stdout, done.stderr
    for end in (*ends, path):
        rewinds = json.loads((end / "rewinds.json").read_text())["rewinds"]
        assert [(r["from_step"], r["to_step"]) for r in rewinds] == [(23, 20), (23, 20)]
        assert losses(end / "metrics.jsonl") == losses(ends[0] / "metrics.jsonl")


def test_fork_can_be_rewound_to_its_start(fragile, tmp_path, monkeypatch):
    settings, env = fragile
    settings = (*(s for s in settings if not s.startswith("name")), "trainer.keep_last=9")
    assert train(*settings, "name=old", cwd=tmp_path, env=env).returncode == 0
    overrides = ("trainer.on_nonfinite=rewind", "fork_from=runs/main/old@20", "name=new")
    done = train(*settings, *overrides, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    rewinds = json.loads((tmp_path / "runs" / "main" / "new" / "rewinds.json").read_text())["rewinds"]
    assert rewinds[0]["to_step"] == 20 and len(read_jsonl(tmp_path / "runs" / "main" / "new" / "metrics.jsonl")) == 40
    # A resumed fork, which has checkpoints of its own, can still be rewound to its start if the old run is there.
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    new = RunDir(Path("runs/main/new"))
    source = find_fork_source(read_config(new.config_file), new)
    assert source is not None and source.step == 20
    Path("runs/main/old").rename("runs/main/moved")
    assert find_fork_source(read_config(new.config_file), new) is None, "its own checkpoints are enough"
    shutil.rmtree(new.checkpoints)
    with pytest.raises(ConfigError, match="there is no run in runs/main/old"):
        find_fork_source(read_config(new.config_file), new)


def test_rewind_is_replayed_when_resuming_before_it(fragile, tmp_path):
    """The checkpoints after the rewind are damaged."""
    settings, env = fragile
    settings = (*settings, "trainer.on_nonfinite=rewind", "trainer.keep_last=9")
    done = train(*settings, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "runs" / "main" / "x"
    before, rewinds = losses(path / "metrics.jsonl"), (path / "rewinds.json").read_text()
    (path / "result.json").unlink()
    for checkpoint in sorted((path / "checkpoints").iterdir())[1:]:
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    done = train(*settings, cwd=tmp_path, env=env)
    assert done.returncode == 0 and "after step 5 of 40" in done.stdout, done.stdout + done.stderr
    assert (path / "rewinds.json").read_text() == rewinds
    assert losses(path / "metrics.jsonl") == before


def test_rewinds_are_counted_and_survive_interruption(fragile, tmp_path):
    """A run that is killed after a rewind ends as one that was not."""
    settings, env = fragile
    settings = (*settings, "trainer.on_nonfinite=rewind", "trainer.max_consecutive_nonfinite=2")
    done = train(*settings, "name=few", "trainer.max_rewinds=1", cwd=tmp_path, env=env)
    assert done.returncode == 3 and "after 1 rewinds (trainer.max_rewinds): the run ends here" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = train(*settings, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    rewinds = json.loads((tmp_path / "runs" / "main" / "x" / "rewinds.json").read_text())["rewinds"]
    assert [rewind["skipped_batches"] for rewind in rewinds] == [2, 4, 6]
    assert {rewind["to_step"] for rewind in rewinds} == {20}
    job = start(*settings, "name=killed", cwd=tmp_path, **env)
    for line in job.lines():
        if "rewinding" in line:
            job.kill()
    job.wait()
    done = train(*settings, "name=killed", cwd=tmp_path, env=env)
    assert done.returncode == 0 and "after step 20 of 40" in done.stdout, done.stderr
    ends = [losses(tmp_path / "runs" / "main" / name / "metrics.jsonl") for name in ("x", "killed")]
    assert ends[0] == ends[1]


def test_on_nonfinite_stop_ends_the_run_with_advice(fragile, tmp_path):
    """The checkpoint of step 25, amid the corrupted batches, is not healthy. The same command stops again."""
    settings, env = fragile
    settings = (*settings, "trainer.max_consecutive_nonfinite=5")
    path = tmp_path / "runs" / "main"
    for step in (25, 26):
        done = train(*settings, "trainer.on_nonfinite=stop", cwd=tmp_path, env=env)
        assert done.returncode == 3 and len(done.stderr.splitlines()) == 1, done.stderr
        assert (
            f"for {step - 20} steps in a row, up to step {step}: trainer.on_nonfinite=stop ends the run here"
            in done.stderr
        )
        assert "fork_from=runs/main/x@20 is a run from the last healthy checkpoint" in done.stderr
        assert (path / "x" / "failure.txt").read_text() == done.stderr
        assert (path / "x" / "checkpoints" / "step-00000025.ckpt").exists()
        assert len(read_jsonl(path / "x" / "metrics.jsonl")) == step and not (path / "x" / "result.json").exists()
    others = tuple(s for s in settings if not s.startswith(("clip.", "name=")))
    fork = (*others, "clip=none", "data.corruption.steps=[]", "fork_from=runs/main/x@20", "name=y")
    done = train(*fork, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "training runs/main/y from runs/main/x/checkpoints/step-00000020.ckpt, with the clipper's" in done.stdout
    assert read_jsonl(path / "y" / "metrics.jsonl")[:20] == read_jsonl(path / "x" / "metrics.jsonl")[:20]
    assert [row["step"] for row in read_jsonl(path / "y" / "metrics.jsonl")] == list(range(1, 41))


@pytest.mark.parametrize("mode", [(), SLOW(FSDP)])
def test_fork_with_the_same_settings_equals_the_old_run(mode, settings, tmp_path):
    settings = (*settings, *mode, "trainer.keep_last=9")
    assert train(*settings, "name=old", cwd=tmp_path).returncode == 0
    old, new, other = (tmp_path / "runs" / "main" / name for name in ("old", "new", "other"))
    done = train(*settings, "name=new", "fork_from=runs/main/old@20", cwd=tmp_path)
    assert done.returncode == 0 and "statistics reset" not in done.stdout, done.stderr
    ends = [load_model_state(folder / "checkpoints" / "step-00000040.ckpt") for folder in (old, new)]
    assert same(*ends)
    assert losses(old / "metrics.jsonl") == losses(new / "metrics.jsonl")
    done = train(*settings, "name=other", "fork_from=runs/main/old@20", "lr=1e-4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lrs = [row["lr"] for row in read_jsonl(other / "metrics.jsonl")]
    assert lrs[:20] == [row["lr"] for row in read_jsonl(old / "metrics.jsonl")][:20] and max(lrs[20:]) <= 1e-4
    before = load_model_state(old / "checkpoints" / "step-00000020.ckpt")
    after = load_model_state(other / "checkpoints" / "step-00000025.ckpt")
    moved = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert 0 < moved < 1e-3, "the optimizer uses the new learning rate"


def test_training_continues_without_wandb(settings, tmp_path):
    """The server refuses connections for the whole run."""
    env = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    done = train(*settings, "logger=wandb", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "WANDB CANNOT BE REACHED" in done.stdout and "test loss" in done.stdout
    (file,) = tmp_path.glob("runs/main/*/wandb/offline-run-*/run-*.wandb")
    assert b"test_loss" in file.read_bytes()


def test_impossible_forks_are_refused_in_one_sentence(settings, tmp_path):
    assert train(*settings, "name=old", "trainer.max_steps=10", cwd=tmp_path).returncode == 0
    old = tmp_path / "runs" / "main" / "old"
    for override, message in (
        ("fork_from=runs/main/old", "it must be a run folder and a step, as runs/main/NAME@100"),
        ("fork_from=runs/main/none@5", "there is no run in runs/main/none"),
        ("fork_from=runs/main/old@7", "the run has no checkpoint of that step, but of 5, 10"),
        ("seed=1", "is not possible with seed=1: that run has seed=0"),
        ("model.num_hidden_layers=1", "with model.num_hidden_layers=1: that run has model.num_hidden_layers=2"),
        ("trainer.max_steps=10", "is not possible with trainer.max_steps=10: it must be more"),
        ("trainer.strategy=fsdp", "is not possible with trainer.strategy=fsdp: the checkpoints of"),
    ):
        fork = () if "fork_from" in override else ("fork_from=runs/main/old@10",)
        done = train(*settings, "name=new", *fork, override, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    file = old / "checkpoints" / "step-00000010.ckpt"
    file.write_bytes(file.read_bytes()[:-100])
    done = train(*settings, "name=new", "fork_from=runs/main/old@10", cwd=tmp_path)
    assert done.returncode == 2 and "step-00000010.ckpt is damaged" in done.stderr
    assert not (tmp_path / "runs" / "main" / "new").exists()
