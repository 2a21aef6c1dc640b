"""Sweeps in processes of their own, and what is told of them."""

import json
import re
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import TINY, script, train
from tests.training.test_stopping import start


@pytest.fixture(scope="module")
def settings(corpus: Path, cache: Path) -> tuple[str, ...]:
    return (f"data.path={corpus}", f"paths.cache={cache}", *TINY, "hydra/launcher=local", "trainer.log_every=1")


def status(cwd: Path) -> str:
    return script("status.py", cwd=cwd, COLUMNS="120").stdout


def test_several_at_a_time_and_only_what_is_not_done(settings, tmp_path):
    first = train("-m", *settings, "seed=0,1,2", "trainer.max_steps=4", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert len(re.findall("^started", first.stdout, re.M)) == len(re.findall("^finished", first.stdout, re.M)) == 3
    assert first.stdout.count("\n│") == 3, "the table of the sweep"
    assert "3 done" in status(tmp_path)
    again = train("-m", *settings, "seed=0,1,2,3", "trainer.max_steps=4", cwd=tmp_path)
    assert "3 of 4 are finished already" in again.stdout and again.stdout.count("started ") == 1
    runs = [json.loads(path.read_text()) for path in tmp_path.glob("runs/main/*/result.json")]
    assert len(runs) == 4 and len({run["test_loss"] for run in runs}) == 4


def test_a_failed_run_is_named_and_the_others_go_on(settings, tmp_path):
    (tmp_path / "unlucky.py").write_text(
        "from zclip import ZClip\n\nclass Unlucky(ZClip):\n"
        "    def step(self, *args, **kwargs):\n        raise RuntimeError('out of luck')\n"
    )
    given = (*settings, "trainer.max_steps=4", "clip._target_=zclip.ZClip,unlucky.Unlucky")
    done = train("-m", *given, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1, done.stderr
    assert re.match(r"1 of 2 runs have not finished: micro-zclip-\S+ \(status 1, \S+/log\.txt\)", done.stderr)
    assert "failed micro-zclip-" in done.stdout and done.stdout.count("log.txt): RuntimeError: out of luck") == 1
    (log,) = (p for p in tmp_path.glob("runs/main/*/log.txt") if "out of luck" in p.read_text())
    assert "out of luck" in (log.parent / "failure.txt").read_text()
    assert "1 done, 1 failed" in status(tmp_path)


def test_ctrl_c_stops_all_and_the_same_command_goes_on(settings, tmp_path):
    given = ("-m", *settings, "seed=0,1,2", "trainer.max_steps=900")
    job = start(*given, cwd=tmp_path)
    while len([p for p in tmp_path.glob("runs/main/*/metrics.jsonl") if p.stat().st_size]) < 2:
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    assert "2 running" in status(tmp_path)
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 130 and said == "interrupted: the same command goes on\n"
    done = train(*given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for log in tmp_path.glob("runs/main/*/log.txt"):
        steps = [json.loads(line)["step"] for line in (log.parent / "metrics.jsonl").open()]
        assert steps == list(range(1, 901)), "each once"


def test_mistakes_are_one_sentence(settings, tmp_path):
    done = train("-m", *settings, "hydra.launcher.n_jobs=0", "seed=0,1", cwd=tmp_path)
    said = "train.py: error: hydra.launcher.n_jobs=0 is not allowed: it must be an integer from 1\n"
    assert done.returncode == 2 and done.stderr == said
    done = train(*settings, cwd=tmp_path)
    said = "train.py: error: hydra/launcher=local is for sweeps, of one run or many: add -m\n"
    assert done.returncode == 2 and done.stderr == said
    done = script("status.py", "folder=none", cwd=tmp_path)
    assert done.returncode == 2 and "folder=none is not there" in done.stderr
