"""Score runs with lm-eval: `python scripts/evaluate.py [run=runs/main] [eval.tasks=[hellaswag]] [eval.limit=500]`.

Each score is saved as soon as it is computed, in task_scores.json of the run folder, and not computed again.

    python scripts/evaluate.py run=runs/main/NAME eval.limit=500
    python scripts/evaluate.py hf=my-model eval.tasks=[hellaswag]
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import yaml
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, model_validator
from rich.console import Console

from common.console import make_console
from common.errors import ConfigError, RunError, UserError, one_line
from common.files import is_local
from common.settings import Allowed, Count, Folder, Settings, parse
from data import CacheConfig
from evaluation.config import EvalConfig
from evaluation.evaluator import EvaluatedModel, Evaluator, hugging_face_model
from evaluation.scores import SCORES, Scores
from evaluation.table import print_scores
from evaluation.tasks import TaskError, check_data_dir, data_folders
from models.config import WeightDtype
from scripts._held import held
from training.checkpoint.format import fingerprint
from training.checkpoint.load import DTYPES
from training.config.checks import check_folder
from training.launch.cli import CANNOT_WRITE
from training.runtime.signals import reraise_pending

_Name = Annotated[Folder | None, Allowed("a folder or name, or null")]


class EvaluateConfig(Settings):
    """What configs/evaluate.yaml sets."""

    run: Annotated[
        Folder | Annotated[list[Folder], Field(min_length=1)] | None,
        Allowed("a run folder, the folder of an experiment, or a list of such"),
    ]
    """Run folder, folder of an experiment, or a list of them; null without `hf`: runs/main."""
    hf: _Name
    """Folder or name of a Hugging Face model, evaluated instead of runs."""
    step: Count | None
    """Step of a run's checkpoint; null: the last one."""
    out: _Name
    """File for the scores of `hf`; null: task_scores.json in its folder, or for a name in <cache>/eval."""
    device: str
    """cpu or cuda; auto: cuda if torch sees a GPU."""
    dtype: WeightDtype
    """Data type of the weights."""
    eval: EvalConfig
    paths: CacheConfig

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for key, value in (("run", self.run), ("step", self.step)):
            if self.hf is not None and value is not None:
                raise ConfigError(key, value, problem=f"means nothing with hf={self.hf}: give one of them")
        if self.hf is None and self.out is not None:
            problem = f"means nothing without hf: the scores of a run are in its {SCORES}"
            raise ConfigError("out", self.out, problem=problem)
        if self.device not in ("auto", "cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            allowed = "it must be auto, cpu, or cuda where torch sees a GPU"
            raise ConfigError("device", self.device, problem=f"is not possible: {allowed}")
        check_data_dir(self.eval.data_dir, self.eval.tasks)
        return self

    @property
    def torch_device(self) -> torch.device:
        """The device, with `auto` resolved."""
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(auto if self.device == "auto" else self.device)


def main(values: _entry.Values) -> None:
    """Compute the scores that are missing, and print all that the configuration asks for."""
    config = parse(EvaluateConfig, values)
    console = make_console()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # reading checkpoints needs none
    logging.getLogger().setLevel(logging.ERROR)  # of lm-eval and the hub's library
    with ExitStack() as stack:
        _evaluate(config, console, stack)


def _evaluate(config: EvaluateConfig, console: Console, stack: ExitStack) -> None:
    skipped: list[str] = []
    models = run_models(config, console, skipped, stack) if config.hf is None else [exported_model(config, config.hf)]
    folders = data_folders(config.eval.data_dir, config.paths.cache)
    evaluator = Evaluator(config.eval, config.dtype, folders, console, before_task=reraise_pending)
    evaluator.load_tasks(models)
    rows: list[dict[str, Any]] = []
    for model in models:
        with skip_failures(model.title, len(models), console, skipped):
            for row in evaluator.score(model):
                rows.append(row)  # kept if a later task fails
    print_scores(rows, console)
    if skipped:
        raise RunError(f"{len(skipped)} of the runs were skipped, see above")
    if evaluator.failed:
        raise RunError(f"{', '.join(dict.fromkeys(evaluator.failed))} could not be scored, see above")


def run_models(config: EvaluateConfig, console: Console, skipped: list[str], stack: ExitStack) -> list[EvaluatedModel]:
    """Return the models of the configured runs; the folder of an experiment stands for all runs in it.

    The checkpoints are kept until `stack` is closed.
    """
    folders: list[Path] = []
    for path in map(Path, config.run if isinstance(config.run, list) else [config.run or "runs/main"]):
        if not path.is_dir():
            raise ConfigError("run", path, problem="does not exist: it must be a run folder, or a folder of such")
        inside = sorted(file.parent for file in path.glob("*/config.yaml"))
        if not (path / "config.yaml").is_file() and not inside:
            problem = "is not a run folder: it must be one, with a config.yaml in it, or hold such"
            raise ConfigError("run", path, problem=problem)
        folders += [path] if (path / "config.yaml").is_file() else inside
    folders = list({folder.resolve(): folder for folder in folders}.values())
    names = [folder.resolve().name for folder in folders]
    models = []
    for folder, name in zip(folders, names, strict=True):
        with skip_failures(str(folder), len(folders), console, skipped):
            title = name if names.count(name) == 1 else str(folder)
            models.append(run_model(config, folder, title, console, stack))
    if not models:
        problem = f"is not possible: none of the {len(folders)} runs there can be evaluated"
        raise ConfigError("run", config.run or "runs/main", problem=problem)
    return models


def run_model(config: EvaluateConfig, folder: Path, title: str, console: Console, stack: ExitStack) -> EvaluatedModel:
    """Return the model of a run."""
    checkpoint = stack.enter_context(held(folder, config.step, console.print))
    check_folder("run", str(folder), folder)
    if checkpoint.step != checkpoint.max_steps and config.step is None:
        console.print(f"{folder} is not finished: this is {checkpoint.description}", style="yellow")

    def load() -> Any:
        from evaluation.language_model import LlamaLM
        from models import Llama
        from models.parallel import materialize

        with torch.device("meta"):
            model = Llama(checkpoint.config)
        materialize(model, config.torch_device)
        model.load_state_dict(checkpoint.model_state())
        model = model.to(DTYPES[config.dtype]).eval()
        return LlamaLM(model, checkpoint.tokenizer(), config.torch_device, config.eval.batch_tokens)

    weights = partial(fingerprint, checkpoint.checkpoint)
    return EvaluatedModel(title, checkpoint.step, None, Scores(folder / SCORES), weights, load)


def exported_model(config: EvaluateConfig, name: str) -> EvaluatedModel:
    """Return the configured Hugging Face model."""
    is_folder = Path(name).is_dir()
    if not is_folder and is_local(name):
        allowed = "it must be a folder, or owner/name on the Hugging Face hub"
        raise ConfigError("hf", name, problem=f"does not exist: {allowed}")
    folder = Path(name) if is_folder else Path(config.paths.cache, "eval", name.replace("/", "--"))
    path = folder / SCORES if config.out is None else Path(config.out)
    if path.is_dir():
        raise ConfigError("out", path, problem="is a folder: it must be a file for the scores")
    check_folder("out" if config.out else "hf", str(path), path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return hugging_face_model(name, path, str(config.torch_device), config.dtype)
    except TaskError as error:
        if config.out is None:
            raise
        raise ConfigError("out", path, problem="is there, and no file of scores: choose another") from error


@contextmanager
def skip_failures(title: str, count: int, console: Console, skipped: list[str]) -> Iterator[None]:
    """Report and skip a run that cannot be evaluated, if it is one of several."""
    try:
        yield
    except (UserError, RunError, OSError, KeyError, yaml.YAMLError, OmegaConfBaseException) as error:
        reraise_pending()
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            raise
        if not isinstance(error, UserError | RunError):
            error = UserError(f"run={title} cannot be read ({type(error).__name__}: {one_line(error)})")
        if count == 1:
            raise error from None
        console.print(f"skipped: {title}: {error}", style="yellow")
        skipped.append(title)


if __name__ == "__main__":
    _entry.run(main, "evaluate")
