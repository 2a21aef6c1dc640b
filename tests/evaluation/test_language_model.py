"""LlamaLM against lm-eval's `hf` backend on the exported model."""

import random

import pytest
import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from evaluation.language_model import LlamaLM
from evaluation.scores import score_task
from models import Llama, LlamaConfig
from models.hugging_face import export
from models.scoring import Score
from tests import gloo_pool
from tests.evaluation.known_models import CPU, Oracle, Uniform
from tests.helpers import SLOW


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


@pytest.mark.parametrize(
    "task, num_fewshot", [("hellaswag", 0), ("winogrande", 0), ("winogrande", 2), SLOW("hellaswag", 2)]
)
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


def test_unusual_contexts_equal_the_hf_backend(both):
    """Contexts are empty, shared, or end in spaces or within a word, which alone has other tokens."""
    requests = instances(
        "loglikelihood",
        ("", "The trophy"),
        ("The trophy ", "fits"),
        ("The trophy", " fits"),
        ("a", " b"),
        ("It fits beca", "use it is large"),
    )
    ours, reference = (model.loglikelihood(requests, disable_tqdm=True) for model in both)
    for (value, greedy), (expected, expected_greedy) in zip(ours, reference, strict=True):
        assert value == pytest.approx(expected, abs=1e-3) and greedy == expected_greedy


def test_context_of_spaces_stays_the_context(both):
    """The hf backend fails on it."""
    ours, _ = both
    spaces, full = ours.tok_encode("  "), ours.tok_encode("  The trophy")
    assert ours.loglikelihood(instances("loglikelihood", ("  ", "The trophy"))) == ours._loglikelihood_tokens(
        [(None, spaces, full[len(spaces) :])]
    )


def test_end_token_that_begins_a_text_is_its_context(both):
    """Texts have none; here a token of the text is the end token."""
    ours, _ = both
    exclaiming = ours.encoder._replace(end=ours.tok_encode("!")[0])
    begun = LlamaLM(ours.model, exclaiming, CPU).loglikelihood(instances("loglikelihood", ("", "! The trophy")))
    assert begun == ours.loglikelihood(instances("loglikelihood", ("!", " The trophy")))


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


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"temperature": 0.5}])
def test_generation_that_samples_is_an_error(tokenizer, settings):
    model = LlamaLM(Uniform(tokenizer.size, []), tokenizer, CPU)
    with pytest.raises(ValueError, match="a task that samples its answers cannot be evaluated"):
        model.generate_until(instances("generate_until", ("Once", settings)))


def test_texts_longer_than_the_context_and_one_token_count_as_truncated(tokenizer):
    """The last token is scored, and is no part of the context of any."""
    model = LlamaLM(Uniform(tokenizer.size, [], context=4), tokenizer, CPU)
    model._loglikelihood_tokens([(None, [1] * length, [2]) for length in (3, 4, 5, 6)])
    assert (model.num_texts, model.num_truncated) == (4, 2)


def test_continuation_longer_than_the_context_is_scored_in_parts(tokenizer):
    """With a context of four tokens, the last four are one part, and the two before them the other."""
    first, last = [1, 2, 3], [3, 4, 5, 6, 7]
    for known, expected in (([first, last], (0, True)), ([first], (4 * -9, False)), ([last], (2 * -9, False))):
        model = LlamaLM(Oracle(tokenizer.size, known, context=4), tokenizer, CPU)
        assert model._loglikelihood_tokens([(None, [1], [2, 3, 4, 5, 6, 7])]) == [expected]


class Dictated(Uniform):
    """Generates given tokens, and records its inputs."""

    def __init__(self, vocab_size: int, tokens: list[int], context: int) -> None:
        super().__init__(vocab_size, [], context)
        self.tokens, self.inputs = tokens, []

    def __call__(self, inputs):
        self.inputs.append(inputs[0].tolist())
        token = torch.tensor(self.tokens[len(self.inputs) - 1])
        return torch.nn.functional.one_hot(token, self.config.vocab_size).expand(1, inputs.shape[1], -1)


def test_generation_ends_at_the_end_token_and_stays_in_the_context(tokenizer):
    """The context of four tokens holds the last four."""
    before, after = (tokenizer.tokenizer.encode(text).ids for text in ("Once", " the trophy fits into the suitcase"))
    model = Dictated(tokenizer.size, [*after, tokenizer.end, *after], context=4)
    requests = instances("generate_until", ("Once", {"until": "\n"}))
    assert LlamaLM(model, tokenizer, CPU).generate_until(requests) == [" the trophy fits into the suitcase"]
    tokens = [*before, *after]
    assert model.inputs == [tokens[max(0, end - 4) : end] for end in range(len(before), len(tokens) + 1)]


@pytest.mark.parametrize(
    ("until", "text"), [("suit", " the trophy fits into the "), (["suit", "fits"], " the trophy ")]
)
def test_generation_without_a_context_ends_before_the_first_stop_string(until, text, tokenizer):
    tokens = tokenizer.tokenizer.encode(" the trophy fits into the suitcase").ids
    model = Dictated(tokenizer.size, tokens, context=64)
    requests = instances("generate_until", ("", {"until": until}))
    assert LlamaLM(model, tokenizer, CPU).generate_until(requests) == [text]
    assert model.inputs[0] == [tokenizer.end]


def test_generation_ends_after_256_tokens_if_the_task_sets_no_number(tokenizer):
    model = Dictated(tokenizer.size, [5] * 300, context=4)
    LlamaLM(model, tokenizer, CPU).generate_until(instances("generate_until", ("Once", {"until": "never"})))
    assert len(model.inputs) == 256


@pytest.mark.parametrize(("batch_tokens", "batches"), [(None, 1), (10, 3)])
def test_batches_have_so_many_tokens(batch_tokens, batches, tokenizer):
    class Counting(Uniform):
        calls = 0

        def score(self, tokens, tree, targets):
            self.calls += 1
            return super().score(tokens, tree, targets)

    model = Counting(tokenizer.size, [])
    texts = [(None, [first] * 9, [2]) for first in (3, 4, 5)]
    LlamaLM(model, tokenizer, CPU, batch_tokens)._loglikelihood_tokens(texts)
    assert model.calls == batches


def scores_of_rank(rank: int, world: int, tokenizer, texts: list[tuple[None, list[int], list[int]]]) -> list[Score]:
    """Return the scores of texts by a model of any number of processes."""
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        initializer_range=0.5,
    )
    return LlamaLM(Llama(config).eval(), tokenizer, CPU, batch_tokens=32)._loglikelihood_tokens(texts)


def test_all_processes_have_the_scores_of_one(tokenizer):
    draw = random.Random(0)
    lengths = [(draw.randint(1, 9), draw.randint(1, 20)) for _ in range(20)]
    texts = [(None, *([draw.randrange(tokenizer.size) for _ in range(length)] for length in pair)) for pair in lengths]
    expected = scores_of_rank(0, 1, tokenizer, texts)
    for results in gloo_pool.run(scores_of_rank, 2, tokenizer, texts):
        for ours, reference in zip(results, expected, strict=True):
            assert ours.log_likelihood == pytest.approx(reference.log_likelihood, rel=1e-5)
            assert ours.greedy == reference.greedy
