"""A checkpoint that is intact, but holds something else than a checkpoint does, is never used."""

import hashlib
import math
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

from common.errors import RunError
from tests.helpers import copy_run
from training.checkpoint.format import is_valid, saved_config
from training.checkpoint.resume import newest_step
from training.checkpoint.state import find_problem
from training.run_dir import RunDir

State = dict[str, Any]
Change = Callable[[State], object]

WEIGHT = "model.model.embed_tokens.weight"
OPTIMIZER = "epoch_loop.automatic_optimization.optim_progress"


def put(*path: Any) -> Change:
    """Return a change that puts the last of the arguments where the others lead."""
    *keys, last, value = path

    def change(state: State) -> None:
        inner: Any = state
        for key in keys:
            inner = inner[key]
        inner[last] = value

    return change


def drop(*path: Any) -> Change:
    """Return a change that removes what is where the arguments lead."""
    *keys, last = path

    def change(state: State) -> None:
        inner: Any = state
        for key in keys:
            inner = inner[key]
        del inner[last]

    return change


#: Changes of the state that is not in tensors, in a file and in a folder alike, and the part that they hit.
CHANGES: dict[str, list[Change]] = {
    "configuration": [
        drop("config"),
        put("config", []),
        put("config", "model", "num_hidden_layers", "2"),
        put("config", "trainer", None),
        put("config", "unknown", 1),
    ],
    "step": [
        drop("global_step"),
        put("global_step", math.nan),
        put("global_step", 40.0),
        put("global_step", True),
        put("global_step", torch.tensor(40)),
        put("global_step", 32),
        put("epoch", 1),
        put("pytorch-lightning_version", "0.0.1"),
        put("pytorch-lightning_version", None),
    ],
    "weights": [
        put("config", "model", "vocab_size", 513),
        put("config", "model", "num_hidden_layers", 1),
        put("config", "model", "num_hidden_layers", 2**30),
        put("config", "model", "intermediate_size", 64),
    ],
    "tensors": [
        put("callbacks", "TimedClippingCallback", "strategies", 0, "state", "mean", torch.zeros((), device="meta")),
        put("metrics", "loss", torch.zeros(40, dtype=torch.int64).to_sparse()),
    ],
    "schedule": [
        drop("lr_schedulers"),
        put("lr_schedulers", []),
        put("lr_schedulers", 0, "last_epoch", 39),
        put("lr_schedulers", 0, "last_epoch", math.nan),
        put("lr_schedulers", 0, "base_lrs", [math.nan]),
        put("lr_schedulers", 0, "base_lrs", [1e-3, 1e-3]),
        put("lr_schedulers", 0, "optimizer", None),
        put("lr_schedulers", 0, "lr_lambdas", [5]),
    ],
    "loops": [
        drop("loops"),
        put("loops", "fit_loop", []),
        put("loops", "fit_loop", "state_dict", {}),
        put("loops", "fit_loop", "state_dict", "combined_loader", []),
        put("loops", "fit_loop", "state_dict", "combined_loader", [{}, {}]),
        put("loops", "fit_loop", "state_dict", "combined_loader", 0, "sequences_consumed", math.nan),
        put("loops", "fit_loop", "state_dict", "combined_loader", 0, "sequences_consumed", 319),
        put("loops", "fit_loop", "state_dict", "combined_loader", 0, "skipped_batches", -1),
        put("loops", "fit_loop", "state_dict", "combined_loader", 0, "fingerprint", 5),
        put("loops", "fit_loop", "epoch_progress", 5),
        put("loops", "fit_loop", "epoch_progress", "total", "ready", "1"),
        put("loops", "fit_loop", "epoch_loop.batch_progress", "total", {}),
        put("loops", "fit_loop", "epoch_loop.batch_progress", "current", [1, 2]),
        put("loops", "fit_loop", "epoch_loop.state_dict", {}),
        put("loops", "fit_loop", OPTIMIZER, "optimizer", "step", "total", "ready", 39),
        drop("loops", "fit_loop", OPTIMIZER, "optimizer", "zero_grad"),
    ],
    "clipper": [
        put("callbacks", {}),
        put("callbacks", "TimedClippingCallback", "strategies", []),
        put("callbacks", "TimedClippingCallback", "strategies", 0, "strategy", "AutoClip"),
        put("callbacks", "TimedClippingCallback", "strategies", 0, "state", "mean", torch.zeros(2)),
        put("callbacks", "TimedClippingCallback", "strategies", 0, "counters", [1]),
        drop("callbacks", "TimedClippingCallback", "strategies", 0, "state", "blocks"),
    ],
    "random states": [
        drop("random"),
        put("random", []),
        put("random", "python", (3, (1, 2), None)),
        put("random", "python", 2),
        put("random", "numpy", ("MT19937", torch.zeros(3), 0, 0, 0.0)),
        put("random", "numpy", ("PCG64", torch.zeros(624), 0, 0, 0.0)),
        put("random", "torch", torch.zeros(5)),
        put("random", "torch", torch.zeros(16, dtype=torch.uint8)),
        drop("random", "cuda"),
    ],
    "metrics": [
        put("metrics", "loss", torch.zeros(39, dtype=torch.int64)),
        put("metrics", "loss", torch.zeros(40)),
        put("metrics", "loss", None),
        put("metrics", []),
        drop("metrics", "tokens"),
    ],
}

#: Changes of the tensors in a file.
TENSOR_CHANGES: dict[str, list[Change]] = {
    "tensors": [put("state_dict", WEIGHT, torch.zeros(512, 64).to_sparse())],
    "weights": [
        drop("state_dict", WEIGHT),
        put("state_dict", "model.other", torch.zeros(1)),
        put("state_dict", WEIGHT, torch.zeros(512, 63)),
        put("state_dict", WEIGHT, torch.zeros(512, 64, dtype=torch.int32)),
        put("state_dict", WEIGHT, "text"),
        put("state_dict", []),
    ],
    "optimizer": [
        put("optimizer_states", 0, "state", 0, "exp_avg", torch.zeros(64, 512)),
        put("optimizer_states", 0, "state", 0, "step", torch.zeros(1)),
        drop("optimizer_states", 0, "state", 3, "exp_avg_sq"),
        drop("optimizer_states", 0, "state", 3),
        drop("optimizer_states", 0, "param_groups", 0),
        drop("optimizer_states", 0, "param_groups", 0, "params"),
        put("optimizer_states", 0, "param_groups", 0, "params", [0, 1]),
        put("optimizer_states", 0, "param_groups", 0, "capturable", True),
        put("optimizer_states", 0, "param_groups", 0, "unknown", 1),
    ],
}


#: Cases of each part that fast tests cover.
FAST = 3


def cases(*changes: dict[str, list[Change]]) -> list[Any]:
    return [
        pytest.param(part, change, marks=[pytest.mark.slow] if number >= FAST else [], id=f"{part} {number}")
        for parts in changes
        for part, several in parts.items()
        for number, change in enumerate(several)
    ]


@pytest.fixture(scope="module")
def file(finished_run, tmp_path_factory) -> Path:
    """A copy of the last checkpoint, of one file."""
    return Path(shutil.copy(RunDir(finished_run).checkpoint(40), tmp_path_factory.mktemp("file")))


@pytest.fixture(scope="module")
def folder(sharded_run, tmp_path_factory) -> Path:
    """A copy of the last checkpoint of a sharded run."""
    source = RunDir(sharded_run).checkpoint(40)
    return shutil.copytree(source, tmp_path_factory.mktemp("folder") / source.name)


def problem_after(change: Change, archive: Path, checkpoint: Path) -> str | None:
    """Return the problem of a checkpoint one of whose archives is changed, and restore that."""
    content = archive.read_bytes()
    state = torch.load(archive, weights_only=True)
    change(state)
    torch.save(state, archive)
    try:
        assert is_valid(checkpoint), "it is intact"
        return find_problem(checkpoint)
    finally:
        archive.write_bytes(content)


def test_checkpoints_of_runs_have_no_problem(finished_run, sharded_run, diverged_run):
    for run in map(RunDir, (finished_run, sharded_run, diverged_run)):
        assert [find_problem(run.checkpoint(step)) for step in run.checkpoint_steps()] == [None] * len(
            run.checkpoint_steps()
        )


@pytest.mark.parametrize(("part", "change"), cases(CHANGES, TENSOR_CHANGES))
def test_wrong_state_is_named(part, change, file):
    problem = problem_after(change, file, file)
    assert problem is not None and (problem.startswith((f"is damaged (its {part}: ", "is damaged (its weights: "))), (
        problem
    )
    assert len(problem.splitlines()) == 1 and len(problem) < 400


@pytest.mark.slow
@pytest.mark.parametrize(("part", "change"), cases(CHANGES))
def test_wrong_state_of_a_folder_is_named(part, change, folder):
    problem = problem_after(change, folder / "meta.pt", folder)
    assert problem is not None and problem.startswith(f"is damaged (its {part}: "), problem


@pytest.mark.parametrize("holds", [[1], None, torch.zeros(3), {}, {"config": 5}])
def test_archive_of_something_else_is_no_checkpoint(holds, tmp_path):
    path = tmp_path / "step-00000040.ckpt"
    torch.save(holds, path)
    assert str(find_problem(path)).startswith("is damaged (its configuration: ")


def index_changes() -> dict[str, tuple[str, Callable[[Any], object]]]:
    """Return changes of an index, and how the problem that it then has begins."""
    name, state = f"state_dict.{WEIGHT}", f"optimizer_0.state.{WEIGHT}.exp_avg"

    def forget_a_place(index: Any) -> None:
        del index.storage_data[next(place for place in index.storage_data if place.fqn == name)]

    def change_dtype(index: Any) -> None:
        index.state_dict_metadata[name].properties.dtype = torch.float16

    def swap(first: str, second: str) -> Callable[[Any], object]:
        """Return a change after which each of two records is where the other is said to be."""

        def change(index: Any) -> None:
            places = index.storage_data
            a, b = (next(place for place in places if place.fqn == fqn) for fqn in (first, second))
            places[a], places[b] = places[b], places[a]

        return change

    def name_a_record_twice(index: Any) -> None:
        index.storage_data[MetadataIndex("other", torch.Size([0]))] = next(iter(index.storage_data.values()))

    def overlap(row: int) -> Callable[[Any], object]:
        """Return a change after which a part of a tensor begins elsewhere, and no part has its own rows."""

        def change(index: Any) -> None:
            part = max(index.state_dict_metadata[name].chunks, key=lambda part: part.offsets)
            place = index.storage_data.pop(MetadataIndex(name, part.offsets))
            part.offsets = torch.Size([row, 0])
            index.storage_data[MetadataIndex(name, part.offsets)] = place

        return change

    def transform(index: Any) -> None:
        next(iter(index.storage_data.values())).transform_descriptors = ["zstd"]

    group = "optimizer_0.param_groups.0"

    return {
        "part": (f" (its weights: {name} is inc", lambda index: index.state_dict_metadata[name].chunks.pop()),
        "place": (f" (its weights: {name} is incomplete)", forget_a_place),
        "overlap": (f" (its weights: {name} is incomplete)", overlap(1)),
        "outside": (f" (its weights: {name} is incomplete)", overlap(10**6)),
        "weight": (f" (its weights: {WEIGHT} is missing)", lambda index: index.state_dict_metadata.pop(name)),
        "moment": (f" (its optimizer: {WEIGHT}.exp_avg is m", lambda index: index.state_dict_metadata.pop(state)),
        "setting": (" (its optimizer: its parameters are others)", swap(f"{group}.lr", f"{group}.params")),
        "dtype": ("", change_dtype),
        "shape": ("", swap(name, "state_dict.model.model.norm.weight")),
        "object": ("", swap(name, f"{group}.lr")),
        "twice": ("", name_a_record_twice),
        "transformed": ("", transform),
    }


@pytest.mark.parametrize(("problem", "change"), index_changes().values(), ids=index_changes())
def test_index_that_lacks_a_part_is_no_checkpoint(problem, change, folder):
    index, seal = folder / ".metadata", folder / "sha256"
    before = index.read_bytes(), seal.read_text()
    metadata = FileSystemReader(folder).read_metadata()
    change(metadata)
    index.write_bytes(pickle.dumps(metadata))
    seal.write_text(hashlib.sha256(index.read_bytes()).hexdigest())
    try:
        assert str(find_problem(folder)).startswith(f"is damaged{problem}")
    finally:
        index.write_bytes(before[0])
        seal.write_text(before[1])


def values_without_end() -> list[Any]:
    """Return a few lists that stand for 10^9 values."""
    values: list[Any] = [0] * 10
    for _ in range(8):
        values = [values] * 10
    return values


def test_few_lists_that_stand_for_many_values_are_not_followed(file):
    content = file.read_bytes()
    try:
        torch.save(torch.load(file, weights_only=True) | {"config": {"clip": values_without_end()}}, file)
        assert find_problem(file) == "is damaged"
        assert saved_config(file) is None
    finally:
        file.write_bytes(content)


def test_tensors_and_entries_take_no_more_memory_than_their_file(file, tmp_path):
    repeated = tmp_path / file.name
    torch.save(torch.load(file, weights_only=True) | {"more": torch.zeros(1).expand(2**30)}, repeated)
    assert not is_valid(repeated)
    shutil.copy(file, repeated)
    with zipfile.ZipFile(repeated, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more", bytes(2**20))
    assert not is_valid(repeated)


def test_renamed_checkpoint_is_skipped(finished_run, tmp_path):
    run_dir = RunDir(copy_run(finished_run, tmp_path))
    run_dir.checkpoint(40).unlink()
    run_dir.checkpoint(24).rename(run_dir.checkpoint(48))
    reports: list[str] = []
    assert newest_step(run_dir, reports.append) == 32
    assert reports == [f"{run_dir.checkpoint(48)} is damaged (its step: 24 is not that in its name): skipped"]


def test_run_whose_checkpoints_hold_something_else_is_one_sentence(finished_run, tmp_path):
    run_dir = RunDir(copy_run(finished_run, tmp_path))
    for step in run_dir.checkpoint_steps():
        torch.save({"config": "none"}, run_dir.checkpoint(step))
    reports: list[str] = []
    with pytest.raises(RunError, match=r"has no checkpoint that is undamaged: restore one of 8, 16, 24, 32, 40, or"):
        newest_step(run_dir, reports.append)
    assert len(reports) == 5
