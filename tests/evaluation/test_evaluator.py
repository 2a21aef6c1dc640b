"""The evaluator: missing scores are computed and saved, and an interrupted evaluation resumes."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from common.errors import UserError
from evaluation.config import EvalConfig
from evaluation.evaluator import EvaluatedModel, Evaluator, hugging_face_model
from evaluation.language_model import LlamaLM
from evaluation.response_cache import ResponseCache
from evaluation.scores import Scores, score_key
from tests.evaluation.known_models import CPU, Uniform

#: Requests about all items of WinoGrande.
ALL = 1267 * 2
#: Tokens of the model's context, which some items exceed.
CONTEXT = 32


class Interrupted(KeyboardInterrupt):
    """Ends an evaluation from outside."""


class Setup:
    """A model whose tokens are equally likely, with what an evaluation does to it."""

    def __init__(self, folder: Path, sets: Path, tokenizer) -> None:
        self.path, self.sets, self.tokenizer = folder / "task_scores.json", sets, tokenizer
        self.loads: list[LlamaLM] = []
        self.before_task: list[str] = []
        self.interrupt_after = ALL

    def score(self, fingerprint: str = "these", name: str | None = None, **settings) -> list[dict]:
        config = EvalConfig(**{"tasks": ["winogrande"], **settings})
        console = Console(file=io.StringIO())
        evaluator = Evaluator(config, "float32", [self.sets], console, lambda: self.before_task.append("task"))
        model = EvaluatedModel("main/one", 20, name, Scores(self.path), lambda: fingerprint, self._load)
        evaluator.load_tasks([model])
        self.loaded_tasks = list(evaluator.tasks)
        return list(evaluator.score(model))

    def _load(self) -> LlamaLM:
        setup = self

        class Interruptible(LlamaLM):
            def loglikelihood(self, requests, **kwargs):
                if self.num_texts >= setup.interrupt_after:
                    raise Interrupted
                return super().loglikelihood(requests)

        model = Uniform(self.tokenizer.size, [], context=CONTEXT)
        self.loads.append(Interruptible(model, self.tokenizer, CPU))
        return self.loads[-1]


@pytest.fixture
def setup(sets, tokenizer, tmp_path) -> Setup:
    return Setup(tmp_path, sets, tokenizer)


def test_only_missing_scores_are_computed_and_all_are_saved(setup):
    (score,) = setup.score(limit=5)
    assert (score["run"], score["task"], score["step"], score["items"]) == ("main/one", "winogrande", 20, 5)
    assert score["drawn"] and score["seconds"] >= 0 and score["versions"]["lm_eval"]
    assert setup.score(limit=5) == [score], "it is in the file"
    assert len(setup.loads) == len(setup.before_task) == 1 and setup.loaded_tasks == []

    first, *new = setup.score(limit=5, num_fewshot=[0, 1, 2])
    assert first == score and [score["num_fewshot"] for score in new] == [1, 2]
    assert setup.loaded_tasks == [("winogrande", 1), ("winogrande", 2)]
    assert len(setup.before_task) == 3 and len(setup.loads) == 2, "both use one model"
    (other,) = setup.score(limit=5, seed=1)
    assert other["seed"] == 1 and len(setup.loads) == 3
    (of_another,) = setup.score(name="another", limit=5)
    assert of_another["model"] == "another" and len(setup.loads) == 4
    saved = [{"run": "main/one", **score} for score in json.loads(setup.path.read_text())["scores"]]
    assert saved == [score, *new, other, of_another]
    assert [path.name for path in setup.path.parent.iterdir() if path.suffix == ".jsonl"] == []


def test_score_is_of_the_model_in_whose_file_it_is(setup):
    score = score_key("winogrande", 0, None, 0, 20, "float32") | {"items": 5, "acc": 0.5, "run": "main/two"}
    setup.path.write_text(json.dumps({"scores": [score]}))
    assert [row["run"] for row in setup.score()] == ["main/one"]


def test_fraction_of_truncated_texts_is_saved(setup):
    (score,) = setup.score(limit=40)
    (model,) = setup.loads
    assert 0 < model.num_truncated < model.num_texts == 80
    assert score["truncated_fraction"] == round(model.num_truncated / 80, 4)


def test_models_that_share_a_file_of_scores_share_no_responses(tmp_path):
    scores = Scores(tmp_path / "both.json")
    first, second = (ResponseCache(scores.response_cache_path(None, "float32", name), name) for name in ("a/b", "a/c"))
    for cache, answer in ((first, -1.0), (second, -2.0), (first, -3.0)):
        cache.add({f"request{answer}": (answer, True)})
    assert ResponseCache(second.path, "a/c").responses == {"request-2.0": (-2.0, True)}


@pytest.mark.parametrize("fingerprint, recomputed", [("these", ALL - 1024), ("others", ALL)])
def test_interrupted_evaluation_resumes_with_the_same_weights_only(setup, fingerprint, recomputed):
    setup.interrupt_after = 1024
    with pytest.raises(Interrupted):
        setup.score()
    assert not setup.path.exists() and setup.loads[0].num_texts == 1024
    setup.interrupt_after = ALL
    (score,) = setup.score(fingerprint)
    assert setup.loads[1].num_texts == recomputed and score["items"] * 2 == ALL
    used = setup.loads if recomputed < ALL else setup.loads[1:]
    assert score["truncated_fraction"] == round(sum(model.num_truncated for model in used) / ALL, 4) > 0


def test_hugging_face_model_is_identified_by_its_model_files(tmp_path):
    def identity(name: str = str(tmp_path)) -> str:
        model = hugging_face_model(name, tmp_path / "task_scores.json", "cpu", "float32")
        assert model.step is None and model.fingerprint() == model.model
        return model.model

    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer.json").write_text("{}")
    before = identity()
    (tmp_path / "README.md").write_text("not a part of the model")
    (tmp_path / "task_scores.json").write_text('{"scores": []}')
    assert identity() == before
    (tmp_path / "tokenizer.json").write_text("{ }")
    changed = identity()
    (tmp_path / "tokenizer.json").rename(tmp_path / "vocabulary.json")
    assert len({before, changed, identity()}) == 3
    assert identity("a name on the hub") == "a name on the hub"
    scores = tmp_path / "scores.json"
    before = hugging_face_model(str(tmp_path), scores, "cpu", "float32").model
    scores.write_text('{"scores": []}')
    assert hugging_face_model(str(tmp_path), scores, "cpu", "float32").model == before


def test_hugging_face_model_that_cannot_be_loaded_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text("{")
    model = hugging_face_model(str(tmp_path), tmp_path / "task_scores.json", "cpu", "float32")
    with pytest.raises(UserError, match=r"^hf=.* cannot be loaded \(.*\)$"):
        model.load()
