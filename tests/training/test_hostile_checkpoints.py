"""Nothing in somebody else's checkpoint is executed: not by the check for damage, by loading, exporting or resuming."""

import hashlib
import io
import os
import pickle
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from common.errors import RunError, UserError
from tests.helpers import CHECKOUT, FSDP, copy_run, script
from tests.process_pool import run_ranks
from training.checkpoint.format import is_valid, load_full, load_model_state, load_shards, saved_config
from training.checkpoint.load import RunCheckpoint
from training.checkpoint.restore import load_checkpoint
from training.checkpoint.resume import newest_step
from training.run_dir import RunDir


class Touch:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*.ckpt"))


def seal(checkpoint: Path) -> None:
    """Write the checksum of a changed index."""
    (checkpoint / "sha256").write_text(hashlib.sha256((checkpoint / ".metadata").read_bytes()).hexdigest())


def in_the_file(checkpoint: Path, touch: Touch) -> None:
    torch.save(torch.load(checkpoint, weights_only=True) | {"extra": touch}, checkpoint)


def in_the_index(checkpoint: Path, touch: Touch) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(touch))
    seal(checkpoint)


def within_the_index(checkpoint: Path, touch: Touch) -> None:
    metadata = FileSystemReader(checkpoint).read_metadata()
    metadata.planner_data = touch
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(checkpoint)


def in_the_state_beside_the_tensors(checkpoint: Path, touch: Touch) -> None:
    torch.save(torch.load(checkpoint / "meta.pt", weights_only=True) | {"extra": touch}, checkpoint / "meta.pt")


def in_an_object_of_a_shard(checkpoint: Path, touch: Touch) -> None:
    metadata = FileSystemReader(checkpoint).read_metadata()
    index = next(index for index in metadata.storage_data if index.fqn == "optimizer_0.param_groups.0.lr")
    place = metadata.storage_data[index]
    record = io.BytesIO()
    torch.save(touch, record)
    with (checkpoint / place.relative_path).open("ab") as file:
        place.offset, place.length = file.tell(), len(record.getvalue())
        file.write(record.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(checkpoint)


SHARDED = (in_the_index, within_the_index, in_the_state_beside_the_tensors, in_an_object_of_a_shard)


@pytest.mark.parametrize("change", [in_the_file, *SHARDED])
def test_nothing_in_a_checkpoint_is_executed(change, finished_run, sharded_run, tmp_path):
    run = copy_run(sharded_run if change in SHARDED else finished_run, tmp_path)
    checkpoint, touched = newest(run), tmp_path / "touched"
    assert is_valid(checkpoint)
    change(checkpoint, Touch(touched))
    assert not is_valid(checkpoint)
    with pytest.raises((pickle.UnpicklingError, CheckpointException)):
        load_full(checkpoint)
    if change is not in_the_state_beside_the_tensors and change is not in_an_object_of_a_shard:
        with pytest.raises(pickle.UnpicklingError):
            load_model_state(checkpoint)
    if checkpoint.is_dir() and change is not in_the_state_beside_the_tensors:
        with pytest.raises(CheckpointException):
            load_shards(checkpoint, {"optimizer_0.param_groups.0.lr": 0.0})
    reports: list[str] = []
    assert newest_step(RunDir(run), reports.append) < int(checkpoint.stem[5:])
    assert reports == [f"{checkpoint} is damaged: skipped"]
    with pytest.raises(UserError, match=rf"^step=\d+ is damaged: {checkpoint}"):
        RunCheckpoint(run, int(checkpoint.stem[5:]), reports.append)
    assert not touched.exists()


@pytest.mark.parametrize("name", ["", ".metadata", "meta.pt", "sha256", "__0_0.distcp"])
def test_pipe_in_a_checkpoint_is_not_waited_for(name, finished_run, sharded_run, tmp_path):
    checkpoint = newest(copy_run(sharded_run if name else finished_run, tmp_path))
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    assert not is_valid(checkpoint)
    assert saved_config(checkpoint) is None or name not in ("", "meta.pt")


def test_index_cannot_name_files_outside_its_folder(sharded_run, tmp_path):
    checkpoint = newest(copy_run(sharded_run, tmp_path))
    metadata = FileSystemReader(checkpoint).read_metadata()
    for shard in {place.relative_path for place in metadata.storage_data.values()}:
        (checkpoint / shard).rename(checkpoint.parent / shard)
    for place in metadata.storage_data.values():
        place.relative_path = f"../{place.relative_path}"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(checkpoint)
    assert not is_valid(checkpoint)
    with pytest.raises(pickle.UnpicklingError, match=r"names \.\./\S+, which is not a file of the folder"):
        load_model_state(checkpoint)


#: train.py, whose check of checkpoints finds no problem: as if they were changed after it.
TRUSTING = """
import runpy
import sys

from training.checkpoint import fork, resume

fork.find_problem = resume.find_problem = lambda checkpoint: None
sys.argv.pop(0)
sys.path[0] = sys.argv[0].removesuffix("/train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_resume_executes_nothing_that_was_put_there_after_the_check(
    finished_run, tiny, run_in_process, monkeypatch, tmp_path
):
    monkeypatch.setattr("training.checkpoint.resume.find_problem", lambda checkpoint: None)
    run = copy_run(finished_run, tmp_path)
    (run / "result.json").unlink()
    in_the_file(newest(run), Touch(tmp_path / "touched"))
    with pytest.raises(RunError, match=r"step-00000040\.ckpt cannot be loaded") as error:
        run_in_process(*tiny)
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "touched").exists()


@pytest.mark.slow
@pytest.mark.parametrize("change", [within_the_index, in_an_object_of_a_shard])
@pytest.mark.parametrize("how", ["resume", "fork"])
def test_sharded_resume_executes_nothing_that_was_put_there_after_the_check(how, change, sharded_run, tiny, tmp_path):
    (tmp_path / "trusting.py").write_text(TRUSTING)
    run = copy_run(sharded_run, tmp_path)
    (run / "result.json").unlink()
    change(RunDir(run).checkpoint(40) if how == "resume" else RunDir(run).checkpoint(32), Touch(tmp_path / "touched"))
    fork = (f"fork_from={run}@32", "name=fork") if how == "fork" else ()
    settings = (str(CHECKOUT / "train.py"), *tiny, *FSDP, *fork)
    env = {"PYTHONPATH": str(CHECKOUT)}
    done = run_ranks(str(tmp_path / "trusting.py"), *settings, processes=2, cwd=tmp_path, env=env, timeout=300)
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"step-000000\d\d\.ckpt cannot be loaded \(.*(which no index|weights_only)", done.stderr), (
        done.stderr
    )
    assert not (tmp_path / "touched").exists()


def test_file_that_only_lightning_knows_is_not_loaded(tmp_path):
    """Under SLURM it loads `hpc_ckpt_*.ckpt` of the run folder without being asked to."""
    path = tmp_path / "hpc_ckpt_1.ckpt"
    torch.save({"global_step": 1, "callbacks": {}}, path)
    with pytest.raises(
        RunError, match=rf"^{path} cannot be loaded \(it is of step 1, or of something else\): remove it"
    ):
        load_checkpoint(pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), path)


def test_export_of_a_hostile_run_is_one_sentence(finished_run, tmp_path):
    run = copy_run(finished_run, tmp_path)
    for checkpoint in (run / "checkpoints").glob("step-*.ckpt"):
        in_the_file(checkpoint, Touch(tmp_path / "touched"))
    done = script("export_hf.py", f"run={run}", f"out={tmp_path}/out", cwd=tmp_path)
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "has no checkpoint that is undamaged" in done.stderr
    assert not (tmp_path / "touched").exists() and not (tmp_path / "out").exists()
