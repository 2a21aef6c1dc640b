"""Compare the speed of LlamaLM with lm-eval's `hf` backend on the exported run: `python scripts/bench_eval.py run=...`.

Both score the same items in turns in one process, and their scores must be equal. `hf` gets the fastest batch size.

    python scripts/bench_eval.py run=runs/main/NAME
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from rich.progress import track

from common.console import make_console
from common.settings import Allowed, Count, Folder, Settings, parse
from evaluation.language_model import LlamaLM
from evaluation.scores import score_task
from evaluation.tasks import check_data_dir, data_folders, load_tasks
from models import Llama
from models.hugging_face import export
from scripts._bench import DEVICE, numbers_table
from training.checkpoint.load import RunCheckpoint
from training.runtime.environment import environment

BATCH_SIZES = (4, 16, 64)


class BenchEvalConfig(Settings):
    """Settings of the command line."""

    run: Folder
    """Run folder."""
    limit: Count = 400
    """Items of each task."""
    rounds: Count = 3
    """Measurements of each task."""
    data_dir: Folder | None = None
    """Folder with the validation sets; null: from `make eval-data`, or the hub."""
    tasks: Annotated[list[str], Allowed("a list of tasks, as [hellaswag]")] = Field(
        ["hellaswag", "winogrande"], min_length=1
    )
    """Names of tasks in lm-eval."""

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        check_data_dir(self.data_dir, self.tasks, key="data_dir")
        return self


def main(values: _entry.Values) -> None:
    """Measure, and print the ratios."""
    config = parse(BenchEvalConfig, values)
    from lm_eval.models.huggingface import HFLM

    console = make_console(soft_wrap=False)
    warnings.filterwarnings("ignore")
    checkpoint = RunCheckpoint(Path(config.run), None, console.print)
    tokenizer, weights = checkpoint.tokenizer(), checkpoint.model_state()
    model = Llama(checkpoint.config).eval().to(DEVICE)
    model.load_state_dict(weights)
    llama_lm = LlamaLM(model, tokenizer, torch.device(DEVICE))
    with tempfile.TemporaryDirectory() as folder:
        export(weights, checkpoint.config, Path(folder), tokenizer.end)
        tokenizer.save(Path(folder))
        hf_lm = HFLM(pretrained=folder, device=DEVICE, dtype="float32", batch_size=1)
    title = f"{config.limit} items, {checkpoint.config.parameters / 1e6:.1f}M parameters"
    table = numbers_table(title, "task", "hf's seconds / ours", "rounds", "hf's batch size", "acc, both")
    folders = data_folders(config.data_dir, "cache")
    for task in config.tasks:
        loaded = load_tasks(task, folders, 0)
        seconds = {}
        for size in BATCH_SIZES:
            hf_lm.batch_size_per_gpu = size
            seconds[size] = measure(hf_lm, task, loaded, max(1, config.limit // 4))[0]
        hf_lm.batch_size_per_gpu = min(seconds, key=seconds.__getitem__)
        ratios = []
        for _ in track(range(config.rounds), task, console=console):
            our_seconds, scores = measure(llama_lm, task, loaded, config.limit)
            hf_seconds, hf_scores = measure(hf_lm, task, loaded, config.limit)
            if scores != hf_scores:
                raise RuntimeError(f"{task}: {scores} is not {hf_scores}")
            ratios.append(hf_seconds / our_seconds)
        rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        table.add_row(
            task, f"{statistics.median(ratios):.2f}", rounds, str(hf_lm.batch_size_per_gpu), f"{scores['acc']:.4f}"
        )
    console.print(table)
    machine = environment()
    versions = " ".join(f"{name} {machine['versions'][name]}" for name in ("python", "torch"))
    console.print(f"{machine['device']}, {versions}, commit {machine['commit']}")


def measure(model: Any, task: str, loaded: dict[str, Any], items: int) -> tuple[float, dict[str, Any]]:
    """Return the seconds that a model takes to compute the responses for some items of a task, and their scores.

    The time in which lm-eval reads all items of the task is not counted; it is the same for every model.
    """
    loglikelihood, seconds = model.loglikelihood, 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal seconds
        start = time.perf_counter()
        responses = loglikelihood(*args, **kwargs)
        seconds += time.perf_counter() - start
        return responses

    model.loglikelihood = timed
    scores = score_task(model, task, loaded, items, seed=0)
    del model.loglikelihood
    return seconds, scores


if __name__ == "__main__":
    _entry.run(main)
