"""Scores on tasks of lm-eval: `python scripts/evaluate.py [run=runs/main] [eval.tasks=[hellaswag]] [eval.limit=500]`.

Each is kept as soon as it is known, in task_scores.json of the run folder; what is there is not done again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.pop(1)  # scripts/: there is a package named evaluate, which lm-eval loads for some tasks

from training.runtime.signals import install_handlers, reraise_pending

install_handlers()  # first: what follows takes seconds to load

import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import hydra
import torch
import yaml
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from training.config.rules import EVAL_RULES, Rule

from common.errors import RunError, UserError
from common.text import SECONDS_BETWEEN_LINES
from evaluation.response_cache import Answers, CachedLM
from evaluation.scores import Scores, score_key, score_task
from evaluation.table import show
from evaluation.tasks import TaskError, data_folders, load_tasks
from training.checkpoint.format import fingerprint
from training.checkpoint.load import DTYPES, RunCheckpoint
from training.config.checks import check_folder, check_rules, fewshot_list
from training.launch.cli import CANNOT_WRITE, command_line, reporting
from zclip.arguments import is_count

#: Endings of the files that make a Hugging Face model what it is.
FILES = (".safetensors", ".bin", ".json", ".model", ".txt")

#: Of the keys beside eval; a run may be a list.
_NAME = (lambda v: v is None or (isinstance(v, str) and v != ""), "a folder or name, or null")
RULES: dict[str, Rule] = {
    "run": (
        lambda v: v is None or all(isinstance(each, str) and each for each in (v if isinstance(v, list) else [v])),
        "a run folder, the folder of an experiment, or a list of such",
    ),
    "hf": _NAME,
    "out": _NAME,
    "paths.cache": (lambda v: isinstance(v, str) and v != "", "a folder"),
}


class Subject(NamedTuple):
    """What is evaluated.

    Attributes:
        title: for people.
        step: of a run; `None` of other models.
        model: tells one that is no run from others; `None` of runs.
        scores: where they are kept.
        of: returns what tells its weights from others.
        load: makes lm-eval's model of it.
    """

    title: str
    step: int | None
    model: str | None
    scores: Scores
    of: Callable[[], str]
    load: Callable[[], Any]


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Score what is not scored yet, and print all that was asked for."""
    with reporting():
        console = Console(soft_wrap=True, highlight=False, markup=False)
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # checkpoints are read without
        logging.getLogger().setLevel(logging.ERROR)  # of the hub's library and lm-eval
        shots = check(cfg)
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)
        try:
            failed: list[str] = []
            subjects = [hugging_face(cfg, device)] if cfg.hf else runs(cfg, device, console, failed)
            show(evaluate(cfg, subjects, shots, console, failed), console)
        except TaskError as error:
            raise UserError(str(error)) from error
        if failed:
            raise RunError(f"{len(failed)} of the runs were left out, see above")


def check(cfg: DictConfig) -> list[int]:
    """Return the numbers of solved examples that are asked for, or raise `UserError` if anything makes no sense."""
    given = cfg.eval
    check_rules(cfg, EVAL_RULES | RULES)
    for key in ("run", "step"):
        if cfg.hf is not None and cfg[key] is not None:
            raise UserError(f"{key}={cfg[key]} means nothing with hf={cfg.hf}: give one of them")
    if cfg.hf is None and cfg.out is not None:
        raise UserError(f"out={cfg.out} means nothing without hf: the scores of a run are in its task_scores.json")
    if cfg.run is None and cfg.hf is None:
        cfg.run = "runs/main"
    shots = fewshot_list(given)
    if given.data_dir is not None and not Path(given.data_dir).is_dir():
        raise UserError(f"eval.data_dir={given.data_dir} is not there: it must be a folder with the validation sets")
    if cfg.dtype not in DTYPES:
        raise UserError(f"dtype={cfg.dtype} is not allowed: it must be one of {', '.join(DTYPES)}")
    if cfg.device not in ("auto", "cpu", "cuda") or (cfg.device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"device={cfg.device} is not possible: it must be auto, cpu, or cuda where torch sees a GPU")
    if cfg.step is not None and not is_count(cfg.step):
        raise UserError(f"step={cfg.step} is not allowed: it must be an integer from 1, or null")
    return shots


def runs(cfg: DictConfig, device: torch.device, console: Console, failed: list[str]) -> list[Subject]:
    """Return the runs that the configuration names, each folder of an experiment being all the runs in it."""
    given = list(cfg.run) if isinstance(cfg.run, ListConfig) else [cfg.run]
    folders: list[Path] = []
    for path in map(Path, given):
        if not path.is_dir():
            raise UserError(f"run={path} is not there: it must be a run folder, or a folder of such")
        below = sorted(found.parent for found in path.glob("*/config.yaml"))
        if not (path / "config.yaml").is_file() and not below:
            raise UserError(f"run={path} is not a run folder: it must be one, with a config.yaml in it, or hold such")
        folders += [path] if (path / "config.yaml").is_file() else below
    folders = list({folder.resolve(): folder for folder in folders}.values())
    names = [folder.resolve().name for folder in folders]
    subjects = []
    for folder, name in zip(folders, names, strict=True):
        with tolerate_failures(str(folder), len(folders), console, failed):
            trained = RunCheckpoint(folder, cfg.step, console.print)
            check_folder("run", str(folder), folder)
            if trained.step != trained.max_steps and cfg.step is None:
                console.print(f"{folder} is not finished: this is {trained.description}", style="yellow")
            title = name if names.count(name) == 1 else str(folder)
            of = partial(fingerprint, trained.checkpoint)
            load = partial(load_run, cfg, trained, device)
            subjects.append(Subject(title, trained.step, None, Scores(folder / "task_scores.json"), of, load))
    if not subjects:
        raise UserError(f"run={cfg.run} is not possible: none of the {len(folders)} runs there can be evaluated")
    return subjects


@contextmanager
def tolerate_failures(title: str, many: int, console: Console, failed: list[str]) -> Iterator[None]:
    """Of many, go on without one that cannot be evaluated, and say so."""
    try:
        yield
    except (UserError, RunError, TaskError, OSError, KeyError, yaml.YAMLError, OmegaConfBaseException) as error:
        reraise_pending()
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            raise
        reason = " ".join(str(error).split())
        if not isinstance(error, UserError | RunError | TaskError):
            error = UserError(f"run={title} cannot be read ({type(error).__name__}: {reason})")
        if many == 1:
            raise error from None
        console.print(f"left out: {title}: {error}", style="yellow")
        failed.append(title)


def load_run(cfg: DictConfig, trained: RunCheckpoint, device: torch.device) -> Any:
    """Return the model of a run as lm-eval's."""
    from evaluation.language_model import LlamaLM
    from models import Llama

    with torch.device("meta"):
        model = Llama(trained.config)
    model.to_empty(device=device)
    model.tie_weights()
    model.load_state_dict(trained.model_state())
    return LlamaLM(model.to(DTYPES[cfg.dtype]).eval(), trained.tokenizer(), device, cfg.eval.batch_tokens)


def hugging_face(cfg: DictConfig, device: torch.device) -> Subject:
    """Return the Hugging Face model that the configuration names."""
    name, local = str(cfg.hf), Path(cfg.hf).is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"hf={name} is not there: it must be a folder, or a name on the Hugging Face hub")
    kept = Path(name) if local else Path(cfg.paths.cache, "eval", name.replace("/", "--"))
    path = kept / "task_scores.json" if cfg.out is None else Path(cfg.out)
    if path.is_dir():
        raise UserError(f"out={path} is a folder: it must be a file for the scores")
    check_folder("out" if cfg.out else "hf", str(path), path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = content(kept) if local else name

    def load() -> Any:
        from lm_eval.models.huggingface import HFLM

        try:
            return HFLM(pretrained=name, device=str(device), dtype=cfg.dtype, batch_size=16)
        except Exception as error:  # of the hub, of what is in the folder
            reason = " ".join(str(error).split())
            raise UserError(f"hf={name} cannot be loaded ({reason[:200]})") from error

    return Subject(name, None, model, Scores(path), lambda: model, load)


def content(folder: Path) -> str:
    """Return what tells the model and tokenizer in a folder from any other."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in FILES and path.name != "task_scores.json":
            found.update(path.name.encode())
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


def evaluate(
    cfg: DictConfig, subjects: list[Subject], shots: list[int], console: Console, failed: list[str]
) -> list[dict[str, Any]]:
    """Return the scores asked for, as rows of a table, those that are missing being found first."""
    given = cfg.eval
    folders = data_folders(given.data_dir, cfg.paths.cache)
    wanted = [(name, number) for name in dict.fromkeys(given.tasks) for number in dict.fromkeys(shots)]

    def key(subject: Subject, name: str, number: int) -> dict[str, Any]:
        return score_key(name, number, given.limit, given.seed, subject.step, cfg.dtype, subject.model)

    tasks = {
        (name, number): load_tasks(name, folders, number)
        for name, number in wanted
        if any(subject.scores.find(key(subject, name, number)) is None for subject in subjects)
    }
    rows: list[dict[str, Any]] = []
    for subject in subjects:
        model: Any = None
        with tolerate_failures(subject.title, len(subjects), console, failed):
            for name, number in wanted:
                found = subject.scores.find(key(subject, name, number))
                if found is None:
                    reraise_pending()
                    model = model or subject.load()
                    answers = Answers(subject.scores.answers(subject.step, cfg.dtype), f"{subject.of()} {cfg.dtype}")
                    began = time.monotonic()
                    before = getattr(model, "asked", 0), getattr(model, "cut", 0)
                    with progress(f"{subject.title}: {name}, {number} shots", console) as told:
                        remembering = CachedLM(model, answers.known, answers.add, told)
                        found = score_task(remembering, name, tasks[name, number], given.limit, given.seed)
                    if asked := getattr(model, "asked", 0) - before[0]:
                        found["cut_share"] = round((model.cut - before[1]) / asked, 4)
                    found["seconds"] = round(time.monotonic() - began, 1)
                    found = subject.scores.add(key(subject, name, number), found)
                    answers.forget()
                rows.append({"run": subject.title, **found})
    return rows


@contextmanager
def progress(title: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """Show how many requests are answered: a bar on a terminal, a line now and then elsewhere."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task(title, total=None)
        said = time.monotonic()

        def told(done: int, total: int) -> None:
            nonlocal said
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                console.print(f"{title}: {done:,} of {total:,} answers")

        yield told


if __name__ == "__main__":
    sys.exit(command_line(main))
