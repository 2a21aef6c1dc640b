"""How fast a run is scored, beside lm-eval's `hf` backend on the exported run: `python scripts/bench_eval.py run=...`.

The same items, in turns, in one process; the scores must be the same. `hf` gets the fastest of some batch sizes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.pop(1)  # scripts/: see evaluate.py

from training.runtime.signals import install_handlers

install_handlers()  # first: what follows takes seconds to load

import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table

from common.errors import UserError
from evaluation.language_model import LlamaLM
from evaluation.scores import score_task
from evaluation.tasks import TaskError, load_tasks
from models import Llama
from models.hugging_face import export
from training.checkpoint.load import RunCheckpoint
from training.launch.cli import command_line, reporting
from training.run_dir import environment

SETTINGS = {"run": None, "limit": 400, "rounds": 3, "data_dir": "cache/eval", "tasks": ["hellaswag", "winogrande"]}
BATCH_SIZES = (4, 16, 64)


def seconds(model: Any, task: str, loaded: dict[str, Any], items: int) -> tuple[float, dict[str, Any]]:
    """Return how long a model takes to answer what is asked of some items, and their scores.

    That lm-eval reads all items of a task to ask some of them is not counted; it is the same for every model.
    """
    answer, spent = model.loglikelihood, 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        began = time.perf_counter()
        found = answer(*args, **kwargs)
        spent += time.perf_counter() - began
        return found

    model.loglikelihood = timed
    try:
        found = score_task(model, task, loaded, items, seed=0)
    finally:
        del model.loglikelihood
    return spent, found


def main() -> None:
    """Measure, and print the ratios."""
    with reporting():
        cfg = OmegaConf.merge(SETTINGS, OmegaConf.from_cli(sys.argv[1:]))
        if unknown := set(map(str, cfg)) - set(SETTINGS):
            raise UserError(f"{', '.join(sorted(unknown))} is not known: there are {', '.join(SETTINGS)}")
        if cfg.run is None:
            raise UserError("run is not set: it must be a run folder, as run=runs/main/NAME")
        from lm_eval.models.huggingface import HFLM

        console = Console(highlight=False)
        warnings.filterwarnings("ignore")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        trained = RunCheckpoint(Path(cfg.run), None, console.print)
        tokenizer, weights = trained.tokenizer(), trained.model_state()
        model = Llama(trained.config).eval().to(device)
        model.load_state_dict(weights)
        ours = LlamaLM(model, tokenizer, device)
        with tempfile.TemporaryDirectory() as folder:
            export(weights, trained.config, Path(folder), tokenizer.end)
            tokenizer.save(Path(folder))
            theirs = HFLM(pretrained=folder, device=str(device), dtype="float32", batch_size=1)
        table = Table(
            title=f"{cfg.limit} items, {trained.config.parameters / 1e6:.1f}M parameters", title_justify="left"
        )
        for column in ("task", "hf's seconds / ours", "rounds", "hf's batch size", "acc, both"):
            table.add_column(column, justify="right")
        for task in cfg.tasks:
            try:
                loaded = load_tasks(task, [Path(cfg.data_dir)], 0)
            except TaskError as error:
                raise UserError(str(error)) from error
            tried = {}
            for size in BATCH_SIZES:
                theirs.batch_size_per_gpu = size
                tried[size] = seconds(theirs, task, loaded, max(1, cfg.limit // 4))[0]
            theirs.batch_size_per_gpu = min(tried, key=tried.__getitem__)
            ratios = []
            for _ in track(range(cfg.rounds), task, console=console):
                mine, scores = seconds(ours, task, loaded, cfg.limit)
                other, their_scores = seconds(theirs, task, loaded, cfg.limit)
                if scores != their_scores:
                    raise RuntimeError(f"{task}: {scores} is not {their_scores}")
                ratios.append(other / mine)
            spread = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            size = str(theirs.batch_size_per_gpu)
            table.add_row(task, f"{statistics.median(ratios):.2f}", spread, size, f"{scores['acc']:.4f}")
        console.print(table)
        about = environment()
        versions = " ".join(f"{name} {about['versions'][name]}" for name in ("python", "torch"))
        console.print(f"{about['device']}, {versions}, commit {about['commit']}")


if __name__ == "__main__":
    sys.exit(command_line(main))
