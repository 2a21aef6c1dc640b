"""Sweeps in processes of their own, their states, and sweepers other than Hydra's basic one."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode

from common.errors import RunError, UserError
from experiments.paper.tables_and_figures import SUITES
from hydra_plugins import zclip_launchers
from hydra_plugins.zclip_launchers import Slurm
from hydra_plugins.zclip_sweeper import SuiteSweeper
from tests.helpers import CHECKOUT, RESULT, SLOW, read_jsonl, script, start, train
from tests.training.process_control import Gates
from training.launch import sweep as sweeps
from training.launch.slurm_queue import submit
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


def suite_jobs(*overrides: str) -> list[list[str]]:
    with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        (jobs,) = SuiteSweeper.split_arguments(parser.parse_overrides([*overrides]), None)
    return jobs


def test_jobs_of_suites_are_their_runs_times_the_sweep():
    jobs = suite_jobs("experiment=[table3,table5]", "scale=micro", "seed=0,1")
    specs = dict.fromkeys([*SUITES["table3"], *SUITES["table5"]])
    assert len(specs) < len(SUITES["table3"]) + len(SUITES["table5"]), "both have a run with the defaults"
    assert jobs == [
        ["experiment=paper", *spec.overrides, "scale=micro", f"seed={seed}"] for seed in (0, 1) for spec in specs
    ]
    assert suite_jobs("experiment=figure7", "scale=micro") == [
        ["experiment=paper", *spec.overrides, "scale=micro"] for spec in SUITES["figure7"]
    ]
    assert suite_jobs("experiment=figure7", "scale=micro", "optim=glob(none*)") == [], "no value, no job"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("experiment=table3",), "scale is not set: experiment=table3 is run at scale=micro, scale=proxy or scale=p"),
        (("experiment=table3", "scale=main"), "scale=main is not possible: experiment=table3 is run at scale=micro"),
        (("scale=micro",), "hydra/sweeper=suite is not possible without experiment=, which sets it: it names suites"),
        (
            ("experiment=[table2,main]", "scale=micro"),
            "experiment=[table2,main] is not possible: main is none of the suites all, clip_rate,",
        ),
        (("experiment=table3", "scale=micro", "lr=1e-3"), "lr cannot be set with experiment=table3: the suites set cl"),
        (
            ("experiment=table3", "scale=micro", "clip=none"),
            "clip cannot be set with experiment=table3: the suites set",
        ),
        (("experiment=table3", "scale=micro", "++paper.lr=1"), "paper.lr cannot be set with experiment=table3: the su"),
        (("experiment=table3", "scale=micro", "~clip.alpha"), "clip.alpha cannot be set with experiment=table3: the s"),
        (
            ("experiment=figure2", "scale=micro", "data.corruption.steps=[5]"),
            "data.corruption.steps cannot be set with experiment=figure2: the suites set clip, clip.alpha, "
            "clip.recovery_window, clip.z_thresh, data.corruption.steps, model.qk_norm, paper.lr; give the steps as "
            "paper.corruption_steps",
        ),
    ],
)
def test_settings_that_suites_do_not_take_are_named(overrides, message):
    with pytest.raises(UserError) as error:
        suite_jobs(*overrides)
    assert str(error.value).startswith(message) and ("give the steps" in str(error.value)) == ("give the" in message)


@pytest.fixture
def plugin(monkeypatch, tmp_path) -> Callable[..., Any]:
    """Return a function that makes the launcher or the sweeper of train.py with these overrides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeps, "completed_jobs", [])

    def make(kind: str, *overrides: str) -> Any:
        with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            config = loader.load_configuration("train", [*overrides], RunMode.MULTIRUN)
            context = HydraContext(config_loader=loader, callbacks=Callbacks())
            instantiate = getattr(Plugins.instance(), f"instantiate_{kind}")
            return instantiate(hydra_context=context, task_function=None, config=config)

    return make


def test_equal_runs_of_suites_are_one_job(plugin):
    settings = ["experiment=table5", "scale=micro", "seed=0,0"]
    sweeper = plugin("sweeper", *settings)
    sweeper.overrides = sweeper.split_arguments(OverridesParser.create().parse_overrides(settings), None)
    ((*twice,),) = sweeper.overrides
    assert len(twice) == 6 and sweeper.get_job_batch() == twice[:3]


@pytest.mark.parametrize("n_jobs", ["0", "1.5", "true"])
@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_number_of_jobs_is_an_integer_from_1(launcher, n_jobs, plugin):
    message = rf"hydra\.launcher\.n_jobs={n_jobs} is not allowed: it must be an integer from 1"
    with pytest.raises(Exception, match=message):
        plugin("launcher", f"hydra/launcher={launcher}", f"hydra.launcher.n_jobs={n_jobs}")


def test_options_of_sbatch_are_those_that_are_set(plugin):
    assert plugin("launcher", "hydra/launcher=slurm").options == ["--time=1-00:00:00", "--signal=USR1@300"]
    options = ("partition=gpu", "account=me", "qos=high", "cpus_per_task=8", "time=10", "signal_seconds=60")
    settings = [f"hydra.launcher.{option}" for option in (*options, "options=['--constraint=h100']")]
    assert plugin("launcher", "hydra/launcher=slurm", *settings).options == [
        "--partition=gpu", "--account=me", "--qos=high", "--cpus-per-task=8", "--time=10", "--signal=USR1@60",
        "--constraint=h100",
    ]  # fmt: skip
    with pytest.raises(Exception, match=r"hydra\.launcher\.n_jobs=2 is not possible with hydra\.launcher\.wait=false"):
        plugin("launcher", "hydra/launcher=slurm", "hydra.launcher.n_jobs=2", "hydra.launcher.wait=false")


#: A stand-in for sbatch: it adds the job to the file `queue`.
SBATCH = """#!/bin/sh
echo "$*" >> calls
for argument; do
    case $argument in --output=*) log=$(echo "${argument#--output=}" | sed s/%%/%/g) ;; esac
done
number=$(wc -l < calls)
echo "$number 0 $(dirname "$log")" >> queue
echo "$number"
"""

#: A stand-in for squeue. A job waits while it is asked for twice, runs as long, and ends; job 2 has no result.
SQUEUE = """#!/bin/sh
[ -e broken ] && rm broken && echo the controller restarts >&2 && exit 1
touch queue
while read -r number age folder; do
    case $age in
        0 | 1) echo "$number PENDING" ;;
        2 | 3) echo "$number RUNNING" ;;
        *) [ "$number" = 2 ] || echo '%s' | sed "s/NUMBER/$number/" > "$folder/result.json"; continue ;;
    esac
    echo "$number $((age + 1)) $folder" >> queued
done < queue
touch queued
mv queued queue
""".replace("%s", json.dumps(RESULT | {"test_loss": "NUMBER"}).replace('"NUMBER"', "NUMBER"))


@pytest.fixture
def slurm(plugin, tmp_path, monkeypatch) -> Callable[..., Slurm]:
    """Return a function that makes the launcher, for stand-ins of SLURM's programs."""
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return lambda *settings: plugin("launcher", "hydra/launcher=slurm", "hydra.launcher.poll_seconds=0.01", *settings)


def names(out: str, pattern: str) -> list[str]:
    """Return the seeds of the runs on the lines that begin with a pattern."""
    return re.findall(rf"^{pattern} micro-zclip-\S+-seed(\d)", out, re.M)


def test_slurm_jobs_take_turns_and_only_unfinished_ones_are_submitted(slurm, capsys):
    launcher = slurm("hydra.launcher.n_jobs=2")
    jobs = [[f"seed={seed}", "paths.runs=50%"] for seed in (7, 8, 9)]
    with pytest.raises(RunError, match=r"^1 of 3 runs have not finished: micro-\S+-seed8\S* \(job 2, \S+/log\.txt\)$"):
        launcher.launch(jobs, 0)
    out = capsys.readouterr().out
    begun = [line.split()[0] for line in out.splitlines()]
    assert begun == [
        *("job", "job", "waiting", "waiting", "running", "running", "finished", "failed"),
        *("job", "waiting", "running", "finished"),
    ]
    calls = Path("calls").read_text().splitlines()
    for call, seed in zip(calls, (7, 8, 9), strict=True):
        folder = next(Path("50%/main").glob(f"*-seed{seed}*")).absolute()
        expected = f"--output={str(folder).replace('%', '%%')}/log.txt --job-name={folder.name} "
        assert f"--nodes=1 --ntasks-per-node=1 --time=1-00:00:00 --signal=USR1@300 {expected}" in call
        assert call.endswith(f"train.sbatch seed={seed} paths.runs=50%")
    again = launcher.launch(jobs, 0)
    assert "2 of 3 are finished already" in capsys.readouterr().out
    assert [job.return_value for job in again] == [1, 4, 3] and len(Path("calls").read_text().splitlines()) == 4


def test_submitted_slurm_jobs_need_not_be_waited_for(slurm, capsys):
    launcher = slurm("hydra.launcher.wait=false")
    for line in (r"job \d:", r"job \d has"):
        returned = launcher.launch([["seed=7"], ["seed=7"]], 0)
        out = capsys.readouterr().out
        assert names(out, line) == ["7"] and out.endswith("run make status to see their states\n")
        assert [job.return_value for job in returned] == [None, None]
    assert len(Path("calls").read_text().splitlines()) == 1


def test_squeue_may_fail_for_a_while(slurm, monkeypatch, capsys):
    launcher = slurm()
    monkeypatch.setattr(zclip_launchers, "submit", submit_and_break)
    (job,) = launcher.launch([["seed=7"]], 0)
    assert job.return_value == 1 and names(capsys.readouterr().out, "finished") == ["7"]
    monkeypatch.setattr(zclip_launchers, "SQUEUE_TIMEOUT", 0)
    with pytest.raises(UserError, match=r"^squeue failed: the controller restarts$"):
        launcher.launch([["seed=8"]], 0)


def submit_and_break(*arguments: list[str]) -> str:
    """Submit a job, after which squeue fails once."""
    Path("broken").touch()
    return submit(*arguments)


#: A program in place of train.py: it finishes its run, but for two, and is alone.
PROGRAM = """
import json, os, sys, time
from pathlib import Path

seed = sys.argv[1].removeprefix("seed=")
(folder,) = Path("runs/main").glob(f"*-seed{seed}*")
Path(f"running-{seed}").touch()
print(f"run {seed}", *sys.argv[2:], os.environ[LAUNCHER], os.getsid(0) == os.getpid())
time.sleep(0.15)
if [*Path().glob("running-*")] != [Path(f"running-{seed}")]:
    sys.exit("not alone")
Path(f"running-{seed}").unlink()
if seed == "8":
    os.kill(os.getpid(), 9)
if seed == "9":
    (folder / "failure.txt").write_text("it has diverged")
    sys.exit(3)
(folder / "result.json").write_text(json.dumps(RESULT | {"test_loss": int(seed)}))
"""


def test_local_jobs_take_turns_and_say_how_they_ended(plugin, tmp_path, monkeypatch, capsys):
    program = tmp_path / "train.py"
    program.write_text(f"LAUNCHER, RESULT = {LAUNCHER!r}, {RESULT!r}\n{PROGRAM}")
    monkeypatch.setattr("sys.argv", [str(program)])
    found = f"hydra.searchpath=[{tmp_path}]"
    launcher = plugin("launcher", LOCAL, "hydra.launcher.n_jobs=1", found)
    with pytest.raises(RunError) as error:
        launcher.launch([["seed=7"], ["seed=8"], ["seed=7"], ["seed=9"]], 0)
    assert re.fullmatch(
        r"2 of 4 runs have not finished: \S+-seed8\S* \(killed by SIGKILL, \S+\), \S+-seed9\S* \(status 3, \S+\)",
        str(error.value),
    ), error.value
    out = capsys.readouterr().out
    assert [names(out, begin) for begin in ("started", "finished", "failed")] == [["7", "8", "9"], ["7"], ["8", "9"]]
    assert re.search(r"^failed .*-seed9.*\): it has diverged$", out, re.M) and re.search(
        r"^finished .*, 2 left$", out, re.M
    )
    with pytest.raises(RunError, match=r"^1 of 2 runs have not finished"):
        launcher.launch([["seed=7"], ["seed=8"]], 0)
    assert "1 of 2 are finished already" in capsys.readouterr().out
    logs = {path.parent.name.split("-seed")[1][0]: path.read_text() for path in tmp_path.glob("runs/main/*/log.txt")}
    line = f"{found} {os.getpid()} True\n"
    assert logs == {"7": f"run 7 {line}", "8": f"run 8 {line}" * 2, "9": f"run 9 {line}"}
