"""Metrics are plain numbers: a fresh score is what is read from the file."""

import io
import json
import math
import os
import re

import numpy as np
import pytest
import torch
import yaml
from lm_eval.api import metrics
from lm_eval.filters import build_filter_ensemble
from lm_eval.tasks import TaskManager
from rich.console import Console

from evaluation.language_model import LlamaLM
from evaluation.scores import Scores, score_key, score_task
from evaluation.table import metrics_of, print_scores
from evaluation.tasks import TaskError
from tests.evaluation.known_models import CPU, Oracle


@pytest.fixture
def group(tmp_path) -> dict:
    """Return a loaded group of two tasks of local data, with four and two items."""
    for name, answers in (("four", [0, 1, 1, 1]), ("two", [0, 1])):
        rows = [{"question": "Which", "answer": answer} for answer in answers]
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
        files = {"data_files": {"validation": f"{tmp_path}/{name}.json"}}
        task = {
            "task": name, "dataset_path": "json", "dataset_kwargs": files,
            "validation_split": "validation", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
            "doc_to_choice": ["first", "second"], "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    metrics = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "both", "task": ["four", "two"], "aggregate_metric_list": metrics}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    return TaskManager(include_path=str(tmp_path), include_defaults=False).load(["both"])


@pytest.fixture
def first(tokenizer) -> LlamaLM:
    """Return a model that always answers `first`: it scores 1 of 4 and 1 of 2 on the tasks of `group`."""
    return LlamaLM(Oracle(tokenizer.size, [tokenizer.tokenizer.encode("Which first").ids]), tokenizer, CPU)


def test_group_score_is_the_mean_of_its_tasks(group, first):
    results = score_task(first, "both", group, None, 0)
    assert results["items"] == 6 and results["acc"] == pytest.approx(2 / 6) and not results["drawn"]


def shown(score: dict) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_scores([{"run": "one", **score}], console)
    return console.file.getvalue()


def test_fresh_scores_are_shown_as_those_read_from_the_file(group, first, tmp_path):
    """lm-eval computes the error of a group and its mean weighted by size with NumPy."""
    results = score_task(first, "both", group, None, 0)
    assert {type(results[name]) for name in ("acc", "acc_stderr")} == {float}
    fresh = Scores(tmp_path / "scores.json").add(score_key("both", 0, None, 0, 20, "float32"), results)
    (stored,) = Scores(tmp_path / "scores.json").all
    assert stored == fresh and {*metrics_of([fresh])} == {"acc"} and shown(fresh) == shown(stored)
    assert re.search(r"33\.33 ± \d+\.\d\d", shown(fresh))


def test_metric_of_a_filter_is_shown_with_its_error(group, first):
    """As `exact_match,strict-match` of gsm8k; both names are lm-eval's own."""
    for task in group["tasks"].values():
        task._filters = [build_filter_ensemble("strict-match", [["take_first", None]])]
    results = score_task(first, "four", {**group, "tasks": {"four": group["tasks"]["four"]}, "groups": {}}, None, 0)
    score = {**score_key("four", 0, None, 0, 20, "float32"), **results}
    assert metrics_of([score]) == ["acc,strict-match"] and results["acc_stderr,strict-match"] == 0.25
    assert "acc,strict-match %" in shown(score) and "25.00 ± 25.00" in shown(score)


def test_bootstrap_prints_nothing_and_is_lm_evals(group, first, capfd, monkeypatch):
    """The error of a perplexity is bootstrapped. The model's own lines, and errors of the metric, are not hidden."""
    task = group["tasks"]["four"]
    task.process_results = lambda item, results: {"ppl": -float(item["answer"])}
    task.aggregation = lambda: {"ppl": metrics.perplexity}
    loaded = {**group, "tasks": {"four": task}, "groups": {}}
    names = {**vars(metrics)}
    monkeypatch.setattr(first, "loglikelihood", lambda requests: print("asked") or [(0.0, True) for _ in requests])
    results = score_task(first, "four", loaded, None, 0)
    assert capfd.readouterr().out == "asked\n" and vars(metrics) == names and "DISABLE_MULTIPROC" not in os.environ
    assert results["ppl_stderr"] == metrics.bootstrap_stderr(metrics.perplexity, [0.0, -1.0, -1.0, -1.0], 1000)
    monkeypatch.setattr(task, "aggregation", lambda: {"ppl": lambda items: 1 / 0})
    with pytest.raises(TaskError, match="ZeroDivisionError"):
        score_task(first, "four", loaded, None, 0)
    assert vars(metrics) == names


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.5), 0.5), (np.float32(0.25), 0.25), (np.int64(3), 3), (np.array(2.5), 2.5), (np.bool_(True), 1),
        (torch.tensor(0.5), 0.5), (torch.tensor([2], dtype=torch.int32), 2), (4, 4), (1e300, 1e300),
        (math.nan, None), (np.float64(math.inf), None), (10**400, None), ("N/A", None), (np.ones(2), None),
        (torch.ones(2), None), (None, None),
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_numbers_of_every_library_become_plain(value, expected, group, first):
    """A task's own code may return any of them as its metric."""
    for task in group["tasks"].values():
        task.aggregation = lambda: {"acc": lambda items: value}
    results = score_task(first, "four", {**group, "tasks": {"four": group["tasks"]["four"]}, "groups": {}}, None, 0)
    assert results.get("acc") == expected and type(results.get("acc")) is type(expected)
    assert json.loads(json.dumps(results)) == results
