"""What a checkpoint is on the disk: one file, or of a sharded run a folder in torch's distributed format.

A folder has a file for each process that saved, and `.metadata` with the place of each tensor. Lightning's `meta.pt`
has the state that is not in tensors. A checksum is written last. Any number of processes can load it. Each record of
either kind is an archive with checksums of its own; the checksum file has that of `.metadata`.

A checkpoint may come from somebody else, so nothing in it is executed: archives are read with `weights_only=True`, and
`.metadata`, which torch pickles, by an unpickler that knows only the classes of an index.
"""

import hashlib
import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from common.errors import RunError
from common.files import commit, sha256
from common.reading import open_regular, read_bytes
from common.root_cause import root_cause

#: Files of a sharded checkpoint: the state that is not in tensors, torch's index of tensors, and its checksum.
METADATA, INDEX, CHECKSUM = "meta.pt", ".metadata", "sha256"

#: Most values of an archive. One for each tensor of the largest models is far less.
MOST_VALUES = 1 << 18

#: Classes and functions that an index may name, by module; of torch itself also the dtypes.
INDEX_GLOBALS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13
}  # fmt: skip


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in INDEX_GLOBALS.get(module, ()):
            raise pickle.UnpicklingError(f"{INDEX} names {module}.{name}, which no index of a checkpoint does")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """torch's reader of a sharded checkpoint, which executes nothing of the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open_regular(Path(self.path, INDEX)) as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{INDEX} is no index of a checkpoint")
        if any(type(place.relative_path) is not str for place in metadata.storage_data.values()):
            raise pickle.UnpicklingError(f"{INDEX} names no files")
        outside = [
            place for place in metadata.storage_data.values() if Path(place.relative_path).name != place.relative_path
        ]
        if outside:
            raise pickle.UnpicklingError(f"{INDEX} names {outside[0].relative_path}, which is not a file of the folder")
        _check_places(metadata)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _check_places(metadata: Metadata) -> None:
    """Raise `UnpicklingError` unless an index names each part of a file once, as it is.

    Otherwise a small folder could be read any number of times.
    """
    ends: dict[str, int] = {}
    for place in sorted(metadata.storage_data.values(), key=lambda place: (place.relative_path, place.offset)):
        if place.offset < ends.get(place.relative_path, 0) or getattr(place, "transform_descriptors", None):
            raise pickle.UnpicklingError(f"{INDEX} names a part of {place.relative_path} twice, or transformed")
        ends[place.relative_path] = place.offset + place.length


class _Writer(FileSystemWriter):
    """torch's writer of a sharded checkpoint. Errors reach rank 0 without their causes: the cause is raised."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except Exception as error:
            raise root_cause(error) from None


class _Planner(DefaultLoadPlanner):
    """torch's planner, which executes nothing of the objects that are no tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)


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
    save(tensors, storage_writer=_Writer(temporary), process_group=group)
    if is_rank0:
        _save(rest, temporary / METADATA)


def publish(temporary: Path, checkpoint: Path) -> None:
    """Give a checkpoint that all processes have written its final name, once the disk holds it.

    Raises:
        RunError: what another process has written is not there.
    """
    if temporary.is_dir():
        _check_shards(temporary)
        (temporary / CHECKSUM).write_text(sha256(temporary / INDEX))
    commit(temporary, checkpoint)


def _check_shards(folder: Path) -> None:
    """Raise `RunError` unless a folder has each part of a file that its index names."""
    ends: dict[str, int] = {}
    for place in _Reader(folder).read_metadata().storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size < end:
            raise RunError(
                f"{name}, which another process wrote, is not whole in {folder.parent}: all processes must see the "
                "same run folder, on a file system that their machines share"
            )


def load_model_state(checkpoint: Path) -> dict[str, Tensor]:
    """Return the full weights on the CPU, under the names of `Llama.state_dict()`."""
    prefix = "model."
    if checkpoint.is_dir():
        prefix = f"state_dict.{prefix}"
        state = _load_sharded(checkpoint, prefix)
    else:
        state = _load_archive(checkpoint)["state_dict"]
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def load_full(checkpoint: Path) -> dict[str, Any]:
    """Return all of a checkpoint with full tensors on the CPU; those of a sharded one by their names in its index."""
    if not checkpoint.is_dir():
        return torch.load(checkpoint, map_location="cpu", weights_only=True)
    metadata = torch.load(checkpoint / METADATA, map_location="cpu", weights_only=True)
    return _load_sharded(checkpoint) | metadata


def load_header(checkpoint: Path) -> dict[str, Any]:
    """Return all of a checkpoint but the tensors of a sharded one; those of a file are read when they are used."""
    header = _load_archive(checkpoint / METADATA if checkpoint.is_dir() else checkpoint)
    if not isinstance(header, dict):
        raise ValueError(f"{checkpoint} holds no state")
    tensors_in(header)
    return header


def tensors_in(content: Any) -> list[Tensor]:
    """Return the tensors in nested containers; raise `ValueError` if there are more than `MOST_VALUES` values.

    A few lists that hold each other can stand for any number of values.
    """
    tensors, left, count = [], [content], 0
    while left:
        count += 1
        if count > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values")
        value = left.pop()
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple | set):
            left += value
    return tensors


def saved_config(checkpoint: Path) -> dict[str, Any] | None:
    """Return the configuration that a checkpoint holds, without reading its tensors; `None` if it cannot be read.

    It is as the checkpoint has it: it may come from somebody else, and is to be checked before it is used.
    """
    try:
        config = load_header(checkpoint)["config"]
    except Exception:  # what is damaged can fail in any way
        return None
    return config if isinstance(config, dict) else None


class TensorSpec(NamedTuple):
    """Shape and data type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def tensor_specs(checkpoint: Path) -> dict[str, TensorSpec]:
    """Return the tensors of weights and optimizer by their names in an index, without reading them.

    Raises an error if the index of a sharded checkpoint lacks a part of one.
    """
    if not checkpoint.is_dir():
        header = load_header(checkpoint)
        (optimizer,) = header["optimizer_states"]
        flat = {f"state_dict.{name}": tensor for name, tensor in header["state_dict"].items()}
        for key, state in optimizer["state"].items():
            tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
            flat |= {f"optimizer_0.state.{key}.{name}": tensor for name, tensor in tensors.items()}
        return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in flat.items()}
    metadata = _Reader(checkpoint).read_metadata()
    specs = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            places = {MetadataIndex(name, chunk.offsets) for chunk in entry.chunks}
            if not _is_complete(entry):
                raise ValueError(f"{name} is incomplete")
            if len(places) != len(entry.chunks) or not places <= metadata.storage_data.keys():
                raise ValueError(f"{name} is incomplete")
            specs[name] = TensorSpec(tuple(entry.size), entry.properties.dtype)
    return specs


def _is_complete(entry: TensorStorageMetadata) -> bool:
    """Whether the parts of a tensor are all of it, one behind another along its first dimension.

    An element that no part has would be as the memory was before.
    """
    if not entry.size:
        return len(entry.chunks) == 1
    rows, others = 0, tuple(entry.size[1:])
    for chunk in sorted(entry.chunks, key=lambda chunk: (chunk.offsets[0], chunk.sizes[0])):
        if tuple(chunk.offsets) != (rows, *[0] * len(others)) or tuple(chunk.sizes[1:]) != others:
            return False
        rows += chunk.sizes[0]
    return rows == entry.size[0]


def load_param_groups(checkpoint: Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of the optimizer, of which there is one, in each of its parameter groups, in their order."""
    if not checkpoint.is_dir():
        (optimizer,) = header["optimizer_states"]
        return optimizer["param_groups"]
    prefix = "optimizer_0.param_groups."
    groups: dict[str, dict[str, Any]] = {}
    for name, value in _load_sharded(checkpoint, prefix).items():
        number, _, key = name.removeprefix(prefix).partition(".")
        groups.setdefault(number, {})[key] = value
    return [groups[number] for number in sorted(groups, key=int)]


def load_shards(checkpoint: Path, state: dict[str, Any]) -> None:
    """Load the tensors and objects of a sharded checkpoint into those of a state. All processes call it."""
    load(state, storage_reader=_Reader(checkpoint), planner=_Planner())


def _load_archive(path: Path) -> Any:
    """Return what an archive holds. Tensors are mapped: they are read from the file when they are used."""
    open_regular(path).close()  # torch would wait for a FIFO
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _load_sharded(checkpoint: Path, prefix: str = "") -> dict[str, Any]:
    """Return the entries of a folder whose names begin with a prefix: full tensors on the CPU, and other objects."""
    stored = _Reader(checkpoint).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in stored.items()
        if name.startswith(prefix)
    }
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)  # names are those of the index
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads all
        load(state, storage_reader=_Reader(checkpoint), planner=planner, no_dist=True)
    return state


def is_valid(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete, every record has its checksum, and torch can read it."""
    try:
        if checkpoint.is_dir() and read_bytes(checkpoint / CHECKSUM) != sha256(checkpoint / INDEX).encode():
            return False
        return all(_is_intact(record, spec) for record, spec in _records(checkpoint))
    except Exception:  # what is damaged can fail in any way
        return False


def _is_intact(record: BinaryIO, spec: TensorSpec | None) -> bool:
    """Whether an archive has the checksums of its entries, and a tensor of this kind or, with `None`, anything.

    Other errors are raised. Python's zipfile ignores fields of the archive's directory without which torch cannot read
    it. A tensor that repeats few elements, or a compressed entry, would take more memory than its file has bytes.
    """
    archive = zipfile.ZipFile(record)
    if any(entry.external_attr or entry.compress_type for entry in archive.infolist()):
        return False  # torch reads nothing of an entry with the attribute of a folder
    if archive.testzip() is not None:
        return False
    size = record.seek(0, io.SEEK_END)
    record.seek(0)
    if isinstance(record, io.BytesIO):
        content = torch.load(record, map_location="cpu", weights_only=True)
    else:
        content = _load_archive(Path(record.name))  # finds tensors without reading them
    in_memory = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(content))
    if in_memory > 2 * size:  # tied weights are stored once
        return False
    return spec is None or TensorSpec(tuple(content.shape), content.dtype) == spec


def fingerprint(checkpoint: Path) -> str:
    """Return a hash over the checksums of a checkpoint's records, which differs for any other checkpoint."""
    digest = hashlib.sha256()
    for record, _ in _records(checkpoint):
        for info in zipfile.ZipFile(record).infolist():
            digest.update(f"{info.filename} {info.CRC} {info.file_size}\n".encode())
    return digest.hexdigest()[:16]


def _save(content: Any, path: Path) -> None:
    """Write a new file through Python's own, whose errors say why it cannot be written."""
    with path.open("xb") as file:
        torch.save(content, file)


def _records(checkpoint: Path) -> Iterator[tuple[BinaryIO, TensorSpec | None]]:
    """Yield each archive of a checkpoint, with the shape and type of the tensor that it is, if it is one."""
    if not checkpoint.is_dir():
        with open_regular(checkpoint) as file:
            yield file, None
        return
    with open_regular(checkpoint / METADATA) as file:
        yield file, None
    metadata = _Reader(checkpoint).read_metadata()
    specs = {
        MetadataIndex(name, chunk.offsets): TensorSpec(tuple(chunk.sizes), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
        for chunk in entry.chunks
    }
    stored = metadata.storage_data.items()
    for index, place in sorted(stored, key=lambda item: (item[1].relative_path, item[1].offset)):
        with open_regular(checkpoint / place.relative_path) as file:
            file.seek(place.offset)
            yield io.BytesIO(file.read(place.length)), specs.get(index)
