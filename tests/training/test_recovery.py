"""Runs that get into trouble: losses that are not finite, an old run to start from, wandb out of reach."""

import json
import time
from pathlib import Path

import pytest

from tests.conftest import TINY, same, train
from tests.training.test_saving import FSDP, SLOW
from tests.training.test_stopping import start
from training.checkpoint.format import weights

#: A clipper under which a batch of random tokens has gradients that are not finite.
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
    """Settings and environment of a run in which batches 21 to 26 are beyond the clipper."""
    (tmp_path / "fragile.py").write_text(FRAGILE)
    given = (
        *settings, "clip._target_=fragile.Fragile", "data.corruption.steps=[21,22,23,24,25,26]",
        "data.corruption.kind=random", "trainer.max_consecutive_nonfinite=3", "trainer.log_every=2", "name=x",
    )  # fmt: skip
    return given, {"PYTHONPATH": str(tmp_path)}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("mode", [(), SLOW(FSDP)])
def test_a_run_goes_back_and_past_the_bad_batches(mode, fragile, tmp_path):
    settings, env = fragile
    done = train(*settings, *mode, "trainer.on_nonfinite=rewind", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "runs" / "main" / "x"
    assert "for 3 steps in a row, up to step 23: going back to step 20, and past the 3 batches since" in done.stdout
    assert json.loads((path / "rewinds.json").read_text()) == {
        "rewinds": [{"from_step": 23, "to_step": 20, "skipped_batches": number} for number in (3, 6)]
    }
    assert [row["step"] for row in rows(path / "metrics.jsonl")] == list(range(1, 41))
    assert [row["step"] for row in rows(path / "metrics.jsonl") if row["grad_norm"] is None] == []
    cut = rows(path / "rewound-1.jsonl")
    assert [row["step"] for row in cut] == [21, 22, 23, 24] and {row["grad_norm"] for row in cut} == {None}
    given = ("trainer.on_nonfinite=rewind", "name=fork", "resume_from=runs/main/x@35")
    done = train(*settings, *mode, *given, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    fork = rows(tmp_path / "runs" / "main" / "fork" / "metrics.jsonl")
    assert [row["loss"] for row in fork] == [row["loss"] for row in rows(path / "metrics.jsonl")]


def test_neither_when_it_is_noticed_nor_an_interruption_changes_where_a_run_goes_back(fragile, tmp_path):
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
    while not path.exists() or not (path / "metrics.jsonl").exists() or len(rows(path / "metrics.jsonl")) < 17:
        assert job.poll() is None, job.communicate()
        time.sleep(0.001)
    job.terminate()
    job.wait()
    done = train(*settings, "trainer.log_every=1", "name=stopped", cwd=tmp_path, env=env)
    assert done.returncode == 0 and "continuing" in done.stdout, done.stderr
    for end in (*ends, path):
        rewinds = json.loads((end / "rewinds.json").read_text())["rewinds"]
        assert [(r["from_step"], r["to_step"]) for r in rewinds] == [(23, 20), (23, 20)]
        assert [row["loss"] for row in rows(end / "metrics.jsonl")] == [
            row["loss"] for row in rows(ends[0] / "metrics.jsonl")
        ]


def test_a_fork_can_go_back_to_where_it_started(fragile, tmp_path):
    settings, env = fragile
    settings = (*(s for s in settings if not s.startswith("name")), "trainer.keep_last=9")
    assert train(*settings, "name=old", cwd=tmp_path, env=env).returncode == 0
    given = ("trainer.on_nonfinite=rewind", "resume_from=runs/main/old@20", "name=new")
    done = train(*settings, *given, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    rewinds = json.loads((tmp_path / "runs" / "main" / "new" / "rewinds.json").read_text())["rewinds"]
    assert rewinds[0]["to_step"] == 20 and len(rows(tmp_path / "runs" / "main" / "new" / "metrics.jsonl")) == 40


def test_from_before_a_rewind_the_run_comes_to_it_again(fragile, tmp_path):
    """As when the checkpoints since are damaged."""
    settings, env = fragile
    settings = (*settings, "trainer.on_nonfinite=rewind", "trainer.keep_last=9")
    done = train(*settings, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "runs" / "main" / "x"
    losses, rewinds = [row["loss"] for row in rows(path / "metrics.jsonl")], (path / "rewinds.json").read_text()
    (path / "result.json").unlink()
    for checkpoint in sorted((path / "checkpoints").iterdir())[1:]:
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    done = train(*settings, cwd=tmp_path, env=env)
    assert done.returncode == 0 and "after step 5 of 40" in done.stdout, done.stdout + done.stderr
    assert (path / "rewinds.json").read_text() == rewinds
    assert [row["loss"] for row in rows(path / "metrics.jsonl")] == losses


def test_rewinds_are_counted_and_survive_interruption(fragile, tmp_path):
    """A run that is killed after a rewind ends as the one that was not."""
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
    assert job.stdout is not None
    for line in job.stdout:
        if "going back" in line:
            job.kill()
    job.wait()
    done = train(*settings, "name=killed", cwd=tmp_path, env=env)
    assert done.returncode == 0 and "after step 20 of 40" in done.stdout, done.stderr
    losses = [[row["loss"] for row in rows(tmp_path / "runs" / "main" / n / "metrics.jsonl")] for n in ("x", "killed")]
    assert losses[0] == losses[1]


def test_a_run_stops_with_a_report(fragile, tmp_path):
    """It does not take the checkpoint of step 25, amid the bad batches, for healthy; and it stops again."""
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
        assert "resume_from=runs/main/x@20 is a run from the last healthy checkpoint" in done.stderr
        assert (path / "x" / "failure.txt").read_text() == done.stderr
        assert (path / "x" / "checkpoints" / "step-00000025.ckpt").exists()
        assert len(rows(path / "x" / "metrics.jsonl")) == step and not (path / "x" / "result.json").exists()
    others = tuple(s for s in settings if not s.startswith(("clip.", "name=")))
    on = (*others, "clip=none", "data.corruption.steps=[]", "resume_from=runs/main/x@20", "name=y")
    done = train(*on, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "training runs/main/y from runs/main/x/checkpoints/step-00000020.ckpt, the clipper's stat" in done.stdout
    assert rows(path / "y" / "metrics.jsonl")[:20] == rows(path / "x" / "metrics.jsonl")[:20]
    assert [row["step"] for row in rows(path / "y" / "metrics.jsonl")] == list(range(1, 41))


@pytest.mark.parametrize("mode", [(), SLOW(FSDP)])
def test_a_fork_with_the_same_settings_is_the_same_run(mode, settings, tmp_path):
    settings = (*settings, *mode, "trainer.keep_last=9")
    assert train(*settings, "name=old", cwd=tmp_path).returncode == 0
    old, new, other = (tmp_path / "runs" / "main" / name for name in ("old", "new", "other"))
    done = train(*settings, "name=new", "resume_from=runs/main/old@20", cwd=tmp_path)
    assert done.returncode == 0 and "from nothing" not in done.stdout, done.stderr
    ends = [weights(folder / "checkpoints" / "step-00000040.ckpt") for folder in (old, new)]
    assert same(*ends)
    assert [row["loss"] for row in rows(old / "metrics.jsonl")] == [row["loss"] for row in rows(new / "metrics.jsonl")]
    done = train(*settings, "name=other", "resume_from=runs/main/old@20", "lr=1e-4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lrs = [row["lr"] for row in rows(other / "metrics.jsonl")]
    assert lrs[:20] == [row["lr"] for row in rows(old / "metrics.jsonl")][:20] and max(lrs[20:]) <= 1e-4
    start, then = (weights(f / "checkpoints" / f"step-000000{step}.ckpt") for f, step in ((old, 20), (other, 25)))
    moved = max(float((start[name] - then[name]).abs().max()) for name in start)
    assert 0 < moved < 1e-3, "the optimizer took the new learning rate"


def test_training_goes_on_without_wandb(settings, tmp_path):
    """A server that refuses connections, for the whole run."""
    env = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    done = train(*settings, "logger=wandb", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "WANDB CANNOT BE REACHED" in done.stdout and "test loss" in done.stdout
    (file,) = tmp_path.glob("runs/main/*/wandb/offline-run-*/run-*.wandb")
    assert b"test_loss" in file.read_bytes()


def test_what_cannot_be_forked_is_said(settings, tmp_path):
    assert train(*settings, "name=old", "trainer.max_steps=10", cwd=tmp_path).returncode == 0
    ten = (*settings, "name=new")
    old = tmp_path / "runs" / "main" / "old"
    for given, said in (
        ("resume_from=runs/main/old", "it must be a run folder and a step, as runs/main/NAME@100"),
        ("resume_from=runs/main/none@5", "there is no run in runs/main/none"),
        ("resume_from=runs/main/old@7", "the run has no checkpoint of that step, but of 5, 10"),
        ("seed=1", "is not possible with seed=1: that run has seed=0"),
        ("model.num_hidden_layers=1", "with model.num_hidden_layers=1: that run has model.num_hidden_layers=2"),
        ("trainer.max_steps=10", "is not possible with trainer.max_steps=10: it must be more"),
        ("trainer.strategy=fsdp", "is not possible with trainer.strategy=fsdp: the checkpoints of"),
    ):
        given = (given,) if "resume_from" in given else ("resume_from=runs/main/old@10", given)
        done = train(*ten, *given, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    file = old / "checkpoints" / "step-00000010.ckpt"
    file.write_bytes(file.read_bytes()[:-100])
    done = train(*ten, "resume_from=runs/main/old@10", cwd=tmp_path)
    assert done.returncode == 2 and "step-00000010.ckpt is damaged" in done.stderr
    assert not (tmp_path / "runs" / "main" / "new").exists()
