"""Non-finite losses, runs forked from another, and wandb out of reach."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console

from common.errors import ConfigError, UserError
from experiments.run.read import corrupted_steps, read_run
from tests.helpers import (
    CHECKOUT,
    FSDP,
    SLOW,
    compose_config,
    copy_run,
    only_run,
    read_jsonl,
    same,
    start,
    train,
    train_to_end,
    wait_for_steps,
)
from training.checkpoint.fork import check_corruption, find_fork_source
from training.checkpoint.format import load_model_state
from training.checkpoint.resume import Start
from training.config.compose import read_config
from training.monitor.wandb_run import WandbRun
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
def settings(tiny: tuple[str, ...]) -> tuple[str, ...]:
    return (*tiny, "trainer.checkpoint_every=5", "lr=1e-2")


@pytest.fixture(scope="module")
def fragile(settings, once) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return settings and environment of a run in which steps 21 to 26 are not finite, unless they are taken again."""
    folder = once("fragile", lambda folder: (folder / "fragile.py").write_text(FRAGILE))
    overrides = (
        *settings, "clip._target_=fragile.Fragile", "data.corruption.steps=[21,22,23,24,25,26]",
        "data.corruption.kind=random", "trainer.max_consecutive_nonfinite=3", "trainer.log_every=2", "name=x",
    )  # fmt: skip
    return overrides, {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def rewound_run(fragile, once) -> tuple[Path, str]:
    """Return the folder of that run, rewound twice, with all of its checkpoints; and what the run has printed."""
    settings, env = fragile

    def fill(folder: Path) -> None:
        output = train_to_end(*settings, "trainer.on_nonfinite=rewind", "trainer.keep_last=9", cwd=folder, env=env)
        (folder / "output").write_text(output)

    folder = once("rewound", fill)
    return only_run(folder), (folder / "output").read_text()


def losses(path: Path) -> list[float | None]:
    return [row["loss"] for row in read_jsonl(path)]


def assert_rewound(path: Path, output: str) -> None:
    """Assert that a run was rewound twice, and that the corrupted batches that were skipped did not come back."""
    assert "for 3 steps in a row, up to step 23: rewinding to step 20 and skipping the 3 batches since" in output
    assert json.loads((path / "rewinds.json").read_text()) == {
        "rewinds": [
            {"from_step": 23, "to_step": 20, "skipped_batches": 3},
            {"from_step": 26, "to_step": 20, "skipped_batches": 9},
        ]
    }
    assert [row["step"] for row in read_jsonl(path / "metrics.jsonl")] == list(range(1, 41))
    assert [row["step"] for row in read_jsonl(path / "metrics.jsonl") if row["grad_norm"] is None] == []
    removed = read_jsonl(path / "rewound-1.jsonl")
    assert [row["step"] for row in removed] == [21, 22, 23, 24] and {row["grad_norm"] for row in removed} == {None}


def test_run_is_rewound_and_skips_the_corrupted_batches(rewound_run, fragile, tmp_path):
    """A run forked from a later step skips the same batches."""
    path, output = rewound_run
    assert_rewound(path, output)
    assert corrupted_steps(read_run(path)) == [], "its tables and picture name none"
    settings, env = fragile
    copy_run(path, tmp_path)
    done = train(
        *settings, "trainer.on_nonfinite=rewind", "name=fork", "fork_from=runs/main/x@35", cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "runs" / "main" / "fork" / "metrics.jsonl") == losses(path / "metrics.jsonl")


@pytest.mark.slow
def test_sharded_run_is_rewound_and_skips_the_corrupted_batches(fragile, tmp_path):
    settings, env = fragile
    settings = (*settings, *FSDP, "trainer.on_nonfinite=rewind")
    done = train(*settings, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "runs" / "main" / "x"
    assert_rewound(path, done.stdout)
    done = train(*settings, "name=fork", "fork_from=runs/main/x@35", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "runs" / "main" / "fork" / "metrics.jsonl") == losses(path / "metrics.jsonl")


def test_rewind_depends_neither_on_log_every_nor_on_an_interruption(rewound_run, fragile, tmp_path):
    """The reference logs every second step; this run every step, and every seventh once it resumes."""
    settings, env = fragile
    settings = (*(s for s in settings if not s.startswith("trainer.log_every")), "trainer.on_nonfinite=rewind")
    job = start(*settings, "trainer.log_every=1", cwd=tmp_path, **env)
    wait_for_steps(job, tmp_path, 17)
    job.terminate()
    job.wait()
    done = train(*settings, "trainer.log_every=7", cwd=tmp_path, env=env)
    assert done.returncode == 0 and "continuing" in done.stdout, done.stderr
    path = tmp_path / "runs" / "main" / "x"
    rewinds = json.loads((path / "rewinds.json").read_text())["rewinds"]
    assert [(r["from_step"], r["to_step"]) for r in rewinds] == [(23, 20), (26, 20)]
    assert losses(path / "metrics.jsonl") == losses(rewound_run[0] / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("log_every", [1, 7])
def test_rewind_of_an_uninterrupted_run_does_not_depend_on_log_every(log_every, rewound_run, fragile, tmp_path):
    settings, env = fragile
    settings = (*(s for s in settings if not s.startswith("trainer.log_every")), f"trainer.log_every={log_every}")
    done = train(*settings, "trainer.on_nonfinite=rewind", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "runs" / "main" / "x"
    rewinds = json.loads((path / "rewinds.json").read_text())["rewinds"]
    assert [(r["from_step"], r["to_step"]) for r in rewinds] == [(23, 20), (26, 20)]
    assert losses(path / "metrics.jsonl") == losses(rewound_run[0] / "metrics.jsonl")


@pytest.mark.slow
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


def test_rewind_is_replayed_when_resuming_before_it(rewound_run, fragile, tmp_path):
    """The checkpoints after the rewind are damaged."""
    settings, env = fragile
    path = copy_run(rewound_run[0], tmp_path)
    before, rewinds = losses(path / "metrics.jsonl"), (path / "rewinds.json").read_text()
    (path / "result.json").unlink()
    for checkpoint in sorted((path / "checkpoints").iterdir())[1:]:
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    done = train(*settings, "trainer.on_nonfinite=rewind", "trainer.keep_last=9", cwd=tmp_path, env=env)
    assert done.returncode == 0 and "after step 5 of 40" in done.stdout, done.stdout + done.stderr
    assert (path / "rewinds.json").read_text() == rewinds
    assert losses(path / "metrics.jsonl") == before


def test_lost_record_of_rewinds_is_one_sentence(rewound_run, fragile, tmp_path):
    settings, env = fragile
    path = copy_run(rewound_run[0], tmp_path)
    (path / "result.json").unlink()
    (path / "rewinds.json").unlink()
    done = train(*settings, "trainer.on_nonfinite=rewind", "trainer.keep_last=9", cwd=tmp_path, env=env)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "has skipped 9 more batches than this run: the record of its rewinds is missing" in done.stderr
    assert (path / "checkpoints" / "step-00000040.ckpt").exists()


def test_run_ends_after_too_many_rewinds(fragile, tmp_path):
    settings, env = fragile
    settings = (*settings, "trainer.on_nonfinite=rewind", "trainer.max_consecutive_nonfinite=2")
    done = train(*settings, "trainer.max_rewinds=1", cwd=tmp_path, env=env)
    assert done.returncode == 3 and "after 1 rewinds (trainer.max_rewinds): the run ends here" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_rewinds_skip_more_and_more_batches(fragile, tmp_path):
    settings, env = fragile
    settings = (*settings, "trainer.on_nonfinite=rewind", "trainer.max_consecutive_nonfinite=2")
    done = train(*settings, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    rewinds = json.loads((tmp_path / "runs" / "main" / "x" / "rewinds.json").read_text())["rewinds"]
    assert [rewind["skipped_batches"] for rewind in rewinds] == [2, 6, 12]
    assert {rewind["to_step"] for rewind in rewinds} == {20}


@pytest.mark.slow
def test_run_killed_after_a_rewind_ends_as_one_that_was_not(rewound_run, fragile, tmp_path):
    settings, env = fragile
    settings = (*settings, "trainer.on_nonfinite=rewind")
    job = start(*settings, cwd=tmp_path, **env)
    for line in job.lines():
        if "rewinding" in line:
            job.kill()
    job.wait()
    done = train(*settings, cwd=tmp_path, env=env)
    assert done.returncode == 0 and "after step 20 of 40" in done.stdout, done.stderr
    path = tmp_path / "runs" / "main" / "x"
    assert losses(path / "metrics.jsonl") == losses(rewound_run[0] / "metrics.jsonl")


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


@pytest.mark.parametrize("mode", ["one", SLOW("sharded")])
def test_fork_with_the_same_settings_equals_the_old_run(mode, tiny, tmp_path, request):
    sharded = mode == "sharded"
    old = copy_run(request.getfixturevalue("sharded_run" if sharded else "finished_run"), tmp_path)
    source = f"fork_from=runs/main/{old.name}@24"
    settings = (*tiny, *(FSDP if sharded else ()), "trainer.checkpoint_every=8", "trainer.keep_last=9", source)
    processes = 2 if sharded else 1
    new, other = (tmp_path / "runs" / "main" / name for name in ("new", "other"))
    rows = (old / "metrics.jsonl").read_text().splitlines(keepends=True)
    (old / "metrics.jsonl").write_text("".join(rows[:5]))  # the others are in the checkpoint
    done = train(*settings, "name=new", cwd=tmp_path, processes=processes)
    (old / "metrics.jsonl").write_text("".join(rows))
    assert done.returncode == 0 and "statistics reset" not in done.stdout, done.stderr
    ends = [load_model_state(folder / "checkpoints" / "step-00000040.ckpt") for folder in (old, new)]
    assert same(*ends)
    assert losses(old / "metrics.jsonl") == losses(new / "metrics.jsonl")
    done = train(*settings, "name=other", "lr=1e-4", cwd=tmp_path, processes=processes)
    assert done.returncode == 0, done.stderr
    lrs = [row["lr"] for row in read_jsonl(other / "metrics.jsonl")]
    assert lrs[:24] == [row["lr"] for row in read_jsonl(old / "metrics.jsonl")][:24] and max(lrs[24:]) <= 1e-4
    before = load_model_state(old / "checkpoints" / "step-00000024.ckpt")
    after = load_model_state(other / "checkpoints" / "step-00000032.ckpt")
    moved = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert 0 < moved < 1e-3, "the optimizer uses the new learning rate"


#: train.py, which waits a second for wandb's server.
IMPATIENT = """
import runpy
import sys

from training.monitor import wandb_run

wandb_run.SERVER_TIMEOUT = 1
sys.argv.pop(0)
sys.path[0] = sys.argv[0].removesuffix("/train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_records_of_wandb_stay_in_the_run_folder(tmp_path):
    (tmp_path / "wandb").symlink_to("elsewhere")
    with pytest.raises(UserError, match="wandb is a link"):
        WandbRun(compose_config("logger=wandb"), tmp_path, Console())


def test_training_continues_without_wandb(tiny, tmp_path):
    """The server refuses connections for the whole run."""
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    env = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    env["PYTHONPATH"] = str(CHECKOUT)
    program = str(tmp_path / "impatient.py")
    settings = (str(CHECKOUT / "train.py"), *tiny, "trainer.max_steps=4", "logger=wandb")
    job = start(*settings, cwd=tmp_path, program=program, **env)
    out, err = job.communicate(timeout=100)
    assert job.returncode == 0, err
    assert "WANDB CANNOT BE REACHED" in out and "test loss" in out
    (file,) = tmp_path.glob("runs/main/*/wandb/offline-run-*/run-*.wandb")
    assert b"test_loss" in file.read_bytes()


def test_impossible_forks_are_refused_in_one_sentence(tiny, finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = copy_run(finished_run, tmp_path).rename("runs/main/old")
    settings = (*tiny, "name=new")
    for override, message in (
        ("fork_from=runs/main/old", "it must be a run folder and a step, as FOLDER@STEP, or null"),
        (f"fork_from=old@{'1' * 250}", "it must be a run folder and a step, as FOLDER@STEP, or null"),
        ("fork_from=runs/main/none@5", "there is no run in runs/main/none"),
        ("fork_from=runs/main/old@7", "the run has no checkpoint of that step, but of 8, 16, 24, 32, 40"),
        ("seed=1", "is not possible with seed=1: that run has seed=0"),
        ("model.num_hidden_layers=1", "with model.num_hidden_layers=1: that run has model.num_hidden_layers=2"),
        ("trainer.max_steps=8", "is not possible with trainer.max_steps=8: it must be more"),
        ("optim.amsgrad=true", "is not possible with optim.amsgrad=true: that run has optim.amsgrad=false"),
        ("optim=sgd", "is not possible with optim.name=sgd: that run has optim.name=adamw"),
        ("trainer.strategy=fsdp", "is not possible with trainer.strategy=fsdp: the checkpoints of"),
    ):
        fork = () if "fork_from" in override else ("fork_from=runs/main/old@8",)
        with pytest.raises(ConfigError, match=r"^fork_from=") as error:
            find_fork_source(compose_config(*settings, *fork, override), RunDir(Path("runs/main/new")))
        (line,) = str(error.value).splitlines()
        assert message in line
    file = old / "checkpoints" / "step-00000008.ckpt"
    file.write_bytes(file.read_bytes()[:-100])
    done = train(*settings, "fork_from=runs/main/old@8", cwd=tmp_path)
    assert done.returncode == 2 and "step-00000008.ckpt is damaged" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "runs" / "main" / "new").exists()


def test_checkpoint_knows_all_rewinds_but_those_to_its_own_step():
    rewinds = [(23, 10, 13), (26, 20, 19), (27, 20, 26)]
    records = [dict(zip(("from_step", "to_step", "skipped_batches"), rewind, strict=True)) for rewind in rewinds]
    assert Start(20, None, records, None, 0).skipped_before == 13
    assert Start(30, None, records, None, 0).skipped_before == 26
    assert Start(10, None, records[:1], None, 0).skipped_before == 0


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ("[30]", None),
        ("[5,30]", r"data\.corruption\.steps=\[5, 30\]: up to step 16, that run has \[\]"),
        ("[18]", "that run was rewound, and takes the batch of the text at step 18"),
    ],
)
def test_corrupted_batches_of_a_fork_are_those_that_are_said(steps, problem, finished_run, tiny, tmp_path):
    old = copy_run(finished_run, tmp_path)
    (old / "rewinds.json").write_text('{"rewinds": [{"from_step": 20, "to_step": 16, "skipped_batches": 4}]}')
    config = compose_config(*tiny, "name=new", f"fork_from={old}@16", f"data.corruption.steps={steps}")
    with nullcontext() if problem is None else pytest.raises(ConfigError, match=problem):
        assert find_fork_source(config, RunDir(tmp_path / "new")).step == 16


def test_kind_of_the_corrupted_batches_before_a_fork_is_the_old_runs(tiny):
    old = compose_config(*tiny, "data.corruption.steps=[5]", "data.corruption.kind=repeat")
    new = compose_config(*tiny, "data.corruption.steps=[5,30]", "data.corruption.kind=random")
    with pytest.raises(ConfigError, match=r"data\.corruption\.kind=random: that run has repeat"):
        check_corruption(new, old, [], 16, lambda problem: ConfigError("fork_from", "x", problem=problem))


def test_drawn_batches_before_a_fork_are_the_old_runs(tiny):
    """Of another length, other steps are drawn; those of the old run can be listed."""

    def check(*overrides):
        new = compose_config(*tiny, *overrides)
        check_corruption(new, old, [], 16, lambda problem: ConfigError("fork_from", "x", problem=problem))

    drawn = ("data.corruption.random_steps=9", "data.corruption.kind=mixed")
    old = compose_config(*tiny, *drawn)
    steps = list(old.corrupted_batches)
    assert steps[0] <= 16 < steps[-1]
    check(*drawn)
    check(f"data.corruption.steps={steps}", "data.corruption.kind=mixed")
    problem = r"data\.corruption\.random_steps=9 and trainer\.max_steps=60: up to step 16, that run has"
    with pytest.raises(ConfigError, match=problem):
        check(*drawn, "trainer.max_steps=60")
    with pytest.raises(ConfigError, match=r"data\.corruption\.kind=repeat: that run has mixed"):
        check(f"data.corruption.steps={steps}", "data.corruption.kind=repeat")
