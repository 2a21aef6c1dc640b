"""What a checkpoint is on the disk: one file, or of a sharded run a folder in torch's distributed format.

A folder has a file for each process that saved, and `.metadata` with the place of each tensor. Lightning's `meta.pt`
has the state that is not in tensors. A checksum is written last. Any number of processes can load it. Each record of
either kind is an archive with checksums of its own; the checksum file has that of `.metadata`.
"""

import hashlib
import io
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

from common.files import commit, sha256

#: Files of a sharded checkpoint: the state that is not in tensors, torch's index of tensors, and its checksum.
METADATA, INDEX, CHECKSUM = "meta.pt", ".metadata", "sha256"


def write(checkpoint: dict[str, Any], temporary: Path, sharded: bool, is_rank0: bool, group: Any) -> None:
    """Write a checkpoint of Lightning under a temporary name, for `publish`.

    If it is sharded, every process of `group` (`None`: of the run) writes its shard, and rank 0 all else.
    """
    if not sharded:
        if is_rank0:
            _save(checkpoint, temporary)
        return
    rest = dict(checkpoint)
    tensors = {"state_dict": rest.pop("state_dict")}
    tensors |= {f"optimizer_{index}": state for index, state in enumerate(rest.pop("optimizer_states"))}
    save(tensors, checkpoint_id=temporary, process_group=group)
    if is_rank0:
        _save(rest, temporary / METADATA)


def publish(temporary: Path, checkpoint: Path) -> None:
    """Give a checkpoint that all processes have written its final name, once the disk holds it."""
    if temporary.is_dir():
        (temporary / CHECKSUM).write_text(sha256(temporary / INDEX))
    commit(temporary, checkpoint)


def load_model_state(checkpoint: Path) -> dict[str, Tensor]:
    """Return the full weights on the CPU, under the names of `Llama.state_dict()`."""
    prefix = "model."
    if checkpoint.is_dir():
        prefix = f"state_dict.{prefix}"
        state = _load_sharded(checkpoint, prefix)
    else:
        state = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)["state_dict"]
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def load_full(checkpoint: Path) -> dict[str, Any]:
    """Return all of a checkpoint with full tensors on the CPU; those of a sharded one by their names in its index."""
    if not checkpoint.is_dir():
        return torch.load(checkpoint, map_location="cpu", weights_only=False)
    metadata = torch.load(checkpoint / METADATA, map_location="cpu", weights_only=False)
    return _load_sharded(checkpoint) | metadata


def _load_sharded(checkpoint: Path, prefix: str = "") -> dict[str, Any]:
    """Return the entries of a folder whose names begin with a prefix: full tensors on the CPU, and other objects."""
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in stored.items()
        if name.startswith(prefix)
    }
    load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def is_valid(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete, every record has its checksum, and torch can read it."""
    try:
        if checkpoint.is_dir() and (checkpoint / CHECKSUM).read_text() != sha256(checkpoint / INDEX):
            return False
        return all(map(_is_intact, _records(checkpoint)))
    except Exception:  # what is damaged can fail in any way
        return False


def _is_intact(record: BinaryIO) -> bool:
    """Whether the entries of an archive have their checksums, and torch can find them; other errors are raised.

    Python's zipfile ignores fields of the archive's directory without which torch cannot read it.
    """
    archive = zipfile.ZipFile(record)
    if archive.testzip() is not None or any(entry.external_attr for entry in archive.infolist()):
        return False  # torch reads nothing of an entry with the attribute of a folder
    record.seek(0)
    if isinstance(record, io.BytesIO):
        torch.load(record, map_location="cpu", weights_only=False)
    else:
        torch.load(record.name, map_location="cpu", weights_only=False, mmap=True)  # finds tensors without reading them
    return True


def fingerprint(checkpoint: Path) -> str:
    """Return a hash over the checksums of a checkpoint's records, which differs for any other checkpoint."""
    digest = hashlib.sha256()
    for record in _records(checkpoint):
        for info in zipfile.ZipFile(record).infolist():
            digest.update(f"{info.filename} {info.CRC} {info.file_size}\n".encode())
    return digest.hexdigest()[:16]


def _save(content: Any, path: Path) -> None:
    """Write a file through Python's own, whose errors say why it cannot be written."""
    with path.open("wb") as file:
        torch.save(content, file)


def _records(checkpoint: Path) -> Iterator[BinaryIO]:
    """Yield each archive of a checkpoint."""
    if not checkpoint.is_dir():
        with checkpoint.open("rb") as file:
            yield file
        return
    with (checkpoint / METADATA).open("rb") as file:
        yield file
    stored = FileSystemReader(checkpoint).read_metadata().storage_data.values()
    for place in sorted(stored, key=lambda place: (place.relative_path, place.offset)):
        with (checkpoint / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            yield io.BytesIO(file.read(place.length))
