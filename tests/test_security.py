"""What SECURITY.md says of open sockets and of models from somebody else; `tests/fuzz` has what it says of files."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from common.console import make_console
from common.errors import UserError
from evaluation.evaluator import hugging_face_model
from tests.helpers import FSDP, compose_config, copy_run, ranks, start, wait_for_steps
from training.monitor.wandb_run import WandbRun
from training.run import prepare_tokens
from training.run_dir import RunDir

LISTENING = "0A"
#: Addresses of this machine alone, as /proc/net/tcp and tcp6 write them.
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


def listening_addresses(pid: int) -> list[str]:
    """Return the addresses on which a process listens, in hexadecimal."""
    files = [str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()]
    inodes = {file[8:-1] for file in files if file.startswith("socket:")}
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()]
    return [row[1].split(":")[0] for row in rows if row[3] == LISTENING and row[9] in inodes]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux")
@pytest.mark.parametrize("settings", [(), FSDP], ids=["one process", "two processes"])
def test_run_listens_on_this_machine_alone(settings, tiny, tmp_path):
    job = start(*tiny, *settings, "trainer.max_steps=100000", cwd=tmp_path)
    try:
        wait_for_steps(job, tmp_path, 3)
        addresses = [address for pid in (job.pid, *ranks(job).values()) for address in listening_addresses(pid)]
    finally:
        job.kill()
        job.wait()
    assert bool(addresses) == bool(settings)
    assert {*addresses} <= {*LOOPBACK}


@pytest.mark.slow
def test_code_of_a_hugging_face_folder_is_not_executed(finished_run, tmp_path, monkeypatch):
    from models.hugging_face import export
    from training.checkpoint.load import RunCheckpoint

    checkpoint = RunCheckpoint(finished_run, None, print)
    folder = tmp_path / "model"
    export(checkpoint.model_state(), checkpoint.config, folder, 0)
    shutil.copytree(finished_run / "tokenizer", folder, dirs_exist_ok=True)
    hugging_face_model(str(folder), tmp_path / "scores.json", "cpu", "float32").load()
    code = f"open({str(tmp_path / 'executed')!r}, 'w')\n"
    (folder / "planted.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": classes, "model_type": "planted"}))
    with pytest.raises(UserError, match=r"hf=.*cannot be loaded"):
        hugging_face_model(str(folder), tmp_path / "scores.json", "cpu", "float32").load()
    assert not (tmp_path / "executed").exists()


def test_records_of_wandb_stay_in_the_run_folder(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=r"run/wandb is a link: what is written there must stay in its folder"):
        WandbRun(compose_config("logger=wandb"), tmp_path / "run", make_console())
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("name", ["plots", "checkpoints", "tokenizer"])
def test_folder_that_is_a_link_is_refused_before_training(name, finished_run, tiny, tmp_path):
    path = copy_run(finished_run, tmp_path)
    (path / name).rename(tmp_path / "outside")
    (path / name).symlink_to(tmp_path / "outside")
    config = compose_config(*tiny)
    tokens = prepare_tokens(config, Console(quiet=True))
    with pytest.raises(UserError, match=rf"{path / name} is a link"), RunDir(path).acquire(config, tokens):
        pass
