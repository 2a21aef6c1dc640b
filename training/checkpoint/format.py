"""What a checkpoint is on the disk: one file, or of a sharded run a folder in torch's distributed format.

A folder has a file for each process that saved, `.metadata` that says which tensor is where, Lightning's `meta.pt` with
all that is no tensor, and last a seal. Any number of processes can load it. Each record of either kind is an archive
with checksums; the seal is that of `.metadata`.
"""

import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

FACTS = "meta.pt"
INDEX = ".metadata"
SEAL = "sha256"


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was taken."""
    return int(checkpoint.stem.removeprefix("step-"))


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return the weights in a checkpoint, whole and on the CPU, under the names of `Llama.state_dict()`."""
    prefix = "model."
    if checkpoint.is_dir():
        prefix = f"state_dict.{prefix}"
        stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        state = {
            name: torch.empty(facts.size, dtype=facts.properties.dtype)
            for name, facts in stored.items()
            if name.startswith(prefix) and isinstance(facts, TensorStorageMetadata)
        }
        load(state, checkpoint_id=checkpoint, no_dist=True)
    else:
        state = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)["state_dict"]
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def write(checkpoint: dict[str, Any], aside: Path, sharded: bool, first: bool, group: Any = None) -> None:
    """Write a checkpoint, for `publish`. Of a sharded one every process of `group` writes its part.

    Args:
        checkpoint: as Lightning makes it.
        aside: where.
        sharded: whether its tensors are.
        first: whether this is rank 0, which writes all else.
        group: of processes; `None`: all.
    """
    if not sharded:
        if first:
            _save(checkpoint, aside)
        return
    rest = dict(checkpoint)
    tensors = {"state_dict": rest.pop("state_dict")}
    tensors |= {f"optimizer_{index}": state for index, state in enumerate(rest.pop("optimizer_states"))}
    save(tensors, checkpoint_id=aside, process_group=group)
    if first:
        _save(rest, aside / FACTS)


def contents(checkpoint: Path) -> dict[str, Any]:
    """Return all of a checkpoint, tensors whole and on the CPU; those of a sharded one by their names in it."""
    if not checkpoint.is_dir():
        return torch.load(checkpoint, map_location="cpu", weights_only=False)
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(facts.size, dtype=facts.properties.dtype)
        if isinstance(facts, TensorStorageMetadata)
        else None
        for name, facts in stored.items()
    }
    load(state, checkpoint_id=checkpoint, no_dist=True)
    return state | torch.load(checkpoint / FACTS, map_location="cpu", weights_only=False)


def is_valid(checkpoint: Path) -> bool:
    """Whether all of a checkpoint is there, and every record has its checksum."""
    try:
        if checkpoint.is_dir() and (checkpoint / SEAL).read_text() != _sum(checkpoint / INDEX):
            return False
        return all(zipfile.ZipFile(record).testzip() is None for record in _records(checkpoint))
    except Exception:  # what is damaged can fail in any way
        return False


def fingerprint(checkpoint: Path) -> str:
    """Return what tells a checkpoint from any other: a sum over the checksums of its records."""
    found = hashlib.sha256()
    for record in _records(checkpoint):
        for info in zipfile.ZipFile(record).infolist():
            found.update(f"{info.filename} {info.CRC} {info.file_size}\n".encode())
    return found.hexdigest()[:16]


def publish(aside: Path, checkpoint: Path) -> None:
    """Give a checkpoint that all processes have written its name, once the disk holds it."""
    if aside.is_dir():
        (aside / SEAL).write_text(_sum(aside / INDEX))
    for path in [*aside.iterdir(), aside] if aside.is_dir() else [aside]:
        _sync(path)
    if checkpoint.is_dir():  # a damaged one, which was passed over: folders are not replaced
        remove(checkpoint)
    aside.replace(checkpoint)
    _sync(checkpoint.parent)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, such that no part of it is taken for one meanwhile."""
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".removing-{checkpoint.name}")))
    else:
        checkpoint.unlink()


def _save(content: Any, path: Path) -> None:
    """Write a file; through Python's, which say why they cannot be written."""
    with path.open("wb") as file:
        torch.save(content, file)


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _records(checkpoint: Path) -> Iterator[BinaryIO]:
    """Yield each archive of a checkpoint."""
    if not checkpoint.is_dir():
        with checkpoint.open("rb") as file:
            yield file
        return
    with (checkpoint / FACTS).open("rb") as file:
        yield file
    stored = FileSystemReader(checkpoint).read_metadata().storage_data.values()
    for place in sorted(stored, key=lambda place: (place.relative_path, place.offset)):
        with (checkpoint / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            yield io.BytesIO(file.read(place.length))
