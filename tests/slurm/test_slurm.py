"""Runs on a real cluster of three nodes, see cluster.py."""

import json
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT, TINY, same, script, train
from tests.slurm.cluster import Cluster, missing
from tests.training.test_stopping import start
from tests.training.test_trouble import rows
from training.checkpoint.format import weights

pytestmark = pytest.mark.slurm

SCRIPT = "scripts/slurm/train.sbatch"
NODES = ("--nodes=2", "--ntasks-per-node=1", "--time=10")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(f"no SLURM cluster: {why}")
    with tempfile.TemporaryDirectory(prefix="zc") as folder:
        made = Cluster(Path(folder), nodes=3)
        try:
            made.up()
            yield made
        finally:
            made.down()


@pytest.fixture(scope="module")
def settings(corpus: Path, cache: Path) -> tuple[str, ...]:
    return (
        *TINY, f"data.path={corpus}", f"paths.cache={cache}", "trainer.strategy=fsdp", "trainer.micro_batch_size=4",
        "trainer.checkpoint_every=10", "trainer.log_every=1",
    )  # fmt: skip


class Job:
    """A job of train.sbatch on two nodes, with its run folder."""

    def __init__(self, cluster: Cluster, folder: Path, name: str, *settings: str, options=NODES, **env: str) -> None:
        from sys import executable

        self.cluster = cluster
        self.path = folder / "runs" / "main" / name
        self.log = folder / f"{name}.log"
        given = (*settings, f"paths.runs={folder}/runs", f"name={name}")
        options = (*options, f"--output={self.log}")
        self.number = cluster.submit(*options, SCRIPT, *given, cwd=CHECKOUT, PYTHON=executable, **env)

    def steps(self) -> int:
        file = self.path / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def wait_for_steps(self, steps: int) -> None:
        self.cluster.wait(lambda: self.steps() >= steps or self.cluster.finished(self.number), 240)
        assert not self.cluster.finished(self.number), self.said()

    def end(self, seconds: float = 240) -> dict[str, str]:
        """Wait for the job's end, and return what SLURM says of it."""
        self.cluster.wait(lambda: self.cluster.finished(self.number), seconds)
        return self.cluster.job(self.number)

    def said(self) -> str:
        """All that the job and its tasks have printed."""
        logs = sorted((self.path / "logs").glob("*.log")) if self.path.exists() else []
        return "".join(f"{file.name}: {file.read_text()}" for file in [self.log, *logs] if file.exists())


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory) -> Path:
    """The run of two processes on this machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = train(*settings, "trainer.devices=2", "trainer.max_steps=300", "name=x", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "main" / "x"


def assert_same_end(path: Path, other: Path) -> None:
    """To the last bit, every step once."""
    assert [row["step"] for row in rows(path / "metrics.jsonl")] == list(range(1, 301))
    for name in ("loss", "grad_norm", "clipped"):
        assert [row[name] for row in rows(path / "metrics.jsonl")] == [
            row[name] for row in rows(other / "metrics.jsonl")
        ]
    ends = [weights(folder / "checkpoints" / "step-00000300.ckpt") for folder in (path, other)]
    assert same(*ends)
    results = [json.loads((folder / "result.json").read_text())["test_loss"] for folder in (path, other)]
    assert results[0] == results[1]


def test_two_nodes_and_two_requeues_end_as_the_run_left_alone(cluster, settings, undisturbed, tmp_path):
    job = Job(cluster, tmp_path, "x", *settings, "trainer.max_steps=300")
    for number, signal in enumerate(("USR1", "USR2"), 1):
        job.wait_for_steps(60 * number)
        cluster.ask("scancel", f"--signal={signal}", job.number)
        cluster.wait(lambda number=number: int(cluster.job(job.number)["Restarts"]) == number, 180)
    assert job.end()["JobState"] == "COMPLETED", job.said()
    said = job.said()
    assert len(re.findall(r"interrupted after step \d+: the job is in the queue again and continues", said)) == 2
    assert len({file.name.split("-")[1] for file in (job.path / "logs").iterdir()}) == 3
    starts = json.loads((job.path / "environment.json").read_text())["starts"]
    assert len(starts) == 3
    assert_same_end(job.path, undisturbed)


def test_a_failing_task_ends_the_job_and_its_traceback_is_in_the_log(cluster, settings, tmp_path):
    (tmp_path / "unlucky.py").write_text(
        "import os\nfrom zclip import ZClip\n\nclass Unlucky(ZClip):\n    steps = 0\n\n"
        "    def step(self, *args, **kwargs):\n        self.steps += 1\n"
        "        if self.steps == 20 and os.environ['RANK'] == '1':\n            raise RuntimeError('out of luck')\n"
        "        return super().step(*args, **kwargs)\n"
    )
    given = (*settings, "clip._target_=unlucky.Unlucky", "trainer.max_steps=100000")
    job = Job(cluster, tmp_path, "x", *given, PYTHONPATH=str(tmp_path))
    job.wait_for_steps(10)
    began = time.monotonic()
    ended = job.end(60)
    assert time.monotonic() - began < 60 and ended["JobState"] == "FAILED"
    said = job.log.read_text()
    assert "process 1 of the run has failed:" in said and "RuntimeError: out of luck" in said


def test_a_mistake_ends_the_job_before_its_tasks(cluster, settings, tmp_path):
    job = Job(cluster, tmp_path, "x", *settings, "lr=-1")
    assert job.end()["JobState"] == "FAILED"
    assert "error: lr=-1 is not allowed" in job.log.read_text() and not job.path.exists()


def test_a_node_is_cut_off_and_the_job_goes_on_with_others(cluster, settings, undisturbed, tmp_path):
    job = Job(cluster, tmp_path, "x", *settings, "trainer.max_steps=300")
    job.wait_for_steps(60)
    nodes = cluster.ask("scontrol", "show", "hostnames", cluster.job(job.number)["NodeList"]).split()
    cluster.cut_off(nodes[1])
    try:
        cluster.wait(lambda: cluster.job(job.number)["Restarts"] == "1", 120)
        assert job.end()["JobState"] == "COMPLETED", job.said()
        assert nodes[1] not in cluster.ask("scontrol", "show", "hostnames", cluster.job(job.number)["NodeList"])
    finally:
        cluster.reconnect(nodes[1])
    assert_same_end(job.path, undisturbed)


def test_a_sweep_of_four_strategies_and_only_what_is_not_done(cluster, settings, tmp_path):
    given = tuple(s for s in settings if not s.startswith("clip."))
    given = (*given, "trainer.nodes=2", "trainer.max_steps=100", "hydra/launcher=slurm", "hydra.launcher.time=10")
    env = {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
    sweep = start("-m", *given, "clip=none,fixed,autoclip", "hydra.launcher.n_jobs=1", cwd=tmp_path, **env)
    cluster.wait(lambda: any(tmp_path.glob("runs/main/*/metrics.jsonl")) or sweep.poll() is not None, 120)
    (first,) = tmp_path.glob("runs/main/*/job.json")
    cluster.ask("scancel", "--signal=USR1", queued := json.loads(first.read_text())["slurm"])
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, out + err
    assert len(re.findall(r"^job \d+: micro-", out, re.M)) == 3
    assert out.count("\nfinished micro-") == 3 and "test loss" in out
    assert cluster.job(queued)["Restarts"] == "1" and cluster.job(queued)["JobState"] == "COMPLETED"
    order = re.findall(r"^(job|finished) ", out, re.M)
    assert order == ["job", "finished"] * 3, "one at a time"
    done = train("-m", *given, "clip=none,fixed,autoclip,zclip", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 4 are finished already" in done.stdout
    (number,) = re.findall(r"^job (\d+): micro-zclip-", done.stdout, re.M)
    assert cluster.job(number)["NumNodes"] == "2" and cluster.job(number)["JobState"] == "COMPLETED"
    waiting = ("hydra.launcher.wait=false", "hydra.launcher.options=[--hold]", "seed=1", "clip=zclip")
    for said in (r"^job (\d+): micro-zclip-", r"^job (\d+) has micro-zclip-.* already$"):
        done = train("-m", *given, *waiting, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        (held,) = re.findall(said, done.stdout, re.M)
    shown = script("status.py", cwd=tmp_path, **env, COLUMNS="120")
    assert "4 done, 1 waiting" in shown.stdout and held in shown.stdout, shown.stderr
    cluster.ask("scancel", held)
    refused = train("-m", *given, "hydra.launcher.partition=none", "seed=2", "clip=zclip", cwd=tmp_path, env=env)
    assert refused.returncode == 2 and "sbatch refuses the job:" in refused.stderr, refused.stderr


def test_told_to_stop_while_the_text_is_prepared(cluster, settings, tmp_path):
    """One task prepares it, the other waits; the job goes back into the queue, and ends well."""
    given = (s for s in settings if not s.startswith(("data.path", "paths.cache")))
    job = Job(cluster, tmp_path, "x", *given, f"paths.cache={tmp_path}/cache", "trainer.max_steps=10")
    cluster.wait(lambda: any(tmp_path.glob("cache/*/*")) or cluster.finished(job.number), 120)
    cluster.ask("scancel", "--signal=USR1", job.number)
    cluster.wait(lambda: cluster.job(job.number)["Restarts"] == "1" or cluster.finished(job.number), 180)
    assert "interrupted: the job is in the queue again and goes on" in job.said()
    assert job.end()["JobState"] == "COMPLETED", job.said()
    assert job.steps() == 10


def test_a_time_limit_is_survived(cluster, settings, tmp_path):
    options = (*NODES[:2], "--time=2", "--signal=USR1@60")
    job = Job(cluster, tmp_path, "x", *settings, "trainer.max_steps=1000000", options=options)
    job.wait_for_steps(10)
    cluster.wait(lambda: cluster.job(job.number)["Restarts"] == "1", 150)
    (saved,) = map(int, re.findall(r"interrupted after step (\d+): the job is in the queue again", job.said()))
    job.wait_for_steps(saved + 20)
    assert f"continuing {job.path} after step {saved} of" in job.said()
    cluster.ask("scancel", job.number)
    assert job.end()["JobState"] == "CANCELLED"
    assert [row["step"] for row in rows(job.path / "metrics.jsonl")] == list(range(1, job.steps() + 1))
