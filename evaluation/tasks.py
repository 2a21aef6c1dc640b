"""Tasks as lm-eval defines them, with data from the Hugging Face hub or from files.

The paper evaluates on HellaSwag and WinoGrande. Their validation sets can be files with the fields of the hub's data: a
task definition then includes lm-eval's own and names the file. The task `last_word` is ours, with its own data.
"""

import glob
import hashlib
import json
import logging
import lzma
import random
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from common.errors import ConfigError, UserError, one_line
from common.reading import MOST_LINE, parse_json
from evaluation import last_word

#: Seed of the draw of solved examples, lm-eval's own default.
FEWSHOT_SEED = 1234


class TaskData(NamedTuple):
    """The validation set of a task, in a file that ends in .jsonl or .jsonl.xz.

    The definition is lm-eval's, relative to its tasks/. The checksum is that of the fields that the task reads, each
    item as a line of JSON.
    """

    file: str
    items: int
    definition: str
    fields: tuple[str, ...]
    sha256: str


SETS = {
    "hellaswag": TaskData(
        "hellaswag_validation",
        10_042,
        "hellaswag/hellaswag.yaml",
        ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label"),
        "36e3f0e62544e3c058f4119fa6e89946b7eeec86e1ad9d2d9d60fab4c09df7ba",
    ),
    "winogrande": TaskData(
        "winogrande_xl_validation",
        1_267,
        "winogrande/default.yaml",
        ("sentence", "option1", "option2", "answer"),
        "fb0e0cbbf2b63cf3c95f89ac3ab58eba8889cd7cdb7b1744c6e24e8572e37f36",
    ),
}

DATA_SOURCES = (
    "they come from the Hugging Face hub where it can be reached, from a folder given as eval.data_dir= with "
    "hellaswag_validation.jsonl and winogrande_xl_validation.jsonl (or .jsonl.xz), or from `make eval-data`"
)


class TaskError(UserError):
    """A task is unknown, its data cannot be loaded, or a model has no score on it; the message is one sentence."""


def data_file(folder: Path, task: str) -> Path | None:
    """Return the validation set of a task in a folder; `None` if there is none.

    Raises:
        TaskError: it cannot be read, or has not the items that were published. Of some lines that are no objects,
            the library that reads the items later does not only fail: it ends the process.
    """
    for path in _candidates(folder, task):
        if path.is_file():
            try:
                with lzma.open(path, "rb") if path.suffix == ".xz" else path.open("rb") as lines:
                    _check_lines(iter(partial(lines.readline, MOST_LINE), b""), task, path)
            except (OSError, EOFError, lzma.LZMAError) as error:
                raise TaskError(f"{path} cannot be read ({error}): remove it, and get it again") from error
            return path
    return None


def _check_lines(lines: Iterable[bytes], task: str, path: Path) -> None:
    """Raise `TaskError` unless lines of JSON are the items of the published validation set of a task."""
    items, problem, digest = 0, "", hashlib.sha256()
    fields = SETS[task].fields
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        items += 1
        try:
            item = parse_json(line)
            if not (isinstance(item, dict) and item.keys() >= {*fields}):
                raise ValueError(f"not an object with {', '.join(fields)}")
            digest.update(_line_of(item, fields))
        except ValueError as error:
            problem = problem or f"line {number}: {one_line(error, 200)}"
    _check_count(items, task, str(path))
    if problem:
        raise TaskError(f"{path} is damaged ({problem}): remove it, and get it again")
    _check_digest(digest.hexdigest(), task, str(path))


def data_folders(data_dir: str | None, cache: str) -> list[Path]:
    """Return the folder of the validation sets: `data_dir`, or if it is null where scripts/eval_data.py writes them."""
    return [Path(cache, "eval") if data_dir is None else Path(data_dir)]


def check_data_dir(data_dir: str | None, tasks: Sequence[str], key: str = "eval.data_dir") -> None:
    """Raise `ConfigError` unless `data_dir` is null, or a folder with the validation set of each task that has one.

    `key` is the name of the setting.
    """
    if data_dir is None:
        return
    folder, problem = Path(data_dir), ""
    try:
        if not folder.is_dir():
            problem = "is a file" if folder.exists() else "does not exist"
        for task in dict.fromkeys(task for task in tasks if task in SETS):
            if not problem and not any(path.is_file() for path in _candidates(folder, task)):
                problem = f"has no {SETS[task].file}.jsonl, and no {SETS[task].file}.jsonl.xz"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    if problem:
        allowed = "it must be a folder with the validation sets of the tasks"
        raise ConfigError(key, data_dir, problem=f"{problem}: {allowed}")


def _candidates(folder: Path, task: str) -> list[Path]:
    """Return the files that the validation set of a task may be in."""
    return [folder / f"{SETS[task].file}{suffix}" for suffix in (".jsonl", ".jsonl.xz")]


@cache
def check_names(names: tuple[str, ...]) -> None:
    """Raise `TaskError` unless each name is that of a task, group or tag. No data is loaded."""
    others = [name for name in names if name not in SETS and name != last_word.NAME]
    if not others:
        return
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    for name in others:
        if name not in known:
            raise _unknown(name)


def _unknown(name: str) -> TaskError:
    tasks = f"(`lm-eval ls tasks`), or {last_word.NAME}"
    return TaskError(f"eval.tasks={name} is not known: it must be a task of lm-eval {tasks}")


def load_tasks(name: str, folders: Sequence[Path], num_fewshot: int) -> dict[str, Any]:
    """Return a task, or the tasks of a group, as lm-eval's `evaluate` takes them.

    The folders are searched for the validation sets of HellaSwag and WinoGrande, and `last_word` has data of its own.
    All other data comes from the hub. Solved examples are drawn from the training set; with data from files, from the
    other items.

    Raises:
        ConfigError: a task has fewer solved examples than `num_fewshot`.
        TaskError: the task is unknown, or its data cannot be loaded.
    """
    import datasets
    from lm_eval.tasks import TaskManager

    # Silence what lm-eval and the hub's libraries log about settings that are intended, and their progress bars.
    for library in ("lm_eval", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it logs as errors, it raises too
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # each opening of a local file would send a request
    file = next((path for folder in folders if (path := data_file(folder, name))), None) if name in SETS else None
    is_of_lm_eval = file is None and name != last_word.NAME
    try:
        manager = TaskManager(include_defaults=is_of_lm_eval)
        if is_of_lm_eval and name not in manager.all_tasks:
            raise _unknown(name)
        with tempfile.TemporaryDirectory() as temporary:
            definition = name
            if name == last_word.NAME:
                definition = str(last_word.write_task(Path(temporary)))
            elif file is not None:
                definition = str(_write_definition(name, file, Path(temporary)))
            loaded: Any = manager.load([definition])
    except TaskError:
        raise
    except Exception as error:  # from the hub, its libraries, or definitions that need more packages
        sources = f": {DATA_SOURCES}" if name in SETS else ""
        is_generic = isinstance(error, datasets.exceptions.DatasetGenerationError)  # the reason is in its cause
        reason = one_line(error.__cause__ if is_generic and error.__cause__ else error, 200)
        raise TaskError(f"the data of eval.tasks={name} cannot be loaded ({reason}){sources}") from error
    if name not in loaded["tasks"]:
        group = loaded["groups"].get(name)
        if group is None or not group.aggregate_metric_list:
            tasks = ",".join(loaded["tasks"])
            kind = "a tag" if group is None else "a group"
            raise TaskError(f"eval.tasks={name} is {kind} that has no score of its own: name its tasks, [{tasks}]")
    for task_name, task in loaded["tasks"].items():
        if task_name in SETS:
            _check_published(task_name, task, str(file or "the hub"))
        _check_num_fewshot(task_name, task, num_fewshot)
        task.set_config(key="num_fewshot", value=num_fewshot)
    return loaded


def _check_num_fewshot(name: str, task: Any, num_fewshot: int) -> None:
    """Raise `ConfigError` if a task has fewer solved examples, without the item that is evaluated."""
    from lm_eval.api.task import ConfigurableTask

    if num_fewshot == 0 or not isinstance(task, ConfigurableTask):
        return
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    item = task.eval_docs[0] if task.fewshot_cfg.split == task.config.test_split else None  # as in `fewshot_context`

    def can_draw(number: int) -> bool:
        try:
            return len(task.sampler.sample(n=number, eval_doc=item)) == number
        except (AssertionError, AttributeError, ValueError):  # as samplers raise them, or a task without a sampler
            return False

    if not can_draw(num_fewshot):
        most = bisect_left(range(num_fewshot), True, key=lambda number: not can_draw(number + 1))
        allowed = f"at most {most:,} for {name}, which has no more solved examples"
        raise ConfigError("eval.num_fewshot", num_fewshot, allowed)


def sample(items: int, limit: int | None, seed: int) -> list[int] | None:
    """Return the indices of the items to evaluate, sorted, the same for every model; `None`: all items."""
    if limit is None or limit >= items:
        return None
    return sorted(random.Random(seed).sample(range(items), limit))


def _write_definition(name: str, file: Path, temporary: Path) -> Path:
    """Write the definition of a task with data from a file to a folder that is there while the task is loaded."""
    import lm_eval.tasks

    definition = {
        "include": str(Path(lm_eval.tasks.__file__).parent / SETS[name].definition),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "training_split": None,
        "dataset_kwargs": _data_files(file.absolute(), temporary),
    }
    path = temporary / f"{name}.yaml"
    path.write_text(yaml.safe_dump(definition))
    return path


def _data_files(file: Path, temporary: Path) -> dict[str, Any]:
    """Return the arguments with which `datasets` reads a file: it takes a path for a pattern, or for a URL.

    Only patterns can be escaped. Another file gets a link in the temporary folder, and its items stay in memory.
    """
    if not {":", "\\"} & {*str(file)}:
        return {"data_files": {"validation": glob.escape(str(file))}}
    link = temporary / f"validation{''.join(file.suffixes)}"
    link.symlink_to(file)
    files = {"validation": glob.escape(str(link))}
    return {"data_files": files, "cache_dir": str(temporary), "keep_in_memory": True}


def _check_published(name: str, task: Any, source: str) -> None:
    """Raise `TaskError` unless a task's items are those of the published validation set."""
    _check_count(len(task.eval_docs), name, source)
    digest = hashlib.sha256()
    for row in task.dataset["validation"]:
        digest.update(_line_of(row, SETS[name].fields))
    _check_digest(digest.hexdigest(), name, source)


def _line_of(item: Mapping[str, Any], fields: Sequence[str]) -> bytes:
    """Return the fields of an item as a line of JSON."""
    return (json.dumps([item.get(field) for field in fields], ensure_ascii=False) + "\n").encode()


def _check_digest(digest: str, task: str, source: str) -> None:
    if digest != SETS[task].sha256:
        raise TaskError(
            f"{source} has other items than the validation set of {task} as it was published "
            f"(sha256 {digest[:12]}): get it again"
        )


def _check_count(items: int, task: str, source: str) -> None:
    if items != SETS[task].items:
        raise TaskError(f"{source} has {items:,} items of {task}: the validation set has {SETS[task].items:,}")
