"""Scores from end to end, of oracle, inverted-oracle and uniform models, and computed by hand."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance

from common.errors import UserError
from evaluation.language_model import LlamaLM
from evaluation.response_cache import CachedLM, ResponseCache
from evaluation.scores import Scores, quarantine, score_key, score_task
from evaluation.tasks import TaskError, sample
from models import Llama, LlamaConfig
from tests import gloo_pool
from tests.evaluation.conftest import HELLASWAG_ITEMS, items
from tests.evaluation.known_models import CPU, Oracle, Recorder, Uniform

LIMIT = 100


def cleaned(text: str) -> str:
    """A text of HellaSwag without the markup of its source."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def hellaswag(item: dict) -> tuple[str, list[str], int]:
    """Context, endings, and the index of the right one."""
    context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    return cleaned(context), [" " + cleaned(ending) for ending in item["endings"]], int(item["label"])


def winogrande(item: dict) -> tuple[list[str], str, int]:
    """The two contexts, the continuation, and the index of the right context."""
    begin, end = item["sentence"].split("_")
    return [begin + item["option1"], begin + item["option2"]], " " + end.strip(), int(item["answer"]) - 1


def texts(task: str, item: dict, right: bool) -> list[str]:
    """Texts of an item with the right answer, or with the wrong ones."""
    if task == "hellaswag":
        context, endings, gold = hellaswag(item)
        return [context + ending for number, ending in enumerate(endings) if (number == gold) == right]
    contexts, end, gold = winogrande(item)
    return [context + end for number, context in enumerate(contexts) if (number == gold) == right]


@pytest.mark.parametrize("task", ["hellaswag", "winogrande"])
@pytest.mark.parametrize("right", [True, False])
def test_oracle_scores_one_and_inverted_oracle_zero(task, right, sets, load, tokenizer):
    all_items = items(sets, task)[: len(load(task)["tasks"][task].eval_docs)]
    drawn = [all_items[index] for index in sample(len(all_items), LIMIT, seed=0) or ()]
    known = [tokenizer.tokenizer.encode(text).ids for item in drawn for text in texts(task, item, right)]
    oracle = LlamaLM(Oracle(tokenizer.size, known), tokenizer, CPU)
    results = score_task(oracle, task, load(task), LIMIT, seed=0)
    assert results["items"] == LIMIT
    for metric in ("acc", "acc_norm") if task == "hellaswag" else ("acc",):
        assert results[metric] == (1.0 if right else 0.0)


def test_uniform_model_scores_at_chance(sets, load, tokenizer):
    uniform = LlamaLM(Uniform(tokenizer.size, []), tokenizer, CPU)
    results = score_task(uniform, "winogrande", load("winogrande"), None, seed=0)
    answers = [item["answer"] for item in items(sets, "winogrande")]
    assert results.keys() == {"items", "drawn", "task_version", "acc", "acc_stderr"}
    assert results["items"] == 1267 and results["acc"] == answers.count("1") / 1267, "the first option wins all ties"
    assert results["acc_stderr"] == pytest.approx(math.sqrt(results["acc"] * (1 - results["acc"]) / 1266))
    results = score_task(uniform, "hellaswag", load("hellaswag"), None, seed=0)
    assert results["items"] == HELLASWAG_ITEMS
    assert abs(results["acc"] - 0.25) < 0.05 and abs(results["acc_norm"] - 0.25) < 0.05


def test_metrics_equal_those_computed_by_hand(sets, load, tokenizer):
    """Two items of each task, from the logits of a real model alone."""
    torch.manual_seed(0)
    model = Llama(
        LlamaConfig(
            vocab_size=tokenizer.size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,
        )
    ).eval()

    def likelihood(context: str, continuation: str) -> float:
        full, before = (tokenizer.tokenizer.encode(text).ids for text in (context + continuation, context))
        with torch.no_grad():
            log_p = model(torch.tensor([full]))[0].log_softmax(-1)
        return sum(float(log_p[at - 1, full[at]]) for at in range(len(before), len(full)))

    recorder = Recorder(model, tokenizer)
    for task in ("hellaswag", "winogrande"):
        results = score_task(recorder, task, load(task), limit=2, seed=3)
        responses = recorder.recorded[-1]
        drawn = [item for item in items(sets, task) if set(pairs(task, item)) <= responses.keys()]
        assert len(drawn) == 2 and results["items"] == 2
        right, right_normed = 0, 0
        for item in drawn:
            requests = pairs(task, item)
            sums = [likelihood(*pair) for pair in requests]
            for pair, by_hand in zip(requests, sums, strict=True):
                assert responses[pair].log_likelihood == pytest.approx(by_hand, abs=1e-3)
            gold = hellaswag(item)[2] if task == "hellaswag" else winogrande(item)[2]
            right += max(range(len(sums)), key=sums.__getitem__) == gold
            # lm-eval divides by the characters of the ending without its leading space.
            normed = [value / (len(pair[1]) - 1) for value, pair in zip(sums, requests, strict=True)]
            right_normed += max(range(len(sums)), key=normed.__getitem__) == gold
        assert results["acc"] == right / 2
        if task == "hellaswag":
            assert results["acc_norm"] == right_normed / 2


def pairs(task: str, item: dict) -> list[tuple[str, str]]:
    """Requests about an item: contexts and continuations."""
    if task == "hellaswag":
        context, endings, _ = hellaswag(item)
        return [(context, ending) for ending in endings]
    contexts, end, _ = winogrande(item)
    return [(context, end) for context in contexts]


def test_fewshot_examples_are_other_items(sets, load, tokenizer):
    recorder = Recorder(Oracle(tokenizer.size, [tokenizer.tokenizer.encode("a").ids]), tokenizer)
    results = score_task(recorder, "winogrande", load("winogrande", 3), 20, 0)
    sentences = {text for item in items(sets, "winogrande") for text in texts("winogrande", item, True)}
    (responses,) = recorder.recorded
    assert len(responses) == 40
    for context, _ in responses:
        *solved, question = context.split("\n\n")
        assert len(solved) == 3 and sentences.issuperset(solved)
        assert not any(example.startswith(question) for example in solved)
    assert results["items"] == 20 and results["acc"] < 1


def test_fewshot_examples_are_the_same_each_time(load, tokenizer):
    recorder, loaded = Recorder(Uniform(tokenizer.size, []), tokenizer), load("winogrande", 2)
    for _ in range(2):
        score_task(recorder, "winogrande", loaded, 20, 0)
    first, second = recorder.recorded
    assert list(first) == list(second)


def cached(model, cache: ResponseCache) -> CachedLM:
    return CachedLM(model, cache.responses, cache.add, lambda done, total: None)


def test_cached_responses_are_used_for_the_same_weights_only(load, tokenizer, tmp_path):
    loaded, path = load("winogrande"), tmp_path / ".task_scores-20-float32.jsonl"
    uniform = LlamaLM(Uniform(tokenizer.size, []), tokenizer, CPU)
    results = score_task(cached(uniform, ResponseCache(path, "these")), "winogrande", loaded, 20, 0)
    assert uniform.num_texts == 40 and ResponseCache(path, "these").responses and uniform.num_truncated == 0
    header, *lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([header, b"[1]\n\0\0\n", *lines, b'["half a li']))
    assert score_task(cached(uniform, ResponseCache(path, "these")), "winogrande", loaded, 20, 0) == results
    assert uniform.num_texts == 40, "all responses are cached"
    half, shown = dict([*ResponseCache(path, "these").responses.items()][::2]), []
    resumed = CachedLM(uniform, half, lambda new: None, lambda *numbers: shown.append(numbers))
    assert score_task(resumed, "winogrande", loaded, 20, 0) == results
    assert uniform.num_texts == 60 and shown == [(20, 40), (40, 40)]
    assert ResponseCache(path, "those").responses == {} == ResponseCache(path, "these").responses


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("loglikelihood", ("The trophy", " fits")),
        ("loglikelihood_rolling", ("The trophy",)),
        ("generate_until", ("The trophy", {"until": ["."], "max_gen_toks": 3})),
    ],
)
def test_responses_of_every_kind_are_cached(kind, arguments, tokenizer, tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    model = LlamaLM(Llama(LlamaConfig(vocab_size=tokenizer.size, **sizes, **heads)).eval(), tokenizer, CPU)
    request = Instance(request_type=kind, doc={}, arguments=arguments, idx=0)
    responses, again = (
        getattr(cached(computing, ResponseCache(tmp_path / "responses", "these")), kind)([request])
        for computing in (model, None)
    )
    assert responses == again and responses[0]


def test_nan_responses_are_an_error_and_not_cached(load, tokenizer, tmp_path):
    class Diverged(Uniform):
        def score(self, tokens, tree, targets):
            log_probs, greedy = super().score(tokens, tree, targets)
            return log_probs * float("nan"), greedy

    cache = ResponseCache(tmp_path / "responses", "these")
    model = cached(LlamaLM(Diverged(tokenizer.size, []), tokenizer, CPU), cache)
    with pytest.raises(TaskError, match=r"^the model's answers are not numbers: it has diverged, and has no score$"):
        score_task(model, "winogrande", load("winogrande"), 20, 0)
    assert not cache.responses


def add_scores(rank: int, world: int, path: Path) -> None:
    """Add scores of twenty steps while the other processes do."""
    dist.init_process_group("gloo")
    first = 100 * rank
    dist.barrier()
    for step in range(first, first + 20):
        Scores(path).add(score_key("winogrande", 0, None, 0, step, "float32"), {"items": 1, "acc": 0.5})


def test_two_processes_add_scores_to_one_file(tmp_path):
    path = tmp_path / "task_scores.json"
    gloo_pool.run(add_scores, 2, path)
    assert {score["step"] for score in Scores(path).all} == {*range(20), *range(100, 120)}


def test_score_of_the_same_task_and_settings_is_replaced(tmp_path):
    """The seed is a setting only if items are drawn. A link in a run folder is replaced, not followed."""
    (tmp_path / "elsewhere.json").write_text(kept := '{"scores": []}')
    (tmp_path / "task_scores.json").symlink_to(tmp_path / "elsewhere.json")
    scores = Scores(tmp_path / "task_scores.json")
    for limit, seed, acc in ((None, 0, 0.1), (50, 0, 0.2), (50, 1, 0.3), (None, 1, 0.4)):
        scores.add(score_key("winogrande", 0, limit, seed, 20, "float32"), {"items": 1, "acc": acc})
    assert [(score["limit"], score["seed"], score["acc"]) for score in Scores(scores.path).all] == [
        (50, 0, 0.2), (50, 1, 0.3), (None, None, 0.4),
    ]  # fmt: skip
    assert not scores.path.is_symlink() and (tmp_path / "elsewhere.json").read_text() == kept
    (tmp_path / ".task_scores.json.lock").unlink()
    (tmp_path / ".task_scores.json.lock").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match=r"\.lock is a link"):
        scores.add(score_key("winogrande", 0, None, 0, 20, "float32"), {"items": 1})


class Answers:
    """A model that answers as its kind of request wants, and counts the requests."""

    asked = 0

    def loglikelihood(self, requests, disable_tqdm):
        self.asked += len(requests)
        return [(-1.5, True) for _ in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm):
        self.asked += len(requests)
        return [-2.5 for _ in requests]


HOSTILE_RESPONSES = [
    "[1, 2]", '["KEY"]', '["KEY", null]', '["KEY", "x"]', '["KEY", true]', '["KEY", [1, 2, 3]]', '["KEY", NaN]',
    '["KEY", [NaN, true]]', '["KEY", [1e400, true]]', '["KEY", ["1", true]]', '["KEY", [1, 1]]', '["KEY", {"a": 1}]',
    '[["KEY"], [1, true]]', '["\\ud800", [1, true]]', "[" * 100_000, '["KEY", ' + "[" * 1000, "\0", '"KEY"', "{}", "5",
    '["KEY", [-1, ' + "1" * 5000 + "]]", '["KEY", "' + "x" * 2_000_000,
]  # fmt: skip


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling"])
def test_cached_responses_of_another_shape_are_computed_again(kind, tmp_path):
    path, request = tmp_path / "responses", Instance(kind, {}, ("a", "b"), 0)
    known = cached(model := Answers(), ResponseCache(path, "m"))
    expected = getattr(known, kind)([request])
    (header, line) = path.read_text().splitlines()
    key = json.loads(line)[0]
    for hostile in HOSTILE_RESPONSES:
        path.write_text(f"{header}\n{hostile.replace('KEY', key)}\n")
        model.asked = 0
        assert getattr(cached(model, ResponseCache(path, "m")), kind)([request]) == expected and model.asked == 1
    path.write_text(f"{header}\n{HOSTILE_RESPONSES[0]}\n{line}\n")
    assert getattr(cached(model, ResponseCache(path, "m")), kind)([request]) == expected and model.asked == 1


def test_responses_are_written_through_no_link(tmp_path):
    (tmp_path / "elsewhere").write_text("kept")
    cache = ResponseCache(tmp_path / "responses", "m")
    (tmp_path / "responses").symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        cache.add({"a": 1.0})
    (tmp_path / "responses").unlink()
    os.mkfifo(tmp_path / "responses")
    assert ResponseCache(tmp_path / "responses", "m").responses == {}, "and does not wait for a FIFO"
    assert (tmp_path / "elsewhere").read_text() == "kept"
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder is a folder, where a file is to be"):
        ResponseCache(tmp_path / "folder", "m")


def test_scores_and_responses_of_later_steps_are_removed(tmp_path):
    scores = Scores(tmp_path / "task_scores.json")
    for step in (None, 10, 20, 30):
        scores.add(score_key("winogrande", 0, None, 0, step, "float32"), {"items": 1, "acc": 0.5})
        scores.response_cache_path(step, "float32").touch()
    scores.remove_after(20)
    assert [score["step"] for score in Scores(scores.path).all] == [None, 10, 20]
    assert {path.name for path in tmp_path.glob(".task_scores-*")} == {
        ".task_scores-0-float32.jsonl", ".task_scores-10-float32.jsonl", ".task_scores-20-float32.jsonl",
    }  # fmt: skip


HOSTILE_SCORES = [
    "{", "[]", '{"scores": null}', '{"scores": [{}]}', '{"scores": [1]}', "[" * 100_000, "\0", '{"scores": "x"}',
    '{"scores": [{"task": 3, "num_fewshot": 0, "step": 1, "items": 1}]}',
    '{"scores": [{"task": "a", "num_fewshot": true, "step": 1, "items": 1}]}',
    '{"scores": [{"task": "a", "num_fewshot": 0, "step": "1", "items": 1}]}',
    '{"scores": [{"task": "a", "num_fewshot": 0, "step": 1, "items": 0}]}',
    '{"scores": [{"task": "\\ud800", "num_fewshot": 0, "step": 1, "items": 1}]}',
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE_SCORES)
def test_damaged_file_is_an_error_and_can_be_quarantined(text, tmp_path):
    path = tmp_path / "task_scores.json"
    path.write_text(text)
    with pytest.raises(TaskError, match=r"task_scores.json is damaged \(.*\): restore it, or move it away"):
        Scores(path)
    assert quarantine(path).read_text() == text and not path.exists()


def test_scores_that_are_no_file_are_an_error(tmp_path):
    path = tmp_path / "task_scores.json"
    for make in (os.mkfifo, os.mkdir):
        make(path)
        with pytest.raises(TaskError, match=r"task_scores.json is damaged \(.*\): restore it, or move it away"):
            Scores(path)
        path.rename(tmp_path / make.__name__)
