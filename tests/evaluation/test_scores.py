"""Scores through the whole path, of models that know the answers, know them wrong, or know nothing, and by hand."""

import math
import multiprocessing
import re
from pathlib import Path

import pytest
import torch

from evaluation.language_model import LlamaLM
from evaluation.response_cache import Answers, CachedLM
from evaluation.scores import Scores, score_key, score_task
from evaluation.tasks import TaskError, load_tasks, sample
from models import Llama, LlamaConfig
from tests.evaluation.conftest import items

LIMIT = 150
CPU = torch.device("cpu")


class Knowing:
    """In place of a `Llama`: a token is likely where it goes on a text that it knows.

    It sees what a token sees through the packing alone, so that this must be right.
    """

    def __init__(self, vocab_size: int, texts: list[list[int]]) -> None:
        self.config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=2,
            intermediate_size=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=2048,
        )
        self.known = {tuple(text[:end]) for text in texts for end in range(1, len(text) + 1)}

    def score(self, tokens, tree, targets):
        assert len(tree.query_index) == len(targets)
        stems = tree.prefixes.numel()
        found = []
        for place, target in zip(tree.gather_index[tree.query_index].tolist(), targets.tolist(), strict=True):
            if place < stems:
                text, last = divmod(place, tree.prefixes.shape[1])
                row = tree.prefixes[text, : last + 1]
            else:
                text, last = divmod(place - stems, tree.suffixes.shape[1])
                row = tree.sequences[text][tree.visible[text, 0, last]]
            assert tree.positions[row].tolist() == list(range(len(row)))
            found.append(0.0 if (*tokens[0, row].tolist(), target) in self.known else -9.0)
        return torch.tensor(found), torch.tensor([number == 0.0 for number in found])


class Uniform(Knowing):
    """Every token is as likely as any other."""

    def score(self, tokens, tree, targets):
        return torch.full(targets.shape, -math.log(self.config.vocab_size)), torch.zeros(len(targets), dtype=torch.bool)


def cleaned(text: str) -> str:
    """A text of HellaSwag without the marks of its source."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def hellaswag(item: dict) -> tuple[str, list[str], int]:
    """The context, the endings, and which of them is right."""
    context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    return cleaned(context), [" " + cleaned(ending) for ending in item["endings"]], int(item["label"])


def winogrande(item: dict) -> tuple[list[str], str, int]:
    """The two contexts, what follows, and which of them is right."""
    begin, end = item["sentence"].split("_")
    return [begin + item["option1"], begin + item["option2"]], " " + end.strip(), int(item["answer"]) - 1


def texts(task: str, item: dict, right: bool) -> list[str]:
    """The text of an item with the right answer, or those with the wrong ones."""
    if task == "hellaswag":
        context, endings, gold = hellaswag(item)
        return [context + ending for number, ending in enumerate(endings) if (number == gold) == right]
    contexts, end, gold = winogrande(item)
    return [context + end for number, context in enumerate(contexts) if (number == gold) == right]


def scores(model, tokenizer, sets, task: str, shots: int = 0, limit: int | None = LIMIT) -> dict:
    return score_task(LlamaLM(model, tokenizer, CPU), task, load_tasks(task, [sets], shots), limit, seed=0)


@pytest.mark.parametrize("task", ["hellaswag", "winogrande"])
@pytest.mark.parametrize("right", [True, False])
def test_who_knows_the_answers_has_all_and_who_knows_them_wrong_none(task, right, sets, tokenizer):
    every = items(sets, task)
    drawn = [every[number] for number in sample(len(every), LIMIT, seed=0) or ()]
    known = [tokenizer.tokenizer.encode(text).ids for item in drawn for text in texts(task, item, right)]
    found = scores(Knowing(tokenizer.size, known), tokenizer, sets, task)
    assert found["items"] == LIMIT
    for metric in ("acc", "acc_norm") if task == "hellaswag" else ("acc",):
        assert found[metric] == (1.0 if right else 0.0)


def test_who_knows_nothing_is_at_chance(sets, tokenizer):
    uniform = Uniform(tokenizer.size, [])
    found = scores(uniform, tokenizer, sets, "winogrande", limit=None)
    answers = [item["answer"] for item in items(sets, "winogrande")]
    assert found["items"] == 1267 and found["acc"] == answers.count("1") / 1267, "all ties are the first option's"
    assert found["acc_stderr"] == pytest.approx(math.sqrt(found["acc"] * (1 - found["acc"]) / 1266))
    found = scores(uniform, tokenizer, sets, "hellaswag", limit=2000)
    assert abs(found["acc"] - 0.25) < 0.05 and abs(found["acc_norm"] - 0.25) < 0.05


def test_length_normalisation_and_partial_scoring_by_hand(sets, tokenizer):
    """Two items of each, with a real model and its logits, without anything of the path."""
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
        whole, before = (tokenizer.tokenizer.encode(text).ids for text in (context + continuation, context))
        with torch.no_grad():
            log_p = model(torch.tensor([whole]))[0].log_softmax(-1)
        return sum(float(log_p[at - 1, whole[at]]) for at in range(len(before), len(whole)))

    seen: dict[tuple[str, str], float] = {}

    class Noting(LlamaLM):
        def loglikelihood(self, requests, **kwargs):
            answers = super().loglikelihood(requests)
            seen.update({request.args: answer[0] for request, answer in zip(requests, answers, strict=True)})
            return answers

    for task in ("hellaswag", "winogrande"):
        seen.clear()
        found = score_task(Noting(model, tokenizer, CPU), task, load_tasks(task, [sets], 0), limit=2, seed=3)
        items_of = {tuple(sorted(pairs(task, item))): item for item in items(sets, task)}
        (drawn,) = [[item for asked, item in items_of.items() if set(asked) <= seen.keys()]]
        assert len(drawn) == 2 and found["items"] == 2
        right, right_normed = 0, 0
        for item in drawn:
            asked = pairs(task, item)
            sums = [likelihood(*pair) for pair in asked]
            for pair, by_hand in zip(asked, sums, strict=True):
                assert seen[pair] == pytest.approx(by_hand, abs=1e-3)
            gold = hellaswag(item)[2] if task == "hellaswag" else winogrande(item)[2]
            right += max(range(len(sums)), key=sums.__getitem__) == gold
            # Per character, as lm-eval has it, of the ending without the space before it.
            normed = [value / (len(pair[1]) - 1) for value, pair in zip(sums, asked, strict=True)]
            right_normed += max(range(len(sums)), key=normed.__getitem__) == gold
        assert found["acc"] == right / 2
        if task == "hellaswag":
            assert found["acc_norm"] == right_normed / 2


def pairs(task: str, item: dict) -> list[tuple[str, str]]:
    """What is asked about an item: contexts and continuations."""
    if task == "hellaswag":
        context, endings, _ = hellaswag(item)
        return [(context, ending) for ending in endings]
    contexts, end, _ = winogrande(item)
    return [(context, end) for context in contexts]


def test_solved_examples_are_other_items(sets, tokenizer):
    known = [tokenizer.tokenizer.encode(text).ids for text in ["a"]]
    model = Knowing(tokenizer.size, known)
    asked: list[str] = []

    class Noting(LlamaLM):
        def loglikelihood(self, requests, **kwargs):
            asked.extend(request.args[0] for request in requests)
            return super().loglikelihood(requests)

    found = score_task(Noting(model, tokenizer, CPU), "winogrande", load_tasks("winogrande", [sets], 3), 20, 0)
    sentences = {text for item in items(sets, "winogrande") for text in texts("winogrande", item, True)}
    for context in asked:
        *solved, question = context.split("\n\n")
        assert len(solved) == 3 and sentences.issuperset(solved)
        assert not any(example.startswith(question) for example in solved)
    assert found["items"] == 20 and found["acc"] < 1


def test_solved_examples_do_not_depend_on_what_was_scored_before(sets, tokenizer):
    asked: list[list[str]] = []

    class Noting(LlamaLM):
        def loglikelihood(self, requests, **kwargs):
            asked.append([request.args[0] for request in requests])
            return super().loglikelihood(requests)

    loaded = load_tasks("winogrande", [sets], 2)
    for _ in range(2):
        score_task(Noting(Uniform(tokenizer.size, []), tokenizer, CPU), "winogrande", loaded, 20, 0)
    assert asked[0] == asked[1]
    with pytest.raises(TaskError, match=r"eval.tasks=winogrande cannot be scored \(Sample larger than population"):
        scores(Uniform(tokenizer.size, []), tokenizer, sets, "winogrande", shots=5000)


def remembering(model, answers: Answers) -> CachedLM:
    return CachedLM(model, answers.known, answers.add, lambda done, total: None)


def test_answers_are_kept_for_the_same_weights_alone(sets, tokenizer, tmp_path):
    loaded, path = load_tasks("winogrande", [sets], 0), tmp_path / ".eval-20-float32.jsonl"
    uniform = LlamaLM(Uniform(tokenizer.size, []), tokenizer, CPU)
    found = score_task(remembering(uniform, Answers(path, "these")), "winogrande", loaded, 20, 0)
    assert uniform.asked == 40 and Answers(path, "these").known and uniform.cut == 0
    with path.open("ab") as file:
        file.write(b'[1]\n\0\0\n["half a li')
    assert score_task(remembering(uniform, Answers(path, "these")), "winogrande", loaded, 20, 0) == found
    assert uniform.asked == 40, "nothing is asked again"
    assert Answers(path, "those").known == {} == Answers(path, "these").known


def test_what_is_not_a_number_is_no_answer_of_any_model(sets, tokenizer, tmp_path):
    class Diverged(Uniform):
        def score(self, tokens, tree, targets):
            found, best = super().score(tokens, tree, targets)
            return found * float("nan"), best

    answers = Answers(tmp_path / "answers", "these")
    model = remembering(LlamaLM(Diverged(tokenizer.size, []), tokenizer, CPU), answers)
    with pytest.raises(TaskError, match="the model's answers are not numbers: it has diverged, and has no score"):
        score_task(model, "winogrande", load_tasks("winogrande", [sets], 0), 20, 0)
    assert not answers.known


def add_scores(path: Path, first: int) -> None:
    for step in range(first, first + 20):
        Scores(path).add(score_key("winogrande", 0, None, 0, step, "float32"), {"items": 1, "acc": 0.5})


def test_scores_of_two_processes_are_all_kept(tmp_path):
    path = tmp_path / "task_scores.json"
    both = [multiprocessing.get_context("spawn").Process(target=add_scores, args=(path, at)) for at in (0, 100)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert {score["step"] for score in Scores(path).all} == {*range(20), *range(100, 120)}
    Scores(path).forget_after(10)
    assert {score["step"] for score in Scores(path).all} == {*range(11)}


@pytest.mark.parametrize("text", ["{", "[]", '{"scores": null}', '{"scores": [{}]}', '{"scores": [1]}'])
def test_a_damaged_file_is_a_sentence_and_can_be_put_aside(text, tmp_path):
    path = tmp_path / "task_scores.json"
    path.write_text(text)
    with pytest.raises(TaskError, match=r"task_scores.json is damaged \(.*\): remove it"):
        Scores(path)
    assert Scores(path, damaged=True).put_aside().read_text() == text and not path.exists()
