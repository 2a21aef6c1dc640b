"""LlamaLM against lm-eval's `hf` backend on the exported model."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from evaluation.language_model import LlamaLM
from evaluation.scores import score_task
from models import Llama, LlamaConfig
from models.hugging_face import export

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[96, 1024])
def both(request, tokenizer, tmp_path_factory) -> tuple[LlamaLM, HFLM]:
    """LlamaLM and HFLM of the same weights, with a context that many items exceed, and one that no item exceeds."""
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
@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_item_scores_equal_the_hf_backend(both, task, num_fewshot, load):
    responses: list[list[tuple[float, bool]]] = []
    results = []
    for model in both:
        loaded = load(task, num_fewshot)
        results.append(score_task(model, task, loaded, limit=30, seed=0))
        responses.append([instance.resps[0] for instance in loaded["tasks"][task].instances])
    assert len(responses[0]) == len(responses[1]) == 30 * (4 if task == "hellaswag" else 2)
    for (ours, greedy), (reference, reference_greedy) in zip(*responses, strict=True):
        assert ours == pytest.approx(reference, abs=1e-3) and greedy == reference_greedy
    assert results[0] == results[1]


def instances(kind: str, *arguments) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in arguments]


def test_empty_shared_and_space_terminated_contexts(both):
    requests = instances(
        "loglikelihood", ("", "The trophy"), ("The trophy ", "fits"), ("The trophy", " fits"), ("a", " b")
    )
    ours, reference = (model.loglikelihood(requests, disable_tqdm=True) for model in both)
    for (value, greedy), (expected, expected_greedy) in zip(ours, reference, strict=True):
        assert value == pytest.approx(expected, abs=1e-3) and greedy == expected_greedy


def test_rolling_loglikelihood_equals_the_hf_backend(both):
    text = "The trophy does not fit into the suitcase because it is too large. " * 12
    requests = instances("loglikelihood_rolling", (text,), ("One word",))
    ours, reference = (model.loglikelihood_rolling(requests, disable_tqdm=True) for model in both)
    assert ours == pytest.approx(reference, rel=1e-5)


def test_greedy_generation_equals_the_hf_backend(both):
    settings = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    requests = instances("generate_until", ("The trophy does not fit into the", settings), ("Once", settings))
    ours, reference = (model.generate_until(requests, disable_tqdm=True) for model in both)
    assert ours == reference and all(ours)
