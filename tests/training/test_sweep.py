"""Sweeps in processes of their own, their states, and sweepers other than Hydra's basic one."""

import json
import re
import signal
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers import TINY, read_jsonl, script, start, train


@pytest.fixture(scope="module")
def tiny(corpus: Path, cache: Path) -> tuple[str, ...]:
    return (f"data.path={corpus}", f"paths.cache={cache}", *TINY, "trainer.log_every=1")


@pytest.fixture(scope="module")
def settings(tiny: tuple[str, ...]) -> tuple[str, ...]:
    return (*tiny, "hydra/launcher=local")


def status(cwd: Path) -> str:
    return script("status.py", cwd=cwd, COLUMNS="120").stdout


def results(cwd: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in cwd.glob("runs/main/*/result.json")]


def test_sweep_runs_only_unfinished_jobs(settings, tmp_path):
    first = train("-m", *settings, "seed=0,1,2", "trainer.max_steps=4", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert len(re.findall("^started", first.stdout, re.M)) == len(re.findall("^finished", first.stdout, re.M)) == 3
    assert first.stdout.count("\n│") == 3, "the table of the sweep"
    assert "3 done" in status(tmp_path)
    again = train("-m", *settings, "seed=0,1,2,3", "trainer.max_steps=4", cwd=tmp_path)
    assert "3 of 4 are finished already" in again.stdout and again.stdout.count("started ") == 1
    runs = results(tmp_path)
    assert len(runs) == 4 and len({run["test_loss"] for run in runs}) == 4


def test_failed_job_is_reported_and_the_others_finish(settings, tmp_path):
    (tmp_path / "failing.py").write_text(
        "from zclip import ZClip\n\nclass Failing(ZClip):\n"
        "    def step(self, *args, **kwargs):\n        raise RuntimeError('step failed')\n"
    )
    overrides = (*settings, "trainer.max_steps=4", "clip._target_=zclip.ZClip,failing.Failing")
    done = train("-m", *overrides, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1, done.stderr
    assert re.match(r"1 of 2 runs have not finished: micro-zclip-\S+ \(status 1, \S+/log\.txt\)", done.stderr)
    assert "failed micro-zclip-" in done.stdout and done.stdout.count("log.txt): RuntimeError: step failed") == 1
    (log,) = (p for p in tmp_path.glob("runs/main/*/log.txt") if "step failed" in p.read_text())
    assert "step failed" in (log.parent / "failure.txt").read_text()
    assert "1 done, 1 failed" in status(tmp_path)


def test_ctrl_c_stops_all_jobs_and_the_same_command_resumes(settings, tmp_path):
    overrides = ("-m", *settings, "seed=0,1,2", "trainer.max_steps=900")
    job = start(*overrides, cwd=tmp_path)
    while len([p for p in tmp_path.glob("runs/main/*/metrics.jsonl") if p.stat().st_size]) < 2:
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    assert "2 running" in status(tmp_path)
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 130 and err == "interrupted; run the same command to resume\n"
    done = train(*overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for log in tmp_path.glob("runs/main/*/log.txt"):
        steps = [row["step"] for row in read_jsonl(log.parent / "metrics.jsonl")]
        assert steps == list(range(1, 901)), "each once"


def test_error_is_one_sentence(settings, tmp_path):
    done = train("-m", *settings, "hydra.launcher.n_jobs=0", "seed=0,1", cwd=tmp_path)
    message = "train.py: error: hydra.launcher.n_jobs=0 is not allowed: it must be an integer from 1\n"
    assert done.returncode == 2 and done.stderr == message
    done = train(*settings, cwd=tmp_path)
    message = "train.py: error: hydra/launcher=local is for sweeps, of one run or many: add -m\n"
    assert done.returncode == 2 and done.stderr == message
    done = script("status.py", "folder=none", cwd=tmp_path)
    assert done.returncode == 2 and "folder=none does not exist" in done.stderr


#: A sweeper that has no list of jobs: it chooses the second learning rate by the loss of the first.
SEQUENTIAL = """
import json
from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper


class Sequential(Sweeper):
    def __init__(self, **kwargs):
        self.losses = {}

    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        for lr in (0.001, 0.01):
            (job,) = self.launcher.launch([[*arguments, f"lr={lr}"]], initial_job_idx=len(self.losses))
            self.losses[lr] = job.return_value
        Path("losses.json").write_text(json.dumps(self.losses))
"""


@pytest.mark.parametrize("launcher", ["basic", "local"])
def test_sweeper_without_job_list_gets_test_losses(launcher, tiny, tmp_path):
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "sequential.py").write_text(SEQUENTIAL)
    sweep = (f"hydra/launcher={launcher}", "hydra.sweeper._target_=hydra_plugins.sequential.Sequential")
    done = train("-m", *tiny, "trainer.max_steps=4", *sweep, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert sorted(losses.values()) == sorted(result["test_loss"] for result in results(tmp_path))
    assert len(losses) == 2


def test_optuna_minimises_the_test_loss(tiny, tmp_path):
    pytest.importorskip("optuna", reason="hydra-optuna-sweeper is not installed (it is in the extra dev)")
    sweep = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1", "lr=interval(1e-3, 1e-2)")
    settings = tuple(s for s in tiny if not s.startswith("paths.cache"))  # Optuna writes its result there
    done = train("-m", *settings, "trainer.max_steps=4", *sweep, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    best = yaml.safe_load((tmp_path / "cache" / "sweeps" / "optimization_results.yaml").read_text())
    losses = [result["test_loss"] for result in results(tmp_path)]
    assert len(losses) == 3 and best["best_value"] == min(losses)
