"""Runs on a real SLURM cluster of three nodes, see cluster.py."""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import CHECKOUT, TINY, read_jsonl, same, script, start, train
from tests.slurm.cluster import Cluster, missing
from training.checkpoint.format import load_model_state

pytestmark = pytest.mark.slurm

SCRIPT = "scripts/slurm/train.sbatch"
NODES = ("--nodes=2", "--ntasks-per-node=1", "--time=10")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(f"no SLURM cluster: {reason}")
    with tempfile.TemporaryDirectory(prefix="zc") as folder:
        started = Cluster(Path(folder), nodes=3)
        try:
            started.up()
            yield started
        finally:
            started.down()


@pytest.fixture(scope="module")
def settings(corpus: Path, cache: Path) -> tuple[str, ...]:
    return (
        *TINY, f"data.path={corpus}", f"paths.cache={cache}", "trainer.strategy=fsdp", "trainer.micro_batch_size=4",
        "trainer.checkpoint_every=10", "trainer.log_every=1",
    )  # fmt: skip


class Job:
    """A job of train.sbatch on two nodes, with its run folder."""

    def __init__(self, cluster: Cluster, folder: Path, name: str, *settings: str, options=NODES, **env: str) -> None:
        self.cluster = cluster
        self.path = folder / "runs" / "main" / name
        self.log = folder / f"{name}.log"
        overrides = (*settings, f"paths.runs={folder}/runs", f"name={name}")
        options = (*options, f"--output={self.log}")
        self.number = cluster.submit(*options, SCRIPT, *overrides, cwd=CHECKOUT, PYTHON=sys.executable, **env)

    def steps(self) -> int:
        file = self.path / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def wait_for_steps(self, steps: int) -> None:
        self.cluster.wait(lambda: self.steps() >= steps or self.cluster.finished(self.number), 240)
        assert not self.cluster.finished(self.number), self.output()

    def end(self, seconds: float = 240) -> dict[str, str]:
        """Wait for the job's end, and return SLURM's record of it."""
        self.cluster.wait(lambda: self.cluster.finished(self.number), seconds)
        return self.cluster.job(self.number)

    def wait_for_output(self, pattern: str) -> str:
        """Wait until the output has a match of a pattern, and return its group: the logs of tasks come with a delay."""
        self.cluster.wait(lambda: re.search(pattern, self.output()), 60)
        return re.search(pattern, self.output()).group(1)

    def output(self) -> str:
        """Return the logs of the job and its tasks."""
        logs = sorted((self.path / "logs").glob("*.log")) if self.path.exists() else []
        return "".join(f"{file.name}: {file.read_text()}" for file in [self.log, *logs] if file.exists())


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory) -> Path:
    """The run folder of two processes on this machine."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = train(*settings, "trainer.devices=2", "trainer.max_steps=200", "name=x", cwd=folder, processes=2)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "main" / "x"


def assert_identical(path: Path, other: Path) -> None:
    """Assert that two runs have the same metrics of each step, once, and the same weights, bit for bit."""
    rows, other_rows = (read_jsonl(folder / "metrics.jsonl") for folder in (path, other))
    assert [row["step"] for row in rows] == list(range(1, 201))
    for name in ("loss", "grad_norm", "clipped"):
        assert [row[name] for row in rows] == [row[name] for row in other_rows]
    weights = [load_model_state(folder / "checkpoints" / "step-00000200.ckpt") for folder in (path, other)]
    assert same(*weights)
    results = [json.loads((folder / "result.json").read_text())["test_loss"] for folder in (path, other)]
    assert results[0] == results[1]


def test_twice_requeued_job_ends_as_the_uninterrupted_run(cluster, settings, uninterrupted, tmp_path):
    job = Job(cluster, tmp_path, "x", *settings, "trainer.max_steps=200")
    for number, signal in enumerate(("USR1", "USR2"), 1):
        job.wait_for_steps(60 * number)
        cluster.ask("scancel", f"--signal={signal}", job.number)
        cluster.wait(lambda number=number: int(cluster.job(job.number)["Restarts"]) == number, 180)
    assert job.end()["JobState"] == "COMPLETED", job.output()
    requeued = re.findall(r"interrupted after step \d+; the job is requeued and resumes by itself", job.output())
    assert len(requeued) == 2
    assert len({file.name.split("-")[1] for file in (job.path / "logs").iterdir()}) == 3
    starts = json.loads((job.path / "environment.json").read_text())["starts"]
    assert len(starts) == 3
    assert_identical(job.path, uninterrupted)


def test_failing_task_ends_the_job_with_its_traceback_in_the_log(cluster, settings, tmp_path):
    (tmp_path / "failing.py").write_text(
        "import os\nfrom zclip import ZClip\n\nclass Failing(ZClip):\n    steps = 0\n\n"
        "    def step(self, *args, **kwargs):\n        self.steps += 1\n"
        "        if self.steps == 20 and os.environ['RANK'] == '1':\n            raise RuntimeError('step 20 failed')\n"
        "        return super().step(*args, **kwargs)\n"
    )
    overrides = (*settings, "clip._target_=failing.Failing", "trainer.max_steps=100000")
    job = Job(cluster, tmp_path, "x", *overrides, PYTHONPATH=str(tmp_path))
    job.wait_for_steps(10)
    began = time.monotonic()
    ended = job.end(60)
    assert time.monotonic() - began < 60 and ended["JobState"] == "FAILED"
    log = job.log.read_text()
    assert "process 1 of the run has failed:" in log and "RuntimeError: step 20 failed" in log


def test_user_error_ends_the_job_before_its_tasks(cluster, settings, tmp_path):
    job = Job(cluster, tmp_path, "x", *settings, "lr=-1")
    assert job.end()["JobState"] == "FAILED"
    assert "error: lr=-1 is not allowed" in job.log.read_text() and not job.path.exists()


def test_job_resumes_on_other_nodes_after_a_node_failure(cluster, settings, uninterrupted, tmp_path):
    job = Job(cluster, tmp_path, "x", *settings, "trainer.max_steps=200")
    job.wait_for_steps(60)
    nodes = cluster.ask("scontrol", "show", "hostnames", cluster.job(job.number)["NodeList"]).split()
    cluster.cut_off(nodes[1])
    try:
        cluster.wait(lambda: cluster.job(job.number)["Restarts"] == "1", 120)
        assert job.end()["JobState"] == "COMPLETED", job.output()
        assert nodes[1] not in cluster.ask("scontrol", "show", "hostnames", cluster.job(job.number)["NodeList"])
    finally:
        cluster.reconnect(nodes[1])
    assert_identical(job.path, uninterrupted)


def test_sweep_submits_only_unfinished_runs(cluster, settings, tmp_path):
    overrides = tuple(s for s in settings if not s.startswith("clip."))
    overrides = (
        *overrides,
        "trainer.nodes=2",
        "trainer.max_steps=100",
        "hydra/launcher=slurm",
        "hydra.launcher.time=10",
    )
    env = {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
    sweep = start("-m", *overrides, "clip=none,fixed", "hydra.launcher.n_jobs=1", cwd=tmp_path, **env)
    cluster.wait(lambda: any(tmp_path.glob("runs/main/*/metrics.jsonl")) or sweep.poll() is not None, 120)
    (first,) = tmp_path.glob("runs/main/*/job.json")
    cluster.ask("scancel", "--signal=USR1", number := json.loads(first.read_text())["slurm"])
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, out + err
    assert len(re.findall(r"^job \d+: micro-", out, re.M)) == 2
    assert out.count("\nfinished micro-") == 2 and "test loss" in out
    assert cluster.job(number)["Restarts"] == "1" and cluster.job(number)["JobState"] == "COMPLETED"
    order = re.findall(r"^(job|finished) ", out, re.M)
    assert order == ["job", "finished"] * 2, "one at a time"
    done = train("-m", *overrides, "clip=none,fixed,zclip", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 3 are finished already" in done.stdout
    (number,) = re.findall(r"^job (\d+): micro-zclip-", done.stdout, re.M)
    assert cluster.job(number)["NumNodes"] == "2" and cluster.job(number)["JobState"] == "COMPLETED"
    waiting = ("hydra.launcher.wait=false", "hydra.launcher.options=[--hold]", "seed=1", "clip=zclip")
    for line in (r"^job (\d+): micro-zclip-", r"^job (\d+) has micro-zclip-.* already$"):
        done = train("-m", *overrides, *waiting, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        (held,) = re.findall(line, done.stdout, re.M)
    status = script("status.py", cwd=tmp_path, **env, COLUMNS="120")
    assert "3 done, 1 waiting" in status.stdout and held in status.stdout, status.stderr
    cluster.ask("scancel", held)
    rejected = train("-m", *overrides, "hydra.launcher.partition=none", "seed=2", "clip=zclip", cwd=tmp_path, env=env)
    assert rejected.returncode == 2 and "sbatch rejects the job:" in rejected.stderr, rejected.stderr


def test_fork_of_a_planned_sweep_waits_for_the_run_from_which_it_begins(cluster, cache, tmp_path):
    """The lines that a plan prints are pasted into a shell; the fork of a cancelled run is cancelled too."""
    settings = (f"paths.runs={tmp_path}/runs", f"paths.cache={cache}", "trainer.max_steps=20")
    settings = ("experiment=continued_lab", "seed=0", *settings, "hydra/launcher=slurm", "hydra.launcher.time=10")
    planned = train("-m", *settings, "plan=true", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    lines = [line for line in planned.stdout.splitlines() if "sbatch " in line]
    (base,) = (line for line in lines if line.startswith("job1="))
    forks = [line for line in lines if "${job1%%;*}" in line and " lr=5e-3 " in line]
    assert "clip=none update=monitor" in base and len(forks) == 1
    pasted = "\n".join([base, *forks, "echo $job1"])
    env = {**os.environ, **cluster.environment, "PYTHON": sys.executable, "SBATCH_OUTPUT": f"{tmp_path}/%j.log"}

    def submit() -> list[str]:
        out = subprocess.run(["bash", "-eu"], input=pasted, cwd=CHECKOUT, env=env, text=True, capture_output=True)
        assert out.returncode == 0, out.stderr
        *numbers, first = re.findall(r"\d+", out.stdout)
        assert all(cluster.job(number)["Dependency"].startswith(f"afterok:{first}(") for number in numbers)
        return [first, *numbers]

    cancelled = submit()
    cluster.ask("scancel", cancelled[0])
    cluster.wait(lambda: all(map(cluster.finished, cancelled)), 60)
    assert {cluster.job(number)["JobState"] for number in cancelled} == {"CANCELLED"}
    jobs = submit()
    cluster.wait(lambda: all(map(cluster.finished, jobs)), 300)
    logs = "".join(file.read_text() for file in tmp_path.glob("*.log"))
    assert {cluster.job(number)["JobState"] for number in jobs} == {"COMPLETED"}, logs
    steps = sorted(len(read_jsonl(file)) for file in tmp_path.glob("runs/continued/*/metrics.jsonl"))
    assert steps == [20, 40]


def test_job_interrupted_during_data_preparation_is_requeued(cluster, settings, tmp_path):
    """One task prepares the text while the other waits; the requeued job completes."""
    overrides = (s for s in settings if not s.startswith(("data.path", "paths.cache")))
    job = Job(cluster, tmp_path, "x", *overrides, f"paths.cache={tmp_path}/cache", "trainer.max_steps=10")
    cluster.wait(lambda: any(tmp_path.glob("cache/*/*")) or cluster.finished(job.number), 120)
    cluster.ask("scancel", "--signal=USR1", job.number)
    cluster.wait(lambda: cluster.job(job.number)["Restarts"] == "1" or cluster.finished(job.number), 180)
    job.wait_for_output("(interrupted; the job is requeued and resumes by itself)")
    assert job.end()["JobState"] == "COMPLETED", job.output()
    assert job.steps() == 10


def test_job_is_requeued_before_its_time_limit(cluster, settings, tmp_path):
    """The limit is set once the run trains, and lifted after the requeue: a machine may take minutes to start it.

    It is one to two minutes away then, so SLURM sends the signal when it looks at the limits next.
    """
    options = (*NODES[:2], "--time=30", "--signal=USR1@120")
    job = Job(cluster, tmp_path, "x", *settings, "trainer.max_steps=1000000", options=options)
    job.wait_for_steps(10)
    hours, minutes, seconds = map(int, cluster.job(job.number)["RunTime"].split(":"))
    limit = math.ceil((hours * 3600 + minutes * 60 + seconds) / 60) + 1
    cluster.ask("scontrol", "update", f"JobId={job.number}", f"TimeLimit={limit}")
    cluster.wait(lambda: cluster.job(job.number)["Restarts"] == "1", 240)
    cluster.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    saved = int(job.wait_for_output(r"interrupted after step (\d+); the job is requeued"))
    job.wait_for_steps(saved + 20)
    assert f"continuing {job.path} after step {saved} of" in job.output()
    cluster.ask("scancel", job.number)
    assert job.end()["JobState"] == "CANCELLED"
    assert [row["step"] for row in read_jsonl(job.path / "metrics.jsonl")] == list(range(1, job.steps() + 1))
