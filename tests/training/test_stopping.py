"""Signals and failing processes: real processes, real signals."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import (
    CHECKOUT,
    FSDP,
    SLOW,
    TINY,
    TWO,
    final_state,
    have_ended,
    is_running,
    only_run,
    ranks,
    read_jsonl,
    same,
    start,
    start_from_nothing,
    train,
    wait_for_steps,
)
from tests.process_pool import Job
from tests.training.process_control import Gates, Ranks
from training.run_dir import RunDir

LINUX = sys.platform.startswith("linux")
needs_linux = pytest.mark.skipif(not LINUX, reason="reads /proc and needs PR_SET_PDEATHSIG")
RESUME = "run the same command to resume"


#: The last of them also ignored by nohup, so that a closed terminal does not stop a run.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@pytest.fixture(scope="module")
def settings(tiny: tuple[str, ...]) -> tuple[str, ...]:
    return (*tiny, "trainer.log_every=1", "experiment=main")


@pytest.mark.parametrize("signals", [STOPPING[:2], SLOW(STOPPING[1:])])
def test_run_stopped_by_signals_resumes_to_identical_result(signals, settings, finished_run, tmp_path):
    for number, signum in enumerate(signals):
        job = start(*settings, cwd=tmp_path)
        wait_for_steps(job, tmp_path, 8 * number + random.randint(3, 8))
        assert not LINUX or all(has_handler(job.pid, each) for each in STOPPING)
        job.send_signal(signum)
        _, err = job.communicate(timeout=60)
        assert job.returncode == 128 + signum
        saved = max((only_run(tmp_path) / "checkpoints").iterdir())
        step = int(saved.stem.removeprefix("step-"))
        assert err == f"interrupted after step {step}; {RESUME}\n"
    assert train(*settings, cwd=tmp_path).returncode == 0
    uninterrupted, stopped = final_state(finished_run.parents[2]), final_state(tmp_path)
    (checkpoint, rows, test_loss), (other, other_rows, other_loss) = uninterrupted, stopped
    assert rows == other_rows and test_loss == other_loss
    assert same(checkpoint["state_dict"], other["state_dict"])
    assert same(checkpoint["optimizer_states"], other["optimizer_states"])


@pytest.mark.parametrize("strategy", [SLOW("ddp"), "fsdp"])
def test_all_ranks_stop_after_the_same_step(strategy, settings, tmp_path):
    """One of them gets the signal. Until then no other process can train in the folder."""
    gates = Gates(tmp_path / "gates", 5)
    settings = (*settings, *TWO, *gates.overrides, f"trainer.strategy={strategy}")
    run = Ranks(*settings, cwd=tmp_path, **gates.env)
    gates.wait(5, *run.jobs)
    run.jobs[1].send_signal(signal.SIGUSR1)
    assert RunDir(only_run(tmp_path)).is_owned()
    gates.open(5)
    assert run.wait() == [128 + signal.SIGUSR1] * 2, run.errors()
    errors = run.errors()
    (saved,) = (only_run(tmp_path) / "checkpoints").iterdir()
    step = int(saved.stem.removeprefix("step-"))
    assert step in (5, 6) and len(read_jsonl(only_run(tmp_path) / "metrics.jsonl")) == step
    assert errors == [f"interrupted after step {step}; {RESUME}\n", ""]


@pytest.mark.slow
def test_launcher_forwards_signals_to_all_ranks(settings, tmp_path):
    """Whether one rank gets the signal, or the launcher, which forwards it."""
    settings = (*settings, *FSDP, "trainer.max_steps=5000")
    job = start(*settings, cwd=tmp_path)
    wait_for_steps(job, tmp_path, 5)
    os.kill(ranks(job)["1"], signal.SIGUSR1)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGUSR1 and err.count(RESUME) == 1, err
    steps = len((only_run(tmp_path) / "metrics.jsonl").read_text().splitlines())
    job = start(*settings, cwd=tmp_path)
    wait_for_steps(job, tmp_path, steps + 3)
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 130 and f"after step {steps} of 5000" in out
    assert err.count(RESUME) == 1 and "Traceback" not in err, err


#: A program whose processes do not train: each writes its rank, and does what WHAT says, to see what the launcher does.
LAUNCHED = """
import os
import signal
import subprocess
import sys
import time

if "RANK" in os.environ:
    rank, what = int(os.environ["RANK"]), os.environ["WHAT"]
    caught = []
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, lambda signum, frame: caught.append(signum))
    if what == "unhandled":
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    open(f"rank-{rank}-{os.getpid()}", "w").close()
    if rank == 1 and what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and what.isdigit():
        sys.exit(int(what))
    while what != "ends" and not caught:
        time.sleep(0.01)
    if what != "ends":
        open(f"caught-{rank}-{caught[0]}", "w").close()
        sys.exit(128 + caught[0])
else:
    from training.launch.cli import command_line, reporting
    from training.launch.processes import launch

    def main():
        with reporting():
            launch(2, ["a=1"])

    sys.exit(command_line(main))
"""


def launched(folder: Path, what: str) -> Job:
    """Start the launcher with two processes, and wait until both run."""
    (folder / "launched.py").write_text(LAUNCHED)
    job = start(cwd=folder, program=str(folder / "launched.py"), WHAT=what, PYTHONPATH=str(CHECKOUT))
    while len(list(folder.glob("rank-*"))) < 2 and job.poll() is None:
        time.sleep(0.005)
    return job


@pytest.mark.parametrize(
    "what, status, message",
    [
        ("ends", 0, ""),
        ("2", 2, ""),
        SLOW("3", 3, ""),
        ("1", 1, ""),
        ("killed", 1, "process 1 of the run was killed by SIGKILL; run the same command to resume\n"),
    ],
)
def test_launcher_ends_all_processes_when_one_ends(what, status, message, tmp_path):
    """After status 2 and 3 it waits a while for the report of rank 0."""
    job = launched(tmp_path, what)
    _, err = job.communicate(timeout=60)
    assert (job.returncode, err) == (status, message)
    pids = [int(path.name.split("-")[2]) for path in tmp_path.glob("rank-*")]
    assert len(pids) <= 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGUSR1])
def test_launcher_forwards_signals_and_leaves_the_report_to_the_processes(signum, tmp_path):
    job = launched(tmp_path, "waits")
    job.send_signal(signum)
    _, err = job.communicate(timeout=60)
    assert (job.returncode, err) == (128 + signum, "")
    assert {path.name for path in tmp_path.glob("caught-*")} == {f"caught-{rank}-{signum}" for rank in (0, 1)}


def test_launcher_reports_a_signal_that_killed_a_process_before_it_could(tmp_path):
    job = launched(tmp_path, "unhandled")
    job.send_signal(signal.SIGUSR1)
    _, err = job.communicate(timeout=60)
    assert (job.returncode, err) == (128 + signal.SIGUSR1, f"interrupted; {RESUME}\n")


def test_launcher_stops_all_processes_when_one_got_a_signal(tmp_path):
    job = launched(tmp_path, "waits")
    (pid,) = (int(path.name.split("-")[2]) for path in tmp_path.glob("rank-1-*"))
    os.kill(pid, signal.SIGUSR1)
    _, err = job.communicate(timeout=60)
    assert (job.returncode, err) == (128 + signal.SIGUSR1, "")
    caught = {path.name for path in tmp_path.glob("caught-*")}
    assert caught == {f"caught-0-{signal.SIGTERM:d}", f"caught-1-{signal.SIGUSR1:d}"}


@needs_linux
def test_process_dies_with_the_launcher_that_started_it(tmp_path):
    (tmp_path / "child.py").write_text(
        "import os, time\nfrom pathlib import Path\nlauncher = os.getpid()\nif not os.fork():\n"
        "    from training.launch.processes import die_with_parent\n    from training.runtime.slurm import LAUNCHER\n"
        "    os.environ[LAUNCHER] = str(launcher)\n    die_with_parent()\n"
        "    Path('pid.tmp').write_text(str(os.getpid()))\n    Path('pid.tmp').rename('pid')\n"
        "time.sleep(100)\n"
    )
    job = start(cwd=tmp_path, program=str(tmp_path / "child.py"), PYTHONPATH=str(CHECKOUT))
    while not (tmp_path / "pid").exists():
        assert job.poll() is None, job.output()
        time.sleep(0.005)
    child = (tmp_path / "pid").read_text()
    assert is_running(child)
    job.kill()
    job.wait()
    assert have_ended([child])


def test_second_ctrl_c_exits_at_once(settings, tmp_path):
    job = start(*settings, "trainer.global_batch_size=4096", cwd=tmp_path)
    while not list(tmp_path.glob("runs/main/*/metrics.jsonl")):
        time.sleep(0.01)
    time.sleep(0.5)  # a step takes much longer
    job.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert job.poll() is None
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=5) == 130
    assert not list((only_run(tmp_path) / "checkpoints").iterdir())


def test_signal_during_data_preparation_exits(tmp_path):
    job = start(*TINY, cwd=tmp_path)
    while not (tmp_path / "cache").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 143 and err == f"interrupted; {RESUME}\n"


@pytest.mark.parametrize("signum, delay", [(signal.SIGINT, 0.4), SLOW(signal.SIGUSR1, 0.8)])
def test_signal_during_imports_exits_after_them(signum, delay, settings, tmp_path):
    job = start_from_nothing(*settings, cwd=tmp_path)
    time.sleep(delay)
    job.send_signal(signum)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 128 + signum and err == f"interrupted; {RESUME}\n"
    assert not (tmp_path / "runs").exists()


@needs_linux
@pytest.mark.slow
def test_script_handles_signals_before_slow_imports(tmp_path):
    job = start_from_nothing(cwd=tmp_path, program="scripts/status.py")
    deadline = time.monotonic() + 60
    while not has_handler(job.pid, signal.SIGUSR2):  # installed after that of SIGINT
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    assert "libtorch" not in Path(f"/proc/{job.pid}/maps").read_text()
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 130 and err == f"interrupted; {RESUME}\n"


def has_handler(pid: int, signum: int) -> bool:
    """Whether a process handles a signal itself."""
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(caught, 16) >> signum - 1 & 1)


def test_every_script_imports_its_entry_first():
    """`_entry` installs the signal handlers, and imports nothing but the standard library before."""
    scripts = [file.read_text() for file in (CHECKOUT / "scripts").glob("*.py") if file.name != "_entry.py"]
    scripts = [text for text in scripts if "_entry.run(" in text or "command_line(" in text]
    assert len(scripts) > 10
    for text in scripts:
        assert re.findall(r"^(?:from|import) (\w+)", text, re.M)[0] == "_entry", text[:200]
    entry = (CHECKOUT / "scripts" / "_entry.py").read_text().partition("\ninstall_handlers()")[0]
    imports = "\n".join(re.findall(r"^(?:from|import) .+", entry, re.M))
    program = f"import sys; before = {{*sys.modules}}\n{imports}\nprint(*{{*sys.modules}} - before)"
    seen = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in seen.stdout.split()}
    assert imported and imported <= {*sys.stdlib_module_names, "common", "training"}, imported


#: Strategies during whose construction a signal arrives: one swallows the exception, another hides it by an error.
SWALLOWING = """
import os
import signal
import subprocess
from pathlib import Path

from zclip import ZClip

class Strategy(ZClip):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        except:
            pass


class Raising(Strategy):
    def __init__(self, **kwargs):
        if any(Path("runs").rglob("config.yaml")):
            super().__init__(**kwargs)
            raise FileNotFoundError("missing")
        ZClip.__init__(self, **kwargs)
"""


@pytest.mark.parametrize("swallowed_by", ["strategy", "raising"])
def test_swallowed_signal_is_raised_again(swallowed_by, settings, tmp_path):
    """Neither the missing file that the library reports is printed, nor does the run train."""
    (tmp_path / "swallowing.py").write_text(SWALLOWING)
    settings = (*settings, f"clip._target_=swallowing.{swallowed_by.title()}", f"paths.cache={tmp_path}/cache")
    done = train(*settings, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 128 + signal.SIGUSR1, done.stderr
    assert done.stderr == f"interrupted; {RESUME}\n"
    assert not any(tmp_path.glob("runs/main/*/metrics.jsonl")) and not any(tmp_path.glob("runs/main/*/failure.txt"))


#: A strategy that fails in the second step of rank 1.
FAILING = """
import os

from zclip import ZClip


class Failing(ZClip):
    steps = 0

    def step(self, *args, **kwargs):
        self.steps += 1
        if self.steps == 2 and os.environ["RANK"] == "1":
            raise RuntimeError("step 2 failed")
        return super().step(*args, **kwargs)
"""


@pytest.fixture
def failing(settings, tmp_path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return settings and environment of a run on two processes of which one fails."""
    (tmp_path / "failing.py").write_text(FAILING)
    return (*settings, *FSDP, "clip._target_=failing.Failing"), {"PYTHONPATH": str(tmp_path)}


def test_failing_rank_reports_its_traceback_before_other_ranks(failing, tmp_path):
    settings, env = failing
    run = Ranks(*settings, cwd=tmp_path, **env)
    assert run.jobs[1].wait(timeout=60) == 1, run.errors()
    statuses, errors = [job.poll() for job in run.jobs], run.errors()
    run.kill()
    lines = errors[1].splitlines()
    assert lines[0] == "process 1 of the run has failed:" and lines[-1] == "RuntimeError: step 2 failed", errors[1]
    assert statuses[0] is None and errors[0] == "", "rank 0 waits until the launcher ends it"


@pytest.mark.slow
def test_failing_rank_ends_the_run_with_its_traceback_first(failing, tmp_path):
    """With the launcher and new processes; see also what the launcher does when a process ends."""
    settings, env = failing
    began = time.monotonic()
    done = train(*settings, cwd=tmp_path, env=env)
    assert time.monotonic() - began < 60
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and lines[0] == "process 1 of the run has failed:", done.stderr
    assert lines[-1] == "RuntimeError: step 2 failed"


@needs_linux
@pytest.mark.slow
def test_ranks_hold_the_run_folder_and_die_with_their_launcher(settings, tmp_path):
    settings = (*settings, *TWO, "trainer.strategy=ddp", "trainer.max_steps=50000")
    job = start(*settings, cwd=tmp_path)
    wait_for_steps(job, tmp_path, 2)
    second = train(*settings, cwd=tmp_path)
    assert second.returncode == 2 and "another process is training" in second.stderr
    assert len(second.stderr.splitlines()) == 1, second.stderr
    pids = ranks(job).values()
    job.kill()
    job.wait()
    assert len(pids) == 2 and have_ended(pids, seconds=10)


def test_requeued_job_without_progress_ends(settings, tmp_path):
    job = start(*settings, "trainer.checkpoint_every=40", cwd=tmp_path, SLURM_JOB_ID="7")
    wait_for_steps(job, tmp_path, 1)
    job.kill()
    job.wait()
    file = only_run(tmp_path) / "environment.json"
    file.write_text(json.dumps({"starts": 4 * json.loads(file.read_text())["starts"]}))
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "4"}
    done = train(*settings, cwd=tmp_path, env=env)
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("job 7 has started 5 times after step 0 of runs/main/")
    assert train(*settings, cwd=tmp_path, env={"SLURM_JOB_ID": "8"}).returncode == 0
