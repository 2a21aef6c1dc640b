"""Signals, standard streams and SLURM's environment, without training."""

import errno
import io
import os
import platform
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from tests import gloo_pool
from tests.helpers import CHECKOUT, compose_config
from tests.process_pool import run, run_ranks
from training.launch.cli import reporting
from training.launch.processes import local_store
from training.launch.slurm_queue import queued_jobs, sbatch_resources, submit
from training.run import check_agreement
from training.runtime.distributed import check_environment, init_process_group
from training.runtime.environment import environment
from training.runtime.slurm import export_torchrun_env, job_to_requeue, requeue
from training.runtime.stdio import BestEffortStream


def test_secrets_are_not_recorded(monkeypatch):
    secret = [
        "+wandb.api_key=123", "hydra.job.env_set.WANDB_API_KEY=456", "x=https://me:789@host/x", "hf_" + "a" * 20,
        "+wandb={apiKey: 123}", "+hub.token=1",
    ]  # fmt: skip
    harmless = [
        "data.tokenizer=gpt2", "trainer.val_tokens=4096", "lr=1e-3", "data.path=keys/of/text", "-m",
        "model.num_key_value_heads=2",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["/home/me/train.py", *secret, *harmless])
    hidden = [
        "+wandb.api_key=***", "hydra.job.env_set.WANDB_API_KEY=***", "x=***", "***", "+wandb=***", "+hub.token=***",
    ]  # fmt: skip
    assert environment()["command"] == ["train.py", *hidden, *harmless]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({}, None),
        ({"RANK": "2"}, "RANK=2, WORLD_SIZE=2"),
        ({"RANK": "one"}, "RANK=one"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=not set"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR="),
    ],
)
def test_variables_left_over_from_a_launcher_are_named(changed, named, monkeypatch):
    whole = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
    for name, value in (whole | changed).items():
        monkeypatch.setenv(name, value)
    if named is None:
        check_environment()
        return
    with pytest.raises(UserError, match=re.escape(named)):
        check_environment()


def test_process_of_another_launcher_says_so_and_ends():
    code = "from training.launch.processes import die_with_parent; die_with_parent(); print('alive')"
    for launcher in ("1234567", "x"):
        env = os.environ | {"ZCLIP_LAUNCHER": launcher}
        done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, env=env)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"ZCLIP_LAUNCHER={launcher} is not the process that started this one" in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_store_of_one_machine_listens_on_it_alone():
    store = local_store()
    tables = [Path("/proc/net", name).read_text().splitlines() for name in ("tcp", "tcp6")]
    listening = [line.split()[1] for table in tables for line in table if " 0A " in line]
    loopback = f"0100007F:{store.port:04X}"
    assert [address for address in listening if address.endswith(loopback[-5:])] == [loopback]
    client = torch.distributed.TCPStore("127.0.0.1", store.port, is_master=False)
    client.set("key", "value")
    assert store.get("key") == b"value"


SETUP = """
import os, signal, sys
from training.runtime.signals import *
from training.runtime.signals import _dispatch
send = lambda signum: os.kill(os.getpid(), signum)
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have it ignored
install_handlers()
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SETUP + code], cwd=CHECKOUT, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("send(signal.SIGTERM)\ntry: enable_exit()\nexcept Interrupted as e: print(e.signum, e.step)",
                     id="before-enable-exit-it-is-recorded"),
        pytest.param("enable_exit()\ntry: send(signal.SIGTERM)\nexcept Interrupted as e: print(e.signum, e.step)",
                     id="then-it-raises"),
        pytest.param("enable_exit()\ntry: send(signal.SIGTERM)\nexcept BaseException: pass\n"
                     "try: reraise_pending()\nexcept Interrupted as e: print(e.signum, e.step)",
                     id="a-swallowed-one-is-raised-again"),
        pytest.param("enable_exit()\ntry: send(signal.SIGTERM)\nexcept BaseException: pass\n"
                     "try: send(signal.SIGUSR1)\nexcept Interrupted as e: print(e.signum, e.step)",
                     id="by-the-next-signal-too"),
        pytest.param("enable_exit()\ntry: send(signal.SIGTERM)\nexcept Interrupted as e:\n"
                     "    reraise_pending(); clear_pending(); send(signal.SIGUSR1); print(e.signum, e.step)",
                     id="not-while-it-is-handled"),
        pytest.param("enable_exit()\nwith override_handler(lambda n: print(n, None)): send(signal.SIGTERM)",
                     id="an-overriding-handler-gets-it"),
    ],
)  # fmt: skip
def test_signal_is_not_lost(code):
    done = run_python(code)
    assert done.stdout == f"{int(signal.SIGTERM)} None\n", done.stderr


def test_second_ctrl_c_exits_at_once():
    done = run_python("enable_exit()\nwith override_handler(lambda n: None):\n    send(2); send(2); print('no')")
    assert (done.returncode, done.stdout) == (130, "")


def test_ignored_signals_stay_ignored():
    code = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SETUP
    code += "print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, signal.getsignal(signal.SIGTERM) is _dispatch)"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.stdout == "True True\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("2, 7), False", "interrupted after step 7; run the same command to resume"),
        ("2), False", "interrupted; run the same command to resume"),
        ("10, 7), True", "interrupted after step 7; the job is requeued and resumes by itself"),
    ],
)
def test_interruption_says_how_the_run_resumes(arguments, message):
    assert run_python(f"print_interrupted(Interrupted({arguments})").stderr == f"{message}\n"


def test_stream_drops_what_cannot_be_written():
    class FullDisk(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self):
            self.write("")

    stream = BestEffortStream(FullDisk())
    assert stream.write("text") == 4 and not stream.isatty()
    stream.flush()


def test_stream_of_a_closed_pipe_is_discarded():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        stream = BestEffortStream(pipe)
        for _ in range(2):
            stream.write("text")
            stream.flush()
        pipe.write("text")  # closing flushes, as Python does at exit


def test_closed_pipe_does_not_change_the_exit_status():
    code = "from training.runtime.stdio import *\ninstall_best_effort_stdio()\nprint('x' * 100000)\nflush_stdio()"
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "$0" | head -c 1; exit ${{PIPESTATUS[0]}}', code],
        cwd=CHECKOUT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_streams_that_are_closed_from_the_start_drop_output():
    """No file gets their numbers, to which libraries print."""
    code = (
        "from training.runtime.stdio import *\ninstall_best_effort_stdio()\nfile = open(os.devnull)\n"
        "print('text'), print('text', file=sys.stderr), flush_stdio(), sys.exit(file.fileno() < 3)"
    )
    closed = ["bash", "-c", f'"{sys.executable}" -c "$0" <&- >&- 2>&-', code]
    assert subprocess.run(closed, cwd=CHECKOUT).returncode == 0


#: A process that alone cannot use its text.
ALONE = """
import os, signal, sys, threading

from common.errors import UserError
from training.launch import cli

def main():
    with cli.reporting():
        raise UserError("the text is not on this machine")

cli.ERROR_REPORT_DELAY = float(sys.argv.pop())
if cli.ERROR_REPORT_DELAY:
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
sys.exit(cli.command_line(main))
"""


@pytest.mark.parametrize("seconds", [0, 30])
def test_error_that_only_one_process_has_is_reported_by_it(seconds, tmp_path):
    """If process 0 reports it, launchers such as torchrun end this process before `seconds` have passed."""
    (tmp_path / "alone.py").write_text(ALONE)
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    env = {**variables, "PYTHONPATH": str(CHECKOUT)}
    done = run(str(tmp_path / "alone.py"), str(seconds), cwd=tmp_path, env=env)
    sentence = "process 1 of the run: alone.py: error: the text is not on this machine\n"
    assert (done.returncode, done.stderr) == (2, "" if seconds else sentence)


#: Settings of the second of two processes, or its tokens, and how it is told from the first; `None`: they agree.
DIFFERING = (
    (["paths.cache=elsewhere", "data.path=elsewhere", "name=other", "logger=wandb"], None),
    (["seed=7"], "seed=7 (process 0: 0)"),
    (["trainer.log_every=7", "eval.limit=9"], "eval.limit=9 (process 0: null), trainer.log_every=7 (process 0: 5)"),
    (["tokens"], "tokens=its (process 0: the)"),
)


def disagreements(rank: int, world: int) -> list[str | None]:
    """Return how two processes do not agree, for each difference."""
    init_process_group(gpu=False)
    found: list[str | None] = []
    for differing, _ in DIFFERING:
        own = differing if rank == 1 else []
        config = compose_config(*(setting for setting in own if "=" in setting))
        try:
            check_agreement(config, SimpleNamespace(fingerprint="its" if "tokens" in own else "the"))
            found.append(None)
        except UserError as error:
            found.append(str(error))
    return found


def test_processes_with_other_settings_or_text_refuse_to_train_together():
    start = "process 1 of the run was started with other settings or text than process 0, "
    expected = [named and f"{start}{named}: start all with the same" for _, named in DIFFERING]
    assert gloo_pool.run(disagreements, 2) == [expected, expected]


def test_srun_tasks_get_torchruns_variables(monkeypatch):
    step = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_RESTART_COUNT": "2",
    }  # fmt: skip
    monkeypatch.setattr(os, "environ", step)
    export_torchrun_env()
    assert {name: step[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")} == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
    }  # fmt: skip
    assert step["MASTER_ADDR"] == "node1" and step["MASTER_PORT"] == "15009", "another port after each restart"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Return a function that puts a shell script as a command on the path."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def make(name: str, script: str) -> None:
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    return make


def test_job_is_requeued_at_its_time_limit_only(monkeypatch):
    for name in ("ZCLIP_LAUNCHER", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert job_to_requeue(signal.SIGUSR1) is None, "outside of SLURM"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert [job_to_requeue(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == [None, None, "7"]
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "6")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert job_to_requeue(signal.SIGUSR2) == "6_2"
    monkeypatch.setenv("ZCLIP_LAUNCHER", "1")
    assert job_to_requeue(signal.SIGUSR2) is None, "the launcher deals with the job"


def test_reason_why_a_job_cannot_be_requeued_is_printed(command, tmp_path, monkeypatch, capsys):
    command("scontrol", f"echo $* >> {tmp_path}/calls")
    requeue("6_2")
    assert (tmp_path / "calls").read_text() == "requeue 6_2\n" and capsys.readouterr().err == ""
    how = "run the same command to resume"
    command("scontrol", "echo not allowed >&2; exit 1")
    requeue("7")
    assert capsys.readouterr().err == f"job 7 cannot be requeued: not allowed; {how}\n"
    monkeypatch.setenv("PATH", str(tmp_path / "container"))
    requeue("7")
    error = capsys.readouterr().err
    assert error == f"job 7 cannot be requeued: scontrol cannot be run (No such file or directory); {how}\n"


def test_jobs_of_the_queue(command):
    command("squeue", "echo 7 RUNNING; echo; echo 8 PENDING")
    assert queued_jobs() == {"7": "RUNNING", "8": "PENDING"}
    command("squeue", "echo cannot reach the controller >&2; exit 1")
    with pytest.raises(UserError, match=r"^squeue failed: cannot reach the controller$"):
        queued_jobs()


def test_submission_is_one_command(command, tmp_path, monkeypatch):
    command("sbatch", f'echo "$@" > {tmp_path}/call; echo "12;cluster"')
    options = sbatch_resources(compose_config("trainer=fsdp", "plan=true").trainer)
    assert options == ["--nodes=1", "--ntasks-per-node=8", "--gpus-per-node=8"]
    assert submit(options, ["lr=1e-3"]) == "12"
    call = (tmp_path / "call").read_text()
    assert call == f"--parsable {' '.join(options)} {CHECKOUT}/scripts/slurm/train.sbatch lr=1e-3\n"
    command("sbatch", "echo invalid partition >&2; exit 1")
    with pytest.raises(UserError, match=r"^sbatch rejects the job: invalid partition$"):
        submit(options, [])
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"^hydra/launcher=slurm is not possible: sbatch is not installed here$"):
        submit(options, [])


def test_all_ranks_learn_of_a_signal_in_the_last_step(tmp_path):
    done = run_ranks("tests/training/last_step_signal.py", processes=2, cwd=tmp_path)
    expected = [f"rank {rank} stops for {int(signal.SIGTERM)}" for rank in range(2)]
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, expected), done.stderr


def test_environment_names_commit_versions_and_command(tmp_path, monkeypatch):
    """The checkout is a repository of one commit."""
    monkeypatch.setattr("sys.argv", ["/some/where/train.py", "lr=1e-3"])
    checkout = tmp_path / "training" / "runtime"
    checkout.mkdir(parents=True)
    monkeypatch.setattr("training.runtime.environment.__file__", str(checkout / "environment.py"))
    assert environment()["commit"] is None, "without a repository"

    def git(*arguments: str) -> str:
        author = ("-c", "user.name=me", "-c", "user.email=me@localhost")
        return subprocess.check_output(["git", *author, *arguments], cwd=tmp_path, text=True).strip()

    git("init", "-q")
    (tmp_path / "file").write_text("text")
    git("add", "file")
    git("commit", "-qm", "One")
    clean = environment()
    assert (clean["commit"], clean["uncommitted_changes"]) == (git("rev-parse", "HEAD"), False)
    assert clean["command"] == ["train.py", "lr=1e-3"]
    assert clean["versions"]["torch"] == version("torch")
    assert clean["versions"]["python"] == platform.python_version()
    (tmp_path / "file").write_text("changed")
    assert environment()["uncommitted_changes"]


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.EFBIG, "cannot be written (File too large): when it can, run the same command to resume"),
        (errno.EACCES, "cannot be used (Permission denied): when it can, run the same command to resume"),
        (errno.EISDIR, "cannot be written (Is a directory): when it can, run the same command to resume"),
        (errno.EIO, "cannot be used (Input/output error): when it can, run the same command to resume"),
    ],
)
def test_files_that_the_system_refuses_are_one_sentence(number, sentence, capsys, monkeypatch):
    monkeypatch.setattr("training.launch.cli.exit_statuses", statuses := [])
    with reporting():
        raise OSError(number, os.strerror(number), "runs/main/x/failure.txt")
    assert capsys.readouterr().err == f"runs/main/x/failure.txt {sentence}\n" and statuses == [3]
