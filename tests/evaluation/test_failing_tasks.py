"""A task that cannot be scored is one sentence, and does not end the tasks behind it."""

import io

import pytest
from rich.console import Console

from evaluation.config import EvalConfig
from evaluation.evaluator import EvaluatedModel, Evaluator
from evaluation.language_model import LlamaLM
from evaluation.response_cache import CachedLM
from evaluation.scores import Scores, score_task
from evaluation.tasks import TaskError
from tests.evaluation.known_models import CPU, Uniform


def failing(task: dict, error: Exception) -> dict:
    """Return a copy of a loaded task whose own code raises an error for each item."""

    def process_results(doc, results):
        raise error

    (name, inner), *_ = task["tasks"].items()
    inner.process_results = process_results
    return {**task, "tasks": {name: inner}}


@pytest.fixture
def evaluator(sets, tokenizer, tmp_path):
    """An evaluator of two tasks, of which the first one fails, with its model and its output."""
    output = io.StringIO()
    config = EvalConfig(tasks=["hellaswag", "winogrande"], limit=3)
    evaluator = Evaluator(config, "float32", [sets], Console(file=output, width=500), lambda: None)
    lm = LlamaLM(Uniform(tokenizer.size, []), tokenizer, CPU)
    model = EvaluatedModel("one", None, None, Scores(tmp_path / "scores.json"), lambda: "weights", lambda: lm)
    evaluator.load_tasks([model])
    failing(evaluator.tasks["hellaswag", 0], KeyError("answer"))
    return evaluator, model, output


def test_failing_task_is_reported_and_the_others_are_scored(evaluator):
    evaluator, model, output = evaluator
    assert [row["task"] for row in evaluator.score(model)] == ["winogrande"]
    assert evaluator.failed == ["hellaswag"]
    assert "skipped: one: eval.tasks=hellaswag cannot be scored (KeyError 'answer')" in output.getvalue()
    assert [score["task"] for score in Scores(model.scores.path).all] == ["winogrande"]


def test_failure_of_the_only_task_is_raised(evaluator):
    evaluator, model, _ = evaluator
    evaluator.config = EvalConfig(tasks=["hellaswag"], limit=3)
    with pytest.raises(TaskError, match=r"^eval\.tasks=hellaswag cannot be scored \(KeyError 'answer'\)$"):
        list(evaluator.score(model))


class Broken(LlamaLM):
    """A model that raises an error when it is asked."""

    def __init__(self, error: Exception, tokenizer) -> None:
        super().__init__(Uniform(tokenizer.size, []), tokenizer, CPU)
        self.error = error

    def loglikelihood(self, requests, **kwargs):
        raise self.error


@pytest.mark.parametrize("error", [AssertionError(), NotImplementedError("no generation"), ValueError("too long")])
def test_model_that_does_not_support_a_task_is_one_sentence(error, load, tokenizer):
    cached = CachedLM(Broken(error, tokenizer), {}, lambda new: None, lambda done, total: None)
    with pytest.raises(TaskError, match=rf"cannot be scored \(.*{error}\)"):
        score_task(cached, "winogrande", load("winogrande"), 3, 0)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), OSError("no device"), MemoryError()])
def test_faults_of_the_machine_are_no_faults_of_the_task(error, load, tokenizer):
    cached = CachedLM(Broken(error, tokenizer), {}, lambda new: None, lambda done, total: None)
    with pytest.raises(type(error)):
        score_task(cached, "winogrande", load("winogrande"), 3, 0)
