"""Groups and tags of tasks: each has one score of its own, or is refused before any work."""

import json

import lm_eval.tasks
import pytest

from evaluation.language_model import LlamaLM
from evaluation.scores import score_task
from evaluation.tasks import TaskError, load_tasks
from tests.evaluation.known_models import CPU, Uniform

TASK = """
task: {name}
tag: both_tagged
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def definitions(tmp_path, monkeypatch):
    """Two tasks with a tag, a group with a score and one without."""
    for name in ("one", "two"):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps({"question": f"{name}?", "choices": ["a", "b"], "answer": 0}) + "\n")
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, file=file))
    (tmp_path / "scored.yaml").write_text(
        "group: scored\ntask: [one, two]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    (tmp_path / "plain.yaml").write_text("group: plain\ntask: [one, two]\n")
    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda **_: manager(include_path=str(tmp_path), include_defaults=False)
    )


def test_group_has_the_score_of_its_tasks(definitions, tokenizer):
    model = LlamaLM(Uniform(tokenizer.size, []), tokenizer, CPU)
    score = score_task(model, "scored", load_tasks("scored", [], 0), limit=None, seed=0)
    assert score["items"] == 2 and score["acc"] in (0.0, 0.5, 1.0)


@pytest.mark.parametrize(("name", "kind"), [("both_tagged", "a tag"), ("plain", "a group")])
def test_tasks_without_a_common_score_are_refused_before_any_work(name, kind, definitions):
    with pytest.raises(TaskError) as error:
        load_tasks(name, [], 0)
    assert str(error.value) == f"eval.tasks={name} is {kind} that has no score of its own: name its tasks, [one,two]"
