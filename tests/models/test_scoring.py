"""Scores with shared prefixes equal the scores of the texts one by one."""

import random

import pytest
import torch
from torch.nn import functional as F

from models import Llama, LlamaConfig
from models.scoring import Text, batches, group_by_prefix, pack, score, split_long

CONTEXT = 24


@pytest.fixture(scope="module", params=[False, True])
def model(request) -> Llama:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        qk_norm=request.param,
        initializer_range=0.3,
    )
    return Llama(shape).eval()


def score_alone(model: Llama, text: Text) -> tuple[float, bool]:
    """The score of a text from the full logits of that text."""
    inputs, targets = list(text.tokens)[-CONTEXT - 1 : -1], torch.tensor(text.tokens[-text.scored :])
    with torch.no_grad():
        log_p = F.log_softmax(model(torch.tensor([inputs]))[0, -text.scored :], dim=-1)
    return float(log_p.gather(1, targets[:, None]).sum()), bool((log_p.argmax(1) == targets).all())


def random_texts(seed: int) -> list[Text]:
    """Groups of texts with common prefixes, some longer than the context, some equal up to the last token."""
    generator = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [generator.randrange(97) for _ in range(generator.randint(low, high))]

    texts = []
    for _ in range(12):
        prefix = tokens(1, 20)
        for _ in range(generator.randint(1, 4)):
            end = tokens(1, 9)
            texts.append(Text(prefix + end, generator.randint(1, len(end))))
    same = tokens(4, 8)
    return [*texts, *(Text([*same, last], 1) for last in range(5)), Text(same, 2), Text(same, 2)]


@pytest.mark.parametrize("batch_tokens", [1, 100, 10000])
def test_scores_equal_those_of_single_texts(model, batch_tokens):
    texts = random_texts(1)
    with torch.no_grad():
        likeliest = model(torch.tensor([[5, 6, 7]]))[0, -1].argmax()
    texts.append(Text([5, 6, 7, int(likeliest)], 1))
    scores = score(model, texts, batch_tokens, torch.device("cpu"))
    assert sorted(scores) == list(range(len(texts)))
    for number, text in enumerate(texts):
        log_likelihood, greedy = score_alone(model, text)
        assert scores[number].log_likelihood == pytest.approx(log_likelihood, abs=1e-4)
        assert scores[number].greedy == greedy
    assert {score.greedy for score in scores.values()} == {True, False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["uniform", "in pairs", "drawn"])
def test_first_of_equally_likely_tokens_is_greedy(head, dtype):
    """The oracle is `torch.argmax` over all logits. A collapsed model is no good one."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    model = Llama(LlamaConfig(**sizes, **heads)).to(dtype).eval()
    with torch.no_grad():
        if head == "uniform":
            model.lm_head.weight.zero_()
        elif head == "in pairs":
            model.lm_head.weight[1::2] = model.lm_head.weight[:-1:2]
        logits = model(torch.tensor([[5, 6, 7]]))[0, -1]
    scores = score(model, [Text([5, 6, 7, token], 1) for token in range(97)], 64, torch.device("cpu"))
    assert [token for token in range(97) if scores[token].greedy] == [int(logits.argmax())]
    assert head == "drawn" or (logits == logits.max()).sum() > 1, "there is a tie"


def test_common_prefix_is_packed_once():
    prefix = list(range(10))
    (group,) = group_by_prefix([Text([*prefix, 50, 51, 52], 3), Text([*prefix, 60, 61], 2), Text([*prefix, 70], 1)], 99)
    assert group == (prefix, [[], [50, 51], [60]], [2, 0, 1])
    assert (group.tokens, group.longest) == (13, 12)
    tokens, tree = pack([group, group], [1, 3, 2] * 2, torch.device("cpu"))
    assert tokens.tolist() == [[*prefix, 50, 51, 60] * 2]
    assert tree.positions.tolist() == [*range(10), 10, 11, 10] * 2
    assert tree.prefixes.tolist() == [[*range(10)], [*range(13, 23)]]
    assert tree.suffixes.tolist() == [[10, 11], [12, 0], [23, 24], [25, 0]]
    assert tree.sequences[:2].tolist() == [[*range(12)], [*range(10), 12, 0]]
    assert tree.visible[0, 0].tolist() == [[True] * 11 + [False], [True] * 12]
    assert tree.gather_index.tolist() == [*range(10), 20, 21, 22, *range(10, 20), 24, 25, 26]
    assert tree.query_index.tolist() == [9, 9, 10, 11, 9, 12, 22, 22, 23, 24, 22, 25]


def test_texts_are_truncated_before_they_are_grouped():
    """Texts of different lengths are truncated at different places, so that their inputs have no common prefix."""
    texts = [Text([*range(8), 20, 21], 2), Text([*range(8), 30, 31, 32], 3)]
    assert [group.prefix for group in group_by_prefix(texts, 6)] == [[3, 4, 5, 6, 7, 20], [4, 5, 6, 7, 30, 31]]


def test_grouping_does_not_depend_on_the_order_of_texts():
    prefix = list(range(10))
    texts = [Text([*prefix, 50], 1), Text([90, 91, 92], 1), Text([*prefix, 60, 61], 2), Text([90, 91, 93], 1)]
    assert sorted(sorted(group.indices) for group in group_by_prefix(texts, 99)) == [[0, 2], [1, 3]]


def test_text_joins_a_group_only_if_that_saves_tokens():
    """A third text that shares 2 of 10 tokens would cut the prefix to these: it would save 4 tokens instead of 10."""
    prefix = list(range(10))
    texts = [Text([*prefix, 50, 51], 1), Text([*prefix, 60, 61], 1), Text([0, 1, 70, 71, 72], 1)]
    assert sorted(sorted(group.indices) for group in group_by_prefix(texts, 99)) == [[0, 1], [2]]


def test_group_size_is_limited():
    texts = [Text([*range(20), number, 50], 1) for number in range(200)]
    groups = group_by_prefix(texts, CONTEXT)
    assert all(len(group.indices) * group.longest <= 4 * CONTEXT for group in groups) and len(groups) == 50
    assert sorted(index for group in groups for index in group.indices) == list(range(200))


def test_batch_size_is_limited():
    texts = random_texts(2)
    groups = group_by_prefix(texts, CONTEXT)
    for limit in (1, 60, 500):
        result = batches(groups, limit)
        assert sorted(index for batch in result for group in batch for index in group.indices) == [*range(len(texts))]
        for batch in result:
            longest = [group.longest for group in batch]
            assert longest == sorted(longest, reverse=True)
            assert len(batch) == 1 or sum(group.tokens for group in batch) <= limit
            assert len(batch) == 1 or sum(len(group.indices) for group in batch) * longest[0] <= 4 * limit
            assert len({len(group.indices) == 1 for group in batch}) == 1
    assert len(batches(groups, 1)) == len(groups) and len(batches(groups, 10000)) == 2


def test_parts_of_a_long_text_cover_it(model):
    text = Text([7 * number % 97 for number in range(60)], 55)
    parts = split_long(text, CONTEXT)
    assert [(len(part.tokens), part.scored) for part in parts] == [(60, 24), (36, 24), (12, 7)]
    assert split_long(Text([1, 2, 3], 2), CONTEXT) == [Text([1, 2, 3], 2)]


@pytest.mark.parametrize("tokens, scored", [([1, 2], 2), ([1], 1), ([1, 2], 0), (list(range(30)), 25)])
def test_texts_that_cannot_be_scored_are_errors(tokens, scored):
    with pytest.raises(ValueError, match=f"{scored} of {len(tokens)} tokens cannot be scored"):
        group_by_prefix([Text(tokens, scored)], CONTEXT)
