"""A script keeps the checkpoint that it chose, though a training process removes it meanwhile."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import remove
from scripts import _held
from scripts._held import held
from tests.helpers import copy_run, same
from training.checkpoint.format import fingerprint, load_model_state
from training.run_dir import RunDir


@pytest.fixture(params=["finished_run", "sharded_run"])
def run(request, tmp_path) -> Path:
    """A copy of a run whose checkpoints are files, and of one whose are folders."""
    return copy_run(request.getfixturevalue(request.param), tmp_path)


def hidden(run: Path) -> list[str]:
    return [path.name for path in run.iterdir() if path.name.startswith(".saving")]


def test_held_checkpoint_outlives_its_removal(run):
    own = RunDir(run).checkpoint(40)
    expected, identity = load_model_state(own), fingerprint(own)
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    with held(run, None, print) as checkpoint:
        assert checkpoint.step == 40 and len(hidden(run)) == 1
        remove(own)
        assert not own.exists() and checkpoint.description == "step 40"
        assert same(checkpoint.model_state(), expected) and fingerprint(checkpoint.checkpoint) == identity
        with held(run, None, print) as other:
            assert other.step == 32 and len(hidden(run)) == 2, "two scripts do not disturb each other"
        assert same(checkpoint.model_state(), expected)
    assert not hidden(run)


def test_checkpoint_removed_while_it_is_linked_is_chosen_again(run, monkeypatch):
    link = Path.hardlink_to

    def remove_first(target, file):
        monkeypatch.setattr(Path, "hardlink_to", link)
        remove(RunDir(run).checkpoint(40))
        link(target, file)

    monkeypatch.setattr(Path, "hardlink_to", remove_first)
    with held(run, None, print) as checkpoint:
        assert checkpoint.step == 32 and checkpoint.model_state()
    monkeypatch.setattr(Path, "hardlink_to", remove_first)
    with pytest.raises(UserError, match=r"^step=40 has no checkpoint in .*: it must be one of 8, 16, 24, 32$"):
        held(run, 40, print).__enter__()
    assert not hidden(run)


def test_files_are_copied_where_links_are_impossible(run, monkeypatch):
    def refuse(target, file):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with held(run, 8, print) as checkpoint:
        remove(RunDir(run).checkpoint(8))
        assert checkpoint.step == 8 and checkpoint.model_state()
    assert not hidden(run)


def test_linked_checkpoint_is_held_too(run, tmp_path):
    own = RunDir(run).checkpoint(40)
    moved = shutil.move(own, tmp_path / "moved")
    own.symlink_to(moved)
    with held(run, 40, print) as checkpoint:
        own.unlink()
        assert checkpoint.model_state()


def test_leftovers_of_killed_scripts_are_removed_and_held_ones_stay(run):
    left = run / f".saving-0123-{_held.NAME}"
    left.mkdir()
    (left / "0").touch()
    with held(run, None, print):
        assert not left.exists() and len(hidden(run)) == 1


def test_folder_that_cannot_be_written_is_read(run, monkeypatch):
    """As root, file permissions stop nobody."""

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with held(run, None, print) as checkpoint:
        assert checkpoint.checkpoint == RunDir(run).checkpoint(40) and not hidden(run)
