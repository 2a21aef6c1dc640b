"""Readers of run folders and checkpoints, and how what they accept is then used, as the programs do."""

import contextlib
import csv
import json
import os
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from common.console import make_console
from common.settings import parse
from data import Tokens, open_tokens
from evaluation.response_cache import ResponseCache
from evaluation.scores import Scores, score_key
from evaluation.table import print_scores
from experiments.paper.render import as_csv, fill_table, latex, markdown
from experiments.paper.tables_and_figures import STRATEGIES as SPECS
from experiments.paper.tables_and_figures import TABLES
from experiments.run.collect import ExpectedRun, Key, collect
from experiments.run.plot import draw_run
from experiments.run.read import read_run
from experiments.run.summary import summarise, table
from models.hugging_face import config_of, load
from models.llama import Llama
from tests.fuzz.attempts import run_program
from tests.helpers import CHECKOUT
from tests.scripts.loading import load_script
from training.checkpoint.format import fingerprint, is_valid, load_full, load_model_state, saved_config
from training.checkpoint.load import RunCheckpoint
from training.checkpoint.resume import prepare_start
from training.checkpoint.saved_config import check_same_run, config_of_run
from training.config.compose import read_config, saved_identity
from training.run_dir import RunDir

RUN = Path("runs", "main", "run")
RUN_FILES = ("config.yaml", "environment.json", "metrics.jsonl", "val_metrics.jsonl", "result.json", "rewinds.json",
             "job.json", "task_scores.json", "failure.txt")  # fmt: skip


def print_status(folder: Path, bases: Path, rng: random.Random) -> None:
    with_queue(folder)
    run_program("scripts/status.py", "folder=runs/main", cwd=folder)


def with_queue(folder: Path) -> None:
    """Let `squeue` be a program that lists one job."""
    squeue = folder / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho 123 RUNNING\n")
    squeue.chmod(0o755)
    os.environ["PATH"] = f"{squeue.parent}{os.pathsep}{os.environ['PATH']}"


def resume_run(folder: Path, bases: Path, rng: random.Random) -> None:
    run_program("train.py", f"resume={RUN}", cwd=folder)


def repeat_command(folder: Path, bases: Path, rng: random.Random) -> None:
    command = json.loads((bases / "stopped" / RUN / "environment.json").read_text())["starts"][-1]["command"]
    run_program("train.py", *command[1:], cwd=folder)


def fork_run(folder: Path, bases: Path, rng: random.Random) -> None:
    command = json.loads((bases / "stopped" / RUN / "environment.json").read_text())["starts"][-1]["command"]
    others = [word for word in command[1:] if not word.startswith("name=")]
    run_program("train.py", *others, "name=forked", f"fork_from={RUN}@16", "lr=1e-4", cwd=folder)


def export_run(folder: Path, bases: Path, rng: random.Random) -> None:
    run_program("scripts/export_hf.py", f"run={RUN}", "out=out", cwd=folder)
    config = config_of(folder / "out")
    model = Llama(config)
    load(model, folder / "out")


def read_run_dir(folder: Path, bases: Path, rng: random.Random) -> None:
    run_dir, config, tokens = RunDir(folder / RUN), *_whole(bases)
    config_of_run(run_dir)
    check_same_run(run_dir, config)
    run_dir.read_result()
    run_dir.data_folder(), run_dir.slurm_job(), run_dir.failure_reason(), run_dir.max_steps()
    with run_dir.acquire(config, tokens):
        start = prepare_start(run_dir, None, print)
        assert start.step in (0, 8, 16)
        json.dumps(run_dir.metrics_rows(), allow_nan=False)
        json.dumps(run_dir.val_metrics(), allow_nan=False)
        run_dir.write_rewinds([])
        run_dir.write_slurm_job("5")


@cache
def _whole(bases: Path) -> tuple[Any, Tokens]:
    """Return the configuration and the tokens of the run that the bases are copies of."""
    config = read_config(bases / "finished" / RUN / "config.yaml")
    name = RunDir(bases / "finished" / RUN).data_folder()
    assert name is not None
    return config, open_tokens(Path(config.paths.cache, name))


def read_finished_run(folder: Path, bases: Path, rng: random.Random) -> None:
    run = read_run(folder / RUN)
    run.environment, run.score("hellaswag")
    summary = summarise(run)
    json.dumps(summary, allow_nan=True)
    if run.result:
        make_console().print(table(run.result, "result"))
    if rng.random() < 0.3:
        draw_run(run)


def read_tables(folder: Path, bases: Path, rng: random.Random) -> None:
    collection = collect(_expected(bases, folder), saved_identity)
    filled = fill_table(TABLES["table3"], collection)
    texts = {"md": markdown(filled), "tex": latex(filled), "csv": as_csv(filled)}
    assert "\\input{" not in texts["tex"] and "\\write18" not in texts["tex"], texts["tex"]
    assert "<script>" not in texts["md"] and "\x1b" not in "".join(texts.values()), texts["md"]
    assert all(len(line.replace(r"\|", "").split("|")) > 2 for line in texts["md"].splitlines() if line.startswith("|"))
    list(csv.reader(texts["csv"].splitlines(), strict=True))
    "".join(texts.values()).encode()
    console = make_console()
    for warning in collection.warnings:
        console.print(warning)
    if rng.random() < 0.2:
        import experiments.paper.report as reports
        from experiments.claims.verdict import corrected, judge
        from experiments.paper.claims import PAPER_CLAIMS

        verdicts = corrected(judge(PAPER_CLAIMS, collection))
        page = reports.report(collection, verdicts, [TABLES["table3"]], {}, [], "micro", [], "made")
        page += reports.verdicts_markdown(collection, verdicts, "micro")
        assert "<script>planted" not in page
        page.encode()


@cache
def _expected_runs(bases: Path) -> dict[Key, tuple[Path, Any]]:
    folders = (bases / "tables").glob("runs/paper-micro/*/config.yaml")
    configs = {file.parent.name: yaml.safe_load(file.read_text()) for file in folders}
    return {
        (spec, seed): (Path("runs", "paper-micro", name), saved_identity(config))
        for name, config in configs.items()
        for spec in SPECS.values()
        for seed in (0, 1)
        if config["seed"] == seed and config["clip"]["name"] == spec.clip
    }


def _expected(bases: Path, folder: Path) -> dict[Key, ExpectedRun]:
    return {key: ExpectedRun(folder / path, identity) for key, (path, identity) in _expected_runs(bases).items()}


def read_scores(folder: Path, bases: Path, rng: random.Random) -> None:
    scores = Scores(folder / "task_scores.json")
    scores.find(score_key("hellaswag", 0, 100, 0, 24, "float32"))
    print_scores([{"run": "run", **score} for score in scores.all], make_console())
    print_scores([{"run": str(i), **score} for i, score in enumerate(scores.all)], make_console())
    cached = ResponseCache(scores.response_cache_path(24, "float32"), "m")
    for response in cached.responses.values():
        assert isinstance(response, str | float | tuple), response
    cached.add({"d" * 32: 1.0})
    scores.remove_after(30)
    scores.remove_after(8)
    scores.add(score_key("hellaswag", 0, 100, 0, 24, "float32"), {"items": 5, "acc": 0.1})


def read_checkpoint(folder: Path, bases: Path, rng: random.Random) -> None:
    path = folder / RUN / "checkpoints" / "step-00000016.ckpt"
    saved_config(path)
    checkpoint = RunCheckpoint(folder / RUN, 16, print)
    assert is_valid(path)
    fingerprint(path)
    load_evaluated(folder / RUN)
    checkpoint.tokenizer()
    state = load_model_state(path)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    load_full(path)


@cache
def evaluate_config() -> dict[str, Any]:
    """Return the settings of scripts/evaluate.py."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
        return OmegaConf.to_container(compose("evaluate", []), resolve=True)  # type: ignore[return-value]


def load_evaluated(run: Path) -> None:
    """Load the model of a run as scripts/evaluate.py does."""
    evaluate = load_script("evaluate")
    settings = {**evaluate_config(), "run": str(run), "device": "cpu"}
    with contextlib.ExitStack() as stack:
        (model,) = evaluate.run_models(parse(evaluate.EvaluateConfig, settings), make_console(), [], stack)
        model.fingerprint()
        with evaluate.skip_failures(model.title, 1, make_console(), []):
            model.load()
