"""Scores on tasks of lm-eval: `python scripts/evaluate.py [run=runs/main] [eval.tasks=[hellaswag]] [eval.limit=500]`.

Each is kept as soon as it is known, in eval.json of the run folder; what is there is not done again.
"""

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from omegaconf import DictConfig, ListConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.pop(1)  # scripts/: there is a package named evaluate, which lm-eval loads for some tasks

from evaluation.answers import Remembering
from evaluation.scores import KEY, Scores, key_of, score_task
from evaluation.tasks import TaskError, data_folders, load_tasks
from training.cli import command_line, reporting
from training.config import ConfigError, check_folder, check_rules, shots_of
from training.processes import RunError
from training.rules import EVAL_RULES
from training.streams import SECONDS_BETWEEN_LINES
from training.trained import DTYPES, Trained
from zclip.base import is_count

#: What a score has beside its metrics.
OTHERS = {"run", *KEY, "items", "task_version", "seconds", "versions", "date"}


class Subject(NamedTuple):
    """What is evaluated.

    Attributes:
        title: for people.
        step: of a run; `None` of other models.
        scores: where they are kept.
        load: makes lm-eval's model of it.
    """

    title: str
    step: int | None
    scores: Scores
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
            subjects = [hugging_face(cfg, device)] if cfg.hf else runs(cfg, device, console)
            show(evaluate(cfg, subjects, shots, console), console)
        except TaskError as error:
            raise ConfigError(str(error)) from error


def check(cfg: DictConfig) -> list[int]:
    """Return the numbers of solved examples that are asked for, or raise `ConfigError` if anything makes no sense."""
    given = cfg.eval
    check_rules(cfg, EVAL_RULES)
    shots = shots_of(given)
    if given.data_dir is not None and not Path(given.data_dir).is_dir():
        raise ConfigError(f"eval.data_dir={given.data_dir} is not there: it must be a folder with the validation sets")
    if cfg.dtype not in DTYPES:
        raise ConfigError(f"dtype={cfg.dtype} is not allowed: it must be one of {', '.join(DTYPES)}")
    if cfg.device not in ("auto", "cpu", "cuda") or (cfg.device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device={cfg.device} is not possible: it must be auto, cpu, or cuda where torch sees a GPU")
    if cfg.step is not None and not is_count(cfg.step):
        raise ConfigError(f"step={cfg.step} is not allowed: it must be an integer from 1, or null")
    return shots


def runs(cfg: DictConfig, device: torch.device, console: Console) -> list[Subject]:
    """Return the runs that the configuration names, each folder of an experiment being all the runs in it."""
    given = list(cfg.run) if isinstance(cfg.run, ListConfig) else [cfg.run]
    folders: list[Path] = []
    for path in map(Path, given):
        if not path.is_dir():
            raise ConfigError(f"run={path} is not there: it must be a run folder, or a folder of such")
        below = sorted(found.parent for found in path.glob("*/config.yaml"))
        if not (path / "config.yaml").is_file() and not below:
            raise ConfigError(f"run={path} is not a run folder: it must be one, with a config.yaml in it, or hold such")
        folders += [path] if (path / "config.yaml").is_file() else below
    subjects = []
    for folder in dict.fromkeys(folders):
        try:
            trained = Trained(folder, cfg.step, say=console.print)
        except (ConfigError, RunError) as error:
            if len(folders) == 1:
                raise
            console.print(f"left out: {error}", style="yellow")
            continue
        if trained.step != trained.steps:
            console.print(f"{folder} is not finished: this is {trained.told}", style="yellow")
        load = partial(load_run, cfg, trained, device)
        subjects.append(Subject(folder.name, trained.step, Scores(folder / "eval.json"), load))
    if not subjects:
        raise ConfigError(f"run={cfg.run} is not possible: none of the {len(folders)} runs there can be evaluated")
    return subjects


def load_run(cfg: DictConfig, trained: Trained, device: torch.device) -> Any:
    """Return the model of a run as lm-eval's."""
    from evaluation.language_model import RunModel
    from models import Llama

    with torch.device("meta"):
        model = Llama(trained.config)
    model.to_empty(device=device)
    model.tie_weights()
    model.load_state_dict(trained.weights())
    return RunModel(model.to(DTYPES[cfg.dtype]).eval(), trained.tokenizer(), device, cfg.eval.batch_tokens)


def hugging_face(cfg: DictConfig, device: torch.device) -> Subject:
    """Return the Hugging Face model that the configuration names."""
    name, local = str(cfg.hf), Path(cfg.hf).is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(f"hf={name} is not there: it must be a folder, or a name on the Hugging Face hub")
    kept = Path(name) if local else Path(cfg.paths.cache, "eval", name.replace("/", "--"))
    path = kept / "eval.json" if cfg.out is None else Path(cfg.out)
    check_folder("out" if cfg.out else "hf", str(path), path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)

    def load() -> Any:
        from lm_eval.models.huggingface import HFLM

        try:
            return HFLM(pretrained=name, device=str(device), dtype=cfg.dtype, batch_size=16)
        except Exception as error:  # of the hub, of what is in the folder
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"hf={name} cannot be loaded ({reason})") from error

    return Subject(name, None, Scores(path), load)


def evaluate(cfg: DictConfig, subjects: list[Subject], shots: list[int], console: Console) -> list[dict[str, Any]]:
    """Return the scores asked for, as rows of a table, those that are missing being found first."""
    given = cfg.eval
    folders = data_folders(given.data_dir, cfg.paths.cache)
    tasks: dict[tuple[str, int], Any] = {}
    rows: list[dict[str, Any]] = []
    for subject in subjects:
        model: Any = None
        for name in given.tasks:
            for number in shots:
                key = key_of(name, number, given.limit, given.seed, subject.step, cfg.dtype)
                found = subject.scores.find(key)
                if found is None:
                    if (name, number) not in tasks:
                        tasks[name, number] = load_tasks(name, folders, number)
                    model = model or subject.load()
                    answers = subject.scores.path.with_name(f".eval-{subject.step or 0}-{cfg.dtype}.jsonl")
                    began = time.monotonic()
                    with progress(f"{subject.title}: {name}, {number} shots", console) as told:
                        remembering = Remembering(model, answers, told)
                        found = score_task(remembering, name, tasks[name, number], given.limit, given.seed)
                    found = subject.scores.add(key, {**found, "seconds": round(time.monotonic() - began, 1)})
                    answers.unlink(missing_ok=True)
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


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the scores with their standard errors; shares in percent."""
    metrics = list(dict.fromkeys(name for row in rows for name in row if name not in OTHERS and "_stderr" not in name))
    several = len({row["run"] for row in rows}) > 1
    table = Table(title="± standard error" if several else f"{rows[0]['run']}, ± standard error", title_justify="left")
    names = [f"{metric} %" if _is_share(metric) else metric for metric in metrics]
    for column in (*(["run"] if several else []), "task", "shots", "items", *names):
        table.add_column(column, justify="left" if column in ("run", "task") else "right", overflow="fold")
    for row in rows:
        drawn = row["limit"] is not None and row["items"] >= row["limit"]
        table.add_row(
            *([row["run"]] if several else []),
            row["task"],
            str(row["shots"]),
            f"{row['items']:,}" + (" drawn" if drawn else ""),
            *(_shown(row, metric) for metric in metrics),
        )
    console.print(table, soft_wrap=False)


def _is_share(metric: str) -> bool:
    return metric.startswith(("acc", "exact_match", "f1"))


def _shown(row: dict[str, Any], metric: str) -> str:
    if metric not in row:
        return ""
    times = 100 if _is_share(metric) else 1
    error = row.get(f"{metric}_stderr")
    return f"{times * row[metric]:.2f}" + ("" if error is None else f" ± {times * error:.2f}")


if __name__ == "__main__":
    sys.exit(command_line(main))
