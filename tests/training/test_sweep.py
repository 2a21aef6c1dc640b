"""Sweeps in processes of their own, their states, and sweepers other than Hydra's basic one."""

import json
import re
import signal
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers import CHECKOUT, SLOW, read_jsonl, script, start, train
from tests.training.process_control import Gates
from training.runtime.slurm import LAUNCHER

#: The launcher that starts a process for each job.
LOCAL = "hydra/launcher=local"


def status(cwd: Path) -> str:
    return script("status.py", cwd=cwd, COLUMNS="120").stdout


def results(cwd: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in cwd.glob("runs/main/*/result.json")]


#: A clipper that fails with one coefficient.
FAILING = """
from zclip import ZClip


class Failing(ZClip):
    def step(self, *args, **kwargs):
        if self.alpha == 0.5:
            raise RuntimeError("step failed")
        return super().step(*args, **kwargs)
"""


def test_sweep_runs_only_unfinished_jobs_and_reports_those_that_fail(tiny, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    env = {"PYTHONPATH": str(tmp_path)}
    settings = (*tiny, "trainer.max_steps=4", "clip._target_=failing.Failing")
    first = train(*settings, "clip.alpha=0.97", cwd=tmp_path, env=env)
    assert first.returncode == 0, first.stderr
    done = train("-m", *settings, LOCAL, "clip.alpha=0.97,0.5", cwd=tmp_path, env=env)
    assert "1 of 2 are finished already" in done.stdout
    assert re.findall("^started|^failed|^finished", done.stdout, re.M) == ["started", "failed"]
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1, done.stderr
    assert re.match(r"1 of 2 runs have not finished: micro-zclip-\S+ \(status 1, \S+/log\.txt\)", done.stderr)
    assert "failed micro-zclip-" in done.stdout and done.stdout.count("log.txt): RuntimeError: step failed") == 1
    (log,) = (p for p in tmp_path.glob("runs/main/*/log.txt") if "step failed" in p.read_text())
    assert "step failed" in (log.parent / "failure.txt").read_text()
    assert "1 done, 1 failed" in status(tmp_path)
    assert len(results(tmp_path)) == 1


def test_other_processes_compose_the_configuration_that_the_command_line_names(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [train, _self_]\nlr: 1e-2\n")
    settings = ("-m", LOCAL, f"--config-dir={tmp_path}", "--config-name=mine", "seed=1,2")
    planned = train(*settings, "++plan=true", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    lines = [line for line in planned.stdout.splitlines() if line.startswith("sbatch ")]
    search = f"--config-dir={tmp_path} --config-name=mine"
    assert [line.partition(".sbatch ")[2] for line in lines] == [f"seed={seed} {search}" for seed in (1, 2)]


def test_folders_of_a_sweep_are_printed_and_not_made(tiny, tmp_path):
    done = train("-m", LOCAL, *tiny, "seed=1,2", "print_run_dir=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.rpartition("-")[0] for line in done.stdout.splitlines()] == [
        f"runs/main/micro-zclip-lr0.003-seed{seed}" for seed in (1, 2)
    ]
    assert not list(tmp_path.iterdir())


def test_linked_log_is_refused_before_a_job_starts(tiny, tmp_path):
    sweep = ("-m", *tiny, LOCAL, "seed=0,1")
    planned = train(*sweep, "print_run_dir=true", cwd=tmp_path)
    path = tmp_path / planned.stdout.splitlines()[1]
    path.mkdir(parents=True)
    (path / "log.txt").symlink_to(tmp_path / "outside")
    done = train(*sweep, cwd=tmp_path)
    assert done.returncode == 2 and "log.txt is a link: what is written there must stay in its folder" in done.stderr
    assert "started" not in done.stdout and not (tmp_path / "outside").exists()


@pytest.mark.slow
def test_sweep_of_finished_jobs_and_another_starts_one_process(tiny, tmp_path):
    settings = (*tiny, LOCAL, "trainer.max_steps=4")
    first = train("-m", *settings, "seed=0,1", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert len(re.findall("^started", first.stdout, re.M)) == len(re.findall("^finished", first.stdout, re.M)) == 2
    assert first.stdout.count("\n│") == 2, "the table of the sweep"
    assert "2 done" in status(tmp_path)
    again = train("-m", *settings, "seed=0,1,2", cwd=tmp_path)
    assert "2 of 3 are finished already" in again.stdout and again.stdout.count("started ") == 1
    runs = results(tmp_path)
    assert len(runs) == 3 and len({run["test_loss"] for run in runs}) == 3


#: train.py, whose jobs do not train: each waits for a signal, and ends with the status of a run that it stopped.
WAITING = """
import os
import signal
import sys
import time

if CHILD in os.environ:
    caught = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: caught.append(signum))
    open(f"waiting-{os.getpid()}", "w").close()
    while not caught:
        time.sleep(0.01)
    open(f"caught-{os.getpid()}", "w").close()
    if "seed=1" in sys.argv:
        time.sleep(0.3)  # there is room for another job when the first has ended
    sys.exit(128 + caught[0])
sys.path[0] = CHECKOUT
file = CHECKOUT + "/train.py"
exec(compile(open(file).read(), file, "exec"))  # this file remains the program that starts for each job
"""


def test_ctrl_c_reaches_all_jobs_and_starts_no_other(tiny, tmp_path):
    program = tmp_path / "train.py"
    program.write_text(f"CHECKOUT, CHILD = {str(CHECKOUT)!r}, {LAUNCHER!r}\n{WAITING}")
    jobs = ("seed=0,1,2", "hydra.launcher.n_jobs=2", LOCAL)
    job = start("-m", *tiny, *jobs, cwd=tmp_path, program=str(program))
    while len(list(tmp_path.glob("waiting-*"))) < 2:
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 130 and err == "interrupted; run the same command to resume\n", err
    assert out.count("started ") == 2 and "failed" not in out and len(list(tmp_path.glob("caught-*"))) == 2, out


@pytest.mark.slow
def test_ctrl_c_stops_all_jobs_and_the_same_command_resumes(tiny, tmp_path):
    """Two jobs wait in a step, and the third has not started. The jobs are continued by Hydra's own launcher."""
    gates = Gates(tmp_path / "gates", 3)
    jobs = ("seed=0,1,2", "hydra.launcher.n_jobs=2")
    overrides = (*tiny, *gates.overrides, "trainer.log_every=1")
    job = start("-m", *overrides, LOCAL, *jobs, cwd=tmp_path, **gates.env)
    while len([p for p in tmp_path.glob("runs/main/*/metrics.jsonl") if len(p.read_bytes().splitlines()) == 2]) < 2:
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    assert "2 running" in status(tmp_path)
    job.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert job.poll() is None, "it waits for the jobs"
    gates.open(3)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 130 and err == "interrupted; run the same command to resume\n", err
    assert out.count("started ") == 2 and not results(tmp_path), out
    for log in tmp_path.glob("runs/main/*/log.txt"):
        assert re.search(r"interrupted after step [34]; run the same", log.read_text()), log.read_text()
    done = train("-m", *overrides, jobs[0], cwd=tmp_path, env=gates.env)
    assert done.returncode == 0 and done.stdout.count("continuing") == 2, done.stderr
    files = list(tmp_path.glob("runs/main/*/metrics.jsonl"))
    assert len(files) == 3
    for file in files:
        assert [row["step"] for row in read_jsonl(file)] == list(range(1, 41)), "each once"


def test_error_is_one_sentence(tiny, tmp_path):
    settings = (*tiny, LOCAL)
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


@pytest.mark.parametrize("launcher", ["basic", SLOW("local")])
def test_sweeper_without_job_list_gets_test_losses(launcher, tiny, tmp_path):
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "sequential.py").write_text(SEQUENTIAL)
    sweep = (f"hydra/launcher={launcher}", "hydra.sweeper._target_=hydra_plugins.sequential.Sequential")
    done = train("-m", *tiny, "trainer.max_steps=4", *sweep, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert sorted(losses.values()) == sorted(result["test_loss"] for result in results(tmp_path))
    assert len(losses) == 2
    compared = r"The final test loss was 0\.\d\d nats higher with lr=\S+ than with lr=\S+\.\npicture  (\S+)\n$"
    found = re.search(compared, done.stdout)
    assert found is not None and (tmp_path / found[1]).read_bytes().startswith(b"\x89PNG"), done.stdout
    assert "unigram entropy" not in done.stdout, "the table of a single run"


@pytest.mark.slow
def test_optuna_minimises_the_test_loss(tiny, tmp_path):
    pytest.importorskip("optuna", reason="hydra-optuna-sweeper is not installed (it is in the extra dev)")
    sweep = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1", "lr=interval(1e-3, 1e-2)")
    settings = tuple(s for s in tiny if not s.startswith("paths.cache"))  # Optuna writes its result there
    done = train("-m", *settings, "trainer.max_steps=4", *sweep, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    best = yaml.safe_load((tmp_path / "cache" / "sweeps" / "optimization_results.yaml").read_text())
    losses = [result["test_loss"] for result in results(tmp_path)]
    assert len(losses) == 2 and best["best_value"] == min(losses)
