"""Evaluations during training: their results on any number of processes, and that they do not change training."""

import errno
import io
import json
import math
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.filters import build_filter_ensemble
from rich.console import Console

from common.errors import ConfigError
from data import TokenDataset, load_tokenizer, open_tokens
from data.tokenizer import train_tokenizer
from tests.evaluation.known_models import Uniform
from tests.helpers import (
    CHECKOUT,
    FSDP,
    SLOW,
    TWO,
    compose_config,
    copy_run,
    only_run,
    read_jsonl,
    start,
    train,
    train_to_end,
    wait_for_steps,
)
from training.config.compose import read_config
from training.run_dir import RunDir
from training.validation.loss import LossValidator, ValidationSet, bits_per_byte
from training.validation.report import EvaluationReport
from training.validation.tasks import TaskEvaluator, load_run_tasks

#: Requests that are computed before their responses are saved.
SAVED_AT_ONCE = 16

#: train.py, which saves fewer responses at once, and waits with the first of them until the test removes a file.
HELD = """
import runpy
import sys
import time
from pathlib import Path

from evaluation import response_cache

add = response_cache.ResponseCache.add


def add_and_wait(self, responses):
    add(self, responses)
    while Path("held").exists():
        time.sleep(0.005)


response_cache.REQUESTS_PER_SAVE = int(sys.argv.pop(1))
response_cache.ResponseCache.add = add_and_wait
sys.argv.pop(0)
sys.path[0] = sys.argv[0].removesuffix("/train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def settings(tiny: tuple[str, ...]) -> tuple[str, ...]:
    every = ("trainer.val_every=10", "trainer.val_tokens=3000", "trainer.checkpoint_every=10", "trainer.log_every=1")
    return (*tiny, *every)


@pytest.fixture(scope="module")
def tasks(sets: Path) -> tuple[str, ...]:
    tasks = ("trainer.eval_every=20", "eval.tasks=[winogrande]", "eval.limit=12", f"eval.data_dir={sets}")
    return (*tasks, "model.max_position_embeddings=128")


@pytest.fixture(scope="module")
def validated_run(settings, tasks, once) -> Path:
    """Return the folder of a run that evaluates on held-out text and on a task."""
    return only_run(once("validated", lambda folder: train_to_end(*settings, *tasks, "name=x", cwd=folder)))


def test_evaluations_leave_training_unchanged(validated_run, finished_run):
    assert losses(validated_run) == losses(finished_run)
    rows = read_jsonl(validated_run / "val_metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30]
    for row in rows:
        assert row["val_tokens"] == 3000 // 64 * 64
        assert row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"]))
    assert rows[0]["val_loss"] > rows[2]["val_loss"]
    scores = json.loads((validated_run / "task_scores.json").read_text())["scores"]
    assert [score["step"] for score in scores] == [20, 40], "also after the last step"
    assert {(score["task"], score["items"]) for score in scores} == {("winogrande", 12)}
    results = [json.loads((run / "result.json").read_text()) for run in (validated_run, finished_run)]
    assert results[0]["test_loss"] == results[1]["test_loss"]
    assert not (finished_run / "val_metrics.jsonl").exists()
    assert read_jsonl(validated_run / "metrics.jsonl")[10]["evaluation_seconds"] > 0


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(run / "metrics.jsonl")]


@pytest.mark.parametrize("change", ["removed", "cut", "linked"])
def test_results_that_others_remove_are_written_again(change, validated_run, tmp_path):
    """A link is replaced, and not followed."""
    run_dir = RunDir(copy_run(validated_run, tmp_path))
    before = run_dir.val_metrics()
    config = read_config(run_dir.config_file)
    console = Console(quiet=True)
    tokens = open_tokens(Path(config.paths.cache) / str(run_dir.data_folder()))
    held_out = ValidationSet(TokenDataset(tokens.test, 64), 4, 640, console)
    validator = LossValidator(run_dir, config.trainer, held_out, 1000.0, EvaluationReport(console, []))
    validator.start(20)
    if change == "cut":
        run_dir.val_metrics_file.write_bytes(run_dir.val_metrics_file.read_bytes()[:-30] + b"\0\0")
    else:
        run_dir.val_metrics_file.unlink()
    if change == "linked":
        (tmp_path / "precious").write_text("precious")
        run_dir.val_metrics_file.symlink_to(tmp_path / "precious")
    validator.validate(30, lambda validation_set: 4.0)
    assert run_dir.val_metrics()[:2] == before[:2] and run_dir.val_metrics()[2]["val_loss"] == 4.0
    assert change != "linked" or (tmp_path / "precious").read_text() == "precious"


def test_evaluations_are_the_same_on_two_processes(validated_run, settings, tasks, tmp_path):
    done = train(*settings, *tasks, *FSDP, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    other_run = only_run(tmp_path)
    for row, other in zip(*(read_jsonl(run / "val_metrics.jsonl") for run in (validated_run, other_run)), strict=True):
        assert (row["step"], row["val_tokens"]) == (other["step"], other["val_tokens"])
        assert row["val_loss"] == pytest.approx(other["val_loss"], abs=1e-5)
    scores = [json.loads((run / "task_scores.json").read_text())["scores"] for run in (validated_run, other_run)]
    for score, other in zip(*scores, strict=True):
        assert [score[name] for name in ("step", "task", "items")] == [
            other[name] for name in ("step", "task", "items")
        ]
        assert abs(score["acc"] - other["acc"]) <= 1 / 12, "they differ by rounding"
    results = [json.loads((run / "result.json").read_text()) for run in (validated_run, other_run)]
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], abs=1e-5)


def test_evaluation_whose_file_cannot_be_written_is_reported_and_logged():
    output, logged = io.StringIO(), []
    report = EvaluationReport(Console(file=output, soft_wrap=True), [lambda *row: logged.append(row)])
    with report.tolerate_io_errors():
        raise OSError(errno.ENOSPC, "No space left on device")
    report.report(10, "val loss 5", {"val_loss": 5.0})
    with pytest.raises(ValueError, match="another"), report.tolerate_io_errors():
        raise ValueError("another")
    first, second = output.getvalue().splitlines()
    assert first.startswith("AN EVALUATION COULD NOT BE WRITTEN: [Errno 28] No space left") and "continues" in first
    assert second == "after step 10: val loss 5" and logged == [(10, {"val_loss": 5.0})]


@pytest.mark.parametrize("killed_after", [(25,), SLOW((10, 20, 25))])
def test_killed_run_has_each_evaluation_once(killed_after, validated_run, settings, tmp_path):
    settings = (*settings, "name=x", "model.max_position_embeddings=128")
    path = tmp_path / "runs" / "main" / "x"
    for steps in killed_after:
        job = start(*settings, cwd=tmp_path)
        wait_for_steps(job, tmp_path, steps)
        job.kill()
        job.wait()
    with (path / "val_metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "test_lo')
    done = train(*settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_jsonl(path / "val_metrics.jsonl") == read_jsonl(validated_run / "val_metrics.jsonl")


def test_signal_during_task_evaluation_saves_and_resumes(settings, sets, tmp_path):
    (tmp_path / "held.py").write_text(HELD)
    (tmp_path / "held").touch()
    overrides = (
        *settings, "trainer.val_every=null", "trainer.eval_every=20", "eval.tasks=[hellaswag]", "name=x",
        "eval.limit=12", f"eval.data_dir={sets}", "trainer.checkpoint_every=40", "model.max_position_embeddings=128",
    )  # fmt: skip
    program = {"program": str(tmp_path / "held.py"), "PYTHONPATH": str(CHECKOUT)}
    job = start(str(SAVED_AT_ONCE), str(CHECKOUT / "train.py"), *overrides, cwd=tmp_path, **program)
    folder = tmp_path / "runs" / "main" / "x"
    while not (files := list(folder.glob(".task_scores-20-*"))) or len(files[0].read_bytes().splitlines()) < 17:
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    job.terminate()
    (tmp_path / "held").unlink()
    output = job.communicate(timeout=100)
    assert job.returncode == 128 + signal.SIGTERM, output
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000020.ckpt"], output
    assert len(files[0].read_bytes().splitlines()) == 1 + SAVED_AT_ONCE, "it stopped before all items were scored"
    (folder / "task_scores.json").write_text("{")
    done = train(*overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "task_scores.json is damaged (" in done.stdout and "It is renamed to damaged-" in done.stdout
    scores = json.loads((folder / "task_scores.json").read_text())["scores"]
    assert [(score["step"], score["dtype"], score["items"]) for score in scores] == [
        (20, "float32", 12), (40, "float32", 12),
    ]  # fmt: skip
    assert not list(folder.glob(".task_scores-*.jsonl"))


@pytest.mark.slow
def test_run_killed_in_the_last_evaluation_of_tasks_repeats_it(validated_run, settings, tasks, tmp_path):
    path = copy_run(validated_run, tmp_path)
    scores = json.loads((path / "task_scores.json").read_text())["scores"]
    for name in ("task_scores.json", "result.json"):
        (path / name).unlink()
    done = train(*settings, *tasks, "name=x", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = json.loads((path / "task_scores.json").read_text())["scores"]
    assert [(score["step"], score["acc"]) for score in again] == [(40, scores[1]["acc"])]
    assert not list(path.glob(".task_scores-*.jsonl"))


def test_processes_share_all_sequences_and_bytes_are_those_of_the_text(finished_run, cache):
    result = json.loads((finished_run / "result.json").read_text())
    folder = cache / json.loads((finished_run / "environment.json").read_text())["starts"][0]["data_folder"]
    tokens, tokenizer = open_tokens(folder), load_tokenizer(str(folder))
    sequences = TokenDataset(tokens.test, 64)
    quiet = Console(quiet=True)
    for processes in (1, 2, 3):
        shares = [ValidationSet(sequences, 4, 40 * 64, quiet, rank, processes) for rank in range(processes)]
        assert len({len(share) for share in shares}) == 1
        assert sum(tokens for share in shares for _, tokens in share) == 40 * 64
    text = tokenizer.tokenizer.decode(tokens.test.read(1, result["test_tokens"] + 1).tolist(), skip_special_tokens=True)
    size = tokens.held_out_bytes(1, result["test_tokens"] + 1)
    assert size == pytest.approx(len(text.encode()), abs=50), "except for part of the last document"
    assert result["test_bits_per_byte"] == bits_per_byte(result["test_loss"], result["test_tokens"], size)
    assert bits_per_byte(math.log(2) * 8, 100, 100) == pytest.approx(8.0)
    assert np.isfinite(result["test_bits_per_byte"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.val_every=0", "trainer.val_every=0 is not allowed: it must be an integer from 1, or null"),
        ("eval.tasks=winogrande", "eval.tasks=winogrande is not allowed: it must be a list of tasks, as [hellaswag]"),
    ],
)
def test_mistakes_are_refused(override, message, settings):
    with pytest.raises(ConfigError) as error:
        compose_config(*settings, override)
    assert str(error.value).startswith(message)


@pytest.mark.slow
def test_unknown_task_is_refused_before_any_work(settings, refusal, checked, tmp_path, monkeypatch):
    """Before text is tokenized: with `last_word`, which lm-eval does not have, and without evaluations in training."""
    monkeypatch.chdir(tmp_path)
    fresh = (*settings, f"paths.cache={tmp_path / 'cache'}")
    line = refusal(*fresh, "trainer.eval_every=5", "eval=micro", "eval.tasks=[last_word,nothing]")
    assert line.startswith("train.py: error: eval.tasks=nothing is not known: it must be a task of lm-eval (`lm-eval")
    checked(*fresh, "trainer.eval_every=5", "eval=micro")
    checked(*fresh, "trainer.eval_every=null", "eval.tasks=[nothing]")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data_dir", "problem"),
    [
        ("nowhere", "does not exist"),
        ("file", "is a file"),
        (".", "has no winogrande_xl_validation.jsonl, and no winogrande_xl_validation.jsonl.xz"),
    ],
)
def test_data_dir_without_the_sets_is_refused_before_any_work(
    data_dir, problem, settings, refusal, checked, sets, tmp_path, monkeypatch
):
    """Also if the cache has them. The folder is not looked at if no task is scored while the run trains."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "eval").symlink_to(sets)
    fresh = (*settings, f"paths.cache={tmp_path / 'cache'}", "eval.tasks=[winogrande]", f"eval.data_dir={data_dir}")
    allowed = "it must be a folder with the validation sets of the tasks"
    line = refusal(*fresh, "trainer.eval_every=5")
    assert line == f"train.py: error: eval.data_dir={data_dir} {problem}: {allowed}"
    config, _ = checked(*fresh)
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"eval_every": 5})})
    with pytest.raises(ConfigError, match=r"^eval\.data_dir="):  # a process of it may be on another machine
        load_run_tasks(config)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "cache"}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [(), (*TWO, "trainer.strategy=ddp")])
def test_task_without_data_is_refused_before_the_text_is_tokenized(processes, settings, tmp_path):
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "winogrande_xl_validation.jsonl").write_text("{}\n")
    fresh = (*settings, *processes, "paths.cache=cache", "trainer.eval_every=10", "eval.tasks=[winogrande]")
    done = train(*fresh, "eval.data_dir=sets", cwd=tmp_path)
    assert done.returncode == 2
    line = "sets/winogrande_xl_validation.jsonl has 1 items of winogrande: the validation set has 1,267"
    assert done.stderr.splitlines()[-1] == f"train.py: error: {line}"
    assert not (tmp_path / "cache").exists() and not [*(tmp_path / "runs").glob("*/*/metrics.jsonl")]


def test_more_solved_examples_than_there_are_are_refused_before_any_work(tmp_path):
    config = compose_config("trainer.eval_every=5", "eval.tasks=[last_word]", "eval.num_fewshot=[0,1728]")
    with pytest.raises(ConfigError) as error:
        load_run_tasks(config)
    allowed = "it must be at most 1,727 for last_word, which has no more solved examples"
    assert str(error.value) == f"eval.num_fewshot=1728 is not allowed: {allowed}"


def evaluate_last_words(
    limit: int, tmp_path: Path, filter_name: str = "none", error: Exception | None = None, settings: tuple = ()
) -> tuple[str, dict]:
    """Score a uniform model on some last words twice after a step; return what is printed, and what is logged.

    The first filter has a name. An error is raised by the task's own code.
    """
    chosen = ("eval=micro", "eval.tasks=[last_word]", f"eval.limit={limit}")
    config = compose_config("trainer.eval_every=5", *chosen, *settings)
    tokenizer = train_tokenizer(["the union of the states"], 300)
    output, logged = io.StringIO(), {}
    report = EvaluationReport(Console(file=output, soft_wrap=True), [lambda step, numbers: logged.update(numbers)])
    tasks = load_run_tasks(config)

    def fail(item: dict, results: list) -> dict:
        raise error

    for task in (loaded["tasks"]["last_word"] for loaded in tasks.values()):
        task._filters = [build_filter_ensemble(filter_name, [["take_first", None]])]
        if error is not None:
            task.process_results = fail
    evaluator = TaskEvaluator(RunDir(tmp_path), config, tasks, tokenizer, lambda: False, report)
    for _ in range(2):  # as after the last step
        evaluator.evaluate(5, Uniform(tokenizer.size, []), torch.device("cpu"))
    return output.getvalue(), logged


def scored_last_words(limit: int, tmp_path: Path, filter_name: str = "none") -> tuple[dict, str, dict]:
    """Return a uniform model's score on some last words during training, what is printed, and what is logged."""
    printed, logged = evaluate_last_words(limit, tmp_path, filter_name)
    (score,) = json.loads((tmp_path / "task_scores.json").read_text())["scores"]
    return score, printed, logged


def test_task_that_cannot_be_scored_after_a_step_is_reported_once(tmp_path):
    printed, logged = evaluate_last_words(3, tmp_path, error=KeyError("word"))
    message = "after step 5: last_word: eval.tasks=last_word cannot be scored (KeyError 'word')"
    assert [line for line in printed.splitlines() if "answers" not in line] == [message] and logged == {}


def test_score_of_a_single_item_is_shown_without_a_standard_error(tmp_path):
    score, printed, logged = scored_last_words(1, tmp_path)
    assert f"after step 5: last_word (0 shots, 1 items): loss {score['loss']:.4g}, acc 0\n" in printed
    assert logged == {"last_word/loss": score["loss"], "last_word/acc": 0.0}


def test_metric_of_a_filter_is_printed_and_logged_with_its_standard_error(tmp_path):
    score, printed, logged = scored_last_words(3, tmp_path, "first")
    loss, error = score["loss,first"], score["loss_stderr,first"]
    assert f"(0 shots, 3 items): loss,first {loss:.4g} ± {error:.2g}, acc,first 0 ± 0\n" in printed
    names = ("loss,first", "loss_stderr,first", "acc,first", "acc_stderr,first")
    assert logged == dict(zip((f"last_word/{name}" for name in names), (loss, error, 0.0, 0.0), strict=True))


def test_scores_with_several_numbers_of_solved_examples_are_logged_by_number(tmp_path):
    _, logged = evaluate_last_words(3, tmp_path, settings=("eval.num_fewshot=[0,2]",))
    scores = json.loads((tmp_path / "task_scores.json").read_text())["scores"]
    assert {name: value for name, value in logged.items() if name.endswith("/loss")} == {
        f"last_word_{score['num_fewshot']}_shots/loss": score["loss"] for score in scores
    }
    assert len(scores) == 2
