"""Tasks as lm-eval defines them, with their data from the Hugging Face hub or from files.

HellaSwag and WinoGrande are the paper's. Their validation sets can be files, of the fields that they have on the hub:
a definition then includes lm-eval's own and names the file.
"""

import hashlib
import json
import logging
import lzma
import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any, NamedTuple

import yaml

#: Seed by which lm-eval itself draws the examples of k-shot tasks.
EXAMPLES_SEED = 1234


class ValidationSet(NamedTuple):
    """The validation set of a task.

    Attributes:
        file: its name without .jsonl or .jsonl.xz.
        items: in it.
        definition: lm-eval's, below its tasks/.
        fields: that the task reads.
        sha256: of these, see `_sum`.
    """

    file: str
    items: int
    definition: str
    fields: tuple[str, ...]
    sha256: str


SETS = {
    "hellaswag": ValidationSet(
        "hellaswag_validation",
        10_042,
        "hellaswag/hellaswag.yaml",
        ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label"),
        "36e3f0e62544e3c058f4119fa6e89946b7eeec86e1ad9d2d9d60fab4c09df7ba",
    ),
    "winogrande": ValidationSet(
        "winogrande_xl_validation",
        1_267,
        "winogrande/default.yaml",
        ("sentence", "option1", "option2", "answer"),
        "fb0e0cbbf2b63cf3c95f89ac3ab58eba8889cd7cdb7b1744c6e24e8572e37f36",
    ),
}

WAYS = (
    "they come from the Hugging Face hub where it can be reached, from a folder given as eval.data_dir= with "
    "hellaswag_validation.jsonl and winogrande_xl_validation.jsonl (or .jsonl.xz), or from `make eval-data`"
)


class TaskError(ValueError):
    """A task is not known, or its data cannot be had; the message is one sentence."""


def data_file(folder: Path, task: str) -> Path | None:
    """Return the validation set of a task in a folder; `None` if it is not there.

    Raises:
        TaskError: it has too few items, or too many.
    """
    known = SETS[task]
    for suffix in (".jsonl", ".jsonl.xz"):
        path = folder / f"{known.file}{suffix}"
        if path.is_file():
            try:
                with lzma.open(path, "rb") if suffix == ".jsonl.xz" else path.open("rb") as lines:
                    items = sum(1 for line in lines if line.strip())
            except (OSError, EOFError, lzma.LZMAError) as error:
                raise TaskError(f"{path} cannot be read ({error}): remove it, and get it again") from error
            _check(items, task, str(path))
            return path
    return None


def data_folders(data_dir: str | None, cache: str) -> list[Path]:
    """Return where the validation sets may be: a folder that is given, and where scripts/eval_data.py puts them."""
    return [Path(folder) for folder in (data_dir, Path(cache, "eval")) if folder is not None]


def load_tasks(name: str, folders: Sequence[Path], shots: int) -> dict[str, Any]:
    """Return a task, or those of a group, as lm-eval's `evaluate` takes them.

    Args:
        name: in lm-eval.
        folders: where the validation sets of HellaSwag and WinoGrande may be; else, as all others, from the hub.
        shots: solved examples before each item. They are drawn from the training set; of files, from the other items.

    Raises:
        TaskError: there is no such task, or its data cannot be had.
    """
    from lm_eval.tasks import TaskManager

    quieten_libraries()
    file = next((found for folder in folders if (found := data_file(folder, name))), None) if name in SETS else None
    try:
        with tempfile.TemporaryDirectory() as aside:
            if file is not None:
                definition = Path(aside, f"{name}.yaml")
                definition.write_text(yaml.safe_dump(_definition(name, file)))
                loaded: Any = TaskManager(include_defaults=False).load([str(definition)])
            else:
                manager = TaskManager()
                if name not in manager.all_tasks:
                    raise TaskError(
                        f"eval.tasks={name} is not known: it must be a task of lm-eval (`lm-eval ls tasks`)"
                    )
                loaded = manager.load([name])
    except TaskError:
        raise
    except Exception as error:  # of the hub, of its libraries, of definitions that need more packages
        reason = " ".join(str(error).split())[:200]
        said = f": {WAYS}" if name in SETS else ""
        raise TaskError(f"the data of eval.tasks={name} cannot be had ({reason}){said}") from error
    for each, task in loaded["tasks"].items():
        if each in SETS:
            _check(len(task.eval_docs), each, str(file or "the hub"))
            if (digest := _sum(task.dataset["validation"], SETS[each].fields)) != SETS[each].sha256:
                raise TaskError(
                    f"{file or 'the hub'} has other items than the validation set of {each} as it was published "
                    f"(sha256 {digest[:12]}): get it again"
                )
        task.set_config(key="num_fewshot", value=shots)
    return loaded


def quieten_libraries() -> None:
    """Silence notices of what is meant, as definitions and shots that are given, and bars within ours."""
    import datasets
    from tqdm import tqdm

    for name in ("lm_eval", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def sample(items: int, limit: int | None, seed: int) -> list[int] | None:
    """Return which items are evaluated, in order: the same for every model; `None`: all."""
    if limit is None or limit >= items:
        return None
    return sorted(random.Random(seed).sample(range(items), limit))


def _definition(name: str, file: Path) -> dict[str, Any]:
    import lm_eval.tasks

    return {
        "include": str(Path(lm_eval.tasks.__file__).parent / SETS[name].definition),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "training_split": None,
        "dataset_kwargs": {"data_files": {"validation": str(file.absolute())}},
    }


def _sum(rows: Iterable[Mapping[str, Any]], fields: Sequence[str]) -> str:
    """Return the SHA-256 of the fields of items, a line of JSON each."""
    found = hashlib.sha256()
    for row in rows:
        found.update((json.dumps([row.get(field) for field in fields], ensure_ascii=False) + "\n").encode())
    return found.hexdigest()


def _check(items: int, task: str, where: str) -> None:
    if items != SETS[task].items:
        raise TaskError(f"{where} has {items:,} items of {task}: the validation set has {SETS[task].items:,}")
