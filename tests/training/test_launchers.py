"""The sweeper of suites and the launchers of runs, called in the process of the tests."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from common.errors import RunError, UserError
from experiments.suites import SUITES
from hydra_plugins import zclip_launchers
from hydra_plugins.zclip_launchers import Slurm
from hydra_plugins.zclip_sweeper import SuiteSweeper
from tests.helpers import CHECKOUT, RESULT
from training.launch.slurm_queue import submit
from training.runtime.slurm import LAUNCHER


def suite_jobs(*overrides: str) -> list[list[str]]:
    with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        (jobs,) = SuiteSweeper.split_arguments(parser.parse_overrides([*overrides]), None)
    return jobs


def test_jobs_of_suites_are_their_runs_times_the_sweep():
    jobs = suite_jobs("experiment=[table3,table5]", "scale=micro", "seed=0,1")
    table3, table5 = SUITES["table3"].runs, SUITES["table5"].runs
    runs = dict.fromkeys([*table3, *table5])
    assert len(runs) < len(table3) + len(table5), "both have a run with the defaults"
    assert jobs == [["experiment=paper", *run, "scale=micro", f"seed={seed}"] for seed in (0, 1) for run in runs]
    assert suite_jobs("experiment=figure7", "scale=micro") == [
        ["experiment=paper", *run, "scale=micro"] for run in SUITES["figure7"].runs
    ]
    assert suite_jobs("experiment=adam_lag_lab") == [
        ["experiment=adam_lag", *run] for run in SUITES["adam_lag_lab"].runs
    ]
    assert suite_jobs("experiment=figure7", "scale=micro", "optim=glob(none*)") == [], "no value, no job"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("experiment=table3",), "scale is not set: experiment=table3 is run at scale=micro, scale=proxy_short, sc"),
        (("experiment=table3", "scale=main"), "scale=main is not possible: experiment=table3 is run at scale=micro"),
        (("scale=micro",), "hydra/sweeper=suite is not possible without experiment=, which sets it: it names suites"),
        (
            ("experiment=[table2,main]", "scale=micro"),
            "experiment=[table2,main] is not possible: main is none of the suites adam_lag_cosine_lab, adam_lag_lab,",
        ),
        (
            ("experiment=[table2,adam_lag_lab]", "scale=micro"),
            "experiment=[table2,adam_lag_lab] is not possible: table2 and adam_lag_lab do not share their settings",
        ),
        (
            ("experiment=adam_lag_lab", "optim.eps=1"),
            "optim.eps cannot be set with experiment=adam_lag_lab: the suites",
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


def test_equal_runs_of_suites_are_one_job(plugin):
    settings = ["experiment=table5", "scale=micro", "seed=0,0"]
    sweeper = plugin("sweeper", *settings)
    parsed = OverridesParser.create().parse_overrides(settings)
    (twice,) = sweeper.split_arguments(parsed, None)
    (jobs,) = sweeper.compose_batches(sweeper.hydra_context.config_loader, sweeper.config, parsed)
    assert len(twice) == 6 and [job.overrides for job in jobs] == twice[:3]


def test_runs_that_begin_after_others_get_their_names(plugin):
    """The name is what the settings of the other run make, with its seed and what the user sets."""
    settings = ["experiment=continued_lab", "seed=0,1", "trainer.max_steps=40"]
    sweeper = plugin("sweeper", *settings)
    parsed, loader = OverridesParser.create().parse_overrides(settings), sweeper.hydra_context.config_loader
    bases, others = sweeper.compose_batches(loader, sweeper.config, parsed)
    assert len(bases) == 2 * len(SUITES["continued_lab"].runs)
    assert len(others) == 2 * len(SUITES["continued_lab"].forked)
    names = {(job.config.clip, job.config.update, job.config.seed): job.title for job in bases}
    monitored = {job.config.seed: job.title for job in bases if "none-monitor" in job.title}
    for job in others:
        own = names.get((job.config.clip, job.config.update, job.config.seed))
        assert job.config.fork_from in (f"{own}@40", f"{monitored[job.config.seed]}@40")
        assert (job.config.trainer.max_steps, job.run_dir.path.parent.name) == (80, "continued")
    assert len({job.title for job in (*bases, *others)}) == len(bases) + len(others)


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


def test_plan_prints_the_lines_that_would_be_submitted(slurm, capsys):
    slurm("hydra.launcher.partition=gpu").launch([["seed=7", "plan=true"]], 0)
    *_, line = capsys.readouterr().out.splitlines()
    options = "--partition=gpu --time=1-00:00:00 --signal=USR1@300"
    assert line == f"sbatch --nodes=1 --ntasks-per-node=1 {options} scripts/slurm/train.sbatch seed=7"
    assert not Path("calls").exists()


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
    launcher = plugin("launcher", "hydra/launcher=local", "hydra.launcher.n_jobs=1", found)
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
