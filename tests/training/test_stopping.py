"""Runs that are told to stop, or of which a process fails: real processes, real signals."""

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

from tests.conftest import CHECKOUT, TINY, same, train, train_command
from tests.training.test_run import final, only_run

TWO = ("trainer.devices=2", "trainer.micro_batch_size=4")


@pytest.fixture(scope="module")
def settings(corpus: Path, cache: Path) -> tuple[str, ...]:
    return (f"data.path={corpus}", f"paths.cache={cache}", *TINY, "trainer.log_every=1", "experiment=main")


def start(*settings: str, cwd: Path, program: str = "train.py", **env: str) -> subprocess.Popen[str]:
    """Start a run, or a script, as a terminal would: with signals that nobody has ignored."""
    return subprocess.Popen(
        train_command(*settings, program=program),
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_steps(job: subprocess.Popen[str], cwd: Path, steps: int) -> None:
    """Wait until the run has written so many steps."""
    while job.poll() is None:
        files = list(cwd.glob("runs/main/*/metrics.jsonl"))
        if files and len(files[0].read_text().splitlines()) >= steps:
            return
        time.sleep(0.002)
    raise AssertionError(job.communicate())


def ranks(job: subprocess.Popen[str]) -> dict[str, int]:
    """Return the processes of a run by their ranks."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    found = {}
    for pid in map(int, children):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found.update({os.fsdecode(v[5:]): pid for v in variables if v.startswith(b"RANK=")})
    return found


def test_each_signal_saves_and_the_run_ends_as_the_one_left_alone(settings, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    assert train(*settings, cwd=whole).returncode == 0
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    for number, signum in enumerate(signals):
        job = start(*settings, cwd=stopped)
        wait_for_steps(job, stopped, 8 * number + random.randint(3, 8))
        job.send_signal(signum)
        _, said = job.communicate(timeout=60)
        assert job.returncode == 128 + signum
        saved = max((only_run(stopped) / "checkpoints").iterdir())
        step = int(saved.stem.removeprefix("step-"))
        assert said == f"interrupted after step {step}: the same command continues after step {step}\n"
    assert train(*settings, cwd=stopped).returncode == 0
    (checkpoint, rows, test_loss), (other, other_rows, other_loss) = final(whole), final(stopped)
    assert rows == other_rows and test_loss == other_loss
    assert same(checkpoint["state_dict"], other["state_dict"])
    assert same(checkpoint["optimizer_states"], other["optimizer_states"])


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_processes_stop_after_the_same_step_whichever_is_told(strategy, settings, tmp_path):
    settings = (*settings, *TWO, f"trainer.strategy={strategy}", "trainer.max_steps=5000")
    job = start(*settings, cwd=tmp_path)
    wait_for_steps(job, tmp_path, 5)
    os.kill(ranks(job)["1"], signal.SIGUSR1)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGUSR1 and said.count("the same command continues after step") == 1, said
    steps = len((only_run(tmp_path) / "metrics.jsonl").read_text().splitlines())
    job = start(*settings, cwd=tmp_path)
    wait_for_steps(job, tmp_path, steps + 3)
    job.send_signal(signal.SIGINT)
    out, said = job.communicate(timeout=60)
    assert job.returncode == 130 and f"after step {steps} of 5000" in out
    assert said.count("the same command continues after step") == 1 and "Traceback" not in said, said


def test_a_second_ctrl_c_quits_at_once(settings, tmp_path):
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


def test_a_signal_while_text_is_prepared_ends_the_program(tmp_path):
    job = start(*TINY, cwd=tmp_path)
    while not (tmp_path / "cache").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 143 and said == "interrupted: the same command goes on\n"


def test_a_signal_while_the_program_loads_ends_it_when_that_is_done(settings, tmp_path):
    for signum, delay in ((signal.SIGINT, 0.4), (signal.SIGUSR1, 0.8)):
        job = start(*settings, cwd=tmp_path)
        time.sleep(delay)
        job.send_signal(signum)
        _, said = job.communicate(timeout=60)
        assert job.returncode == 128 + signum and said == "interrupted: the same command goes on\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not tell which signals are heeded")
def test_a_script_heeds_signals_before_it_loads_what_takes_long(tmp_path):
    job = start(cwd=tmp_path, program="scripts/make_tables.py")
    until = time.monotonic() + 60
    while not heeds(job.pid, signal.SIGTERM):
        assert job.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    assert "libtorch" not in Path(f"/proc/{job.pid}/maps").read_text()
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 130 and said == "interrupted: the same command goes on\n"


def heeds(pid: int, signum: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(caught, 16) >> signum - 1 & 1)


def test_every_script_heeds_signals_first():
    """All that report what ends them; what is imported before is of the standard library alone."""
    scripts = [file.read_text() for file in (CHECKOUT / "scripts").glob("*.py")]
    scripts = [text for text in scripts if "command_line(" in text]
    assert len(scripts) > 10
    for text in scripts:
        imported = re.findall(r"^(?:from|import) (\w+)", text.partition("\nheed()")[0], re.M)
        assert imported == ["sys", "pathlib", "training"], text[:200]


#: Strategies by which a signal comes while fsspec looks for a file, is swallowed by themselves, or hidden by an error.
SWALLOWING = """
import os
import signal
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from zclip import ZClip

look = LocalFileSystem.info


def told(self, path, **kwargs):
    LocalFileSystem.info = look
    os.kill(os.getpid(), signal.SIGUSR1)
    return look(self, path, **kwargs)


class Fsspec(ZClip):
    LocalFileSystem.info = told if os.environ["UNLUCKY"] == "fsspec" else look


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
            raise FileNotFoundError("gone")
        ZClip.__init__(self, **kwargs)
"""


@pytest.mark.parametrize("swallowing", ["fsspec", "strategy", "raising"])
def test_a_signal_that_a_library_swallows_ends_the_program_all_the_same(swallowing, settings, tmp_path):
    """It says then that a file is not there, or goes on as if nothing had been: neither is told, nor trained."""
    (tmp_path / "unlucky.py").write_text(SWALLOWING)
    given = (*settings, f"clip._target_=unlucky.{swallowing.title()}", f"paths.cache={tmp_path}/cache")
    done = train(*given, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "UNLUCKY": swallowing})
    assert done.returncode == 128 + signal.SIGUSR1, done.stderr
    assert done.stderr == "interrupted: the same command goes on\n"
    assert not any(tmp_path.glob("runs/main/*/metrics.jsonl")) and not any(tmp_path.glob("runs/main/*/failure.txt"))


def test_a_failing_process_ends_the_run_with_its_traceback_first(settings, tmp_path):
    (tmp_path / "unlucky.py").write_text(
        "import os\nfrom zclip import ZClip\n\nclass Unlucky(ZClip):\n    steps = 0\n\n"
        "    def step(self, *args, **kwargs):\n        self.steps += 1\n"
        "        if self.steps == 5 and os.environ['RANK'] == '1':\n            raise RuntimeError('out of luck')\n"
        "        return super().step(*args, **kwargs)\n"
    )
    settings = (*settings, *TWO, "trainer.strategy=fsdp", "clip._target_=unlucky.Unlucky")
    began = time.monotonic()
    done = train(*settings, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert time.monotonic() - began < 60
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and lines[0] == "process 1 of the run has failed:", done.stderr
    assert lines[-1] == "RuntimeError: out of luck"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system cannot tie processes together")
def test_the_processes_own_their_folder_and_end_with_the_one_that_started_them(settings, tmp_path):
    job = start(*settings, *TWO, "trainer.strategy=ddp", "trainer.max_steps=50000", cwd=tmp_path)
    wait_for_steps(job, tmp_path, 2)
    second = train(*settings, *TWO, "trainer.strategy=ddp", "trainer.max_steps=50000", cwd=tmp_path)
    assert second.returncode == 2 and "another process is training" in second.stderr
    assert len(second.stderr.splitlines()) == 1, second.stderr
    pids = ranks(job).values()
    job.kill()
    job.wait()
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_job_that_is_queued_again_in_vain_ends(settings, tmp_path):
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
