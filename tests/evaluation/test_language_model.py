"""Our model as lm-eval's, beside lm-eval's own on the exported model."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from evaluation.language_model import LlamaLM
from evaluation.scores import score_task
from evaluation.tasks import load_tasks
from models import Llama, LlamaConfig
from models.hugging_face import export

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[96, 1024])
def both(request, tokenizer, tmp_path_factory) -> tuple[LlamaLM, HFLM]:
    """The same weights twice, with a context that many items exceed, and one that none does."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=request.param,
        initializer_range=0.2,
    )
    model = Llama(config).eval()
    folder = tmp_path_factory.mktemp("exported")
    export(model.state_dict(), config, folder, tokenizer.end)
    tokenizer.save(folder)
    return LlamaLM(model, tokenizer, CPU), HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)


@pytest.mark.parametrize("task", ["hellaswag", "winogrande"])
@pytest.mark.parametrize("shots", [0, 2])
def test_each_item_is_scored_as_by_the_hf_backend(both, task, shots, sets):
    answers: list[list[tuple[float, bool]]] = []
    found = []
    for model in both:
        loaded = load_tasks(task, [sets], shots)
        found.append(score_task(model, task, loaded, limit=30, seed=0))
        answers.append([instance.resps[0] for instance in loaded["tasks"][task].instances])
    assert len(answers[0]) == len(answers[1]) == 30 * (4 if task == "hellaswag" else 2)
    for (ours, greedy), (theirs, their_greedy) in zip(*answers, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3) and greedy == their_greedy
    assert found[0] == found[1]


def asked(kind: str, *arguments) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=0) for given in arguments]


def test_contexts_that_are_empty_end_with_spaces_or_are_shared(both):
    requests = asked("loglikelihood", ("", "The trophy"), ("The trophy ", "fits"), ("The trophy", " fits"), ("a", " b"))
    ours, theirs = (model.loglikelihood(requests, disable_tqdm=True) for model in both)
    for (one, greedy), (other, their_greedy) in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=1e-3) and greedy == their_greedy


def test_whole_texts(both):
    text = "The trophy does not fit into the suitcase because it is too large. " * 12
    requests = asked("loglikelihood_rolling", (text,), ("One word",))
    ours, theirs = (model.loglikelihood_rolling(requests, disable_tqdm=True) for model in both)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_what_it_writes(both):
    settings = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    requests = asked("generate_until", ("The trophy does not fit into the", settings), ("Once", settings))
    ours, theirs = (model.generate_until(requests, disable_tqdm=True) for model in both)
    assert ours == theirs and all(ours)
