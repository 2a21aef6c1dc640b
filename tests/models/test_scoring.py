"""Scores of texts that share their beginnings are those of the texts one by one."""

import random

import pytest
import torch
from torch.nn import functional as F

from models import Llama, LlamaConfig
from models.scoring import Text, batches, in_parts, pack, score, trees

LONGEST = 24


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
        max_position_embeddings=LONGEST,
        qk_norm=request.param,
        initializer_range=0.3,
    )
    return Llama(shape).eval()


def alone(model: Llama, text: Text) -> tuple[float, bool]:
    """The score of a text by the whole logits of that text."""
    seen, wanted = list(text.tokens)[-LONGEST - 1 : -1], torch.tensor(text.tokens[-text.scored :])
    with torch.no_grad():
        log_p = F.log_softmax(model(torch.tensor([seen]))[0, -text.scored :], dim=-1)
    return float(log_p.gather(1, wanted[:, None]).sum()), bool((log_p.argmax(1) == wanted).all())


def texts(seed: int) -> list[Text]:
    """Groups of texts with common beginnings, some longer than the model takes, some equal but for the last token."""
    generator = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [generator.randrange(97) for _ in range(generator.randint(least, most))]

    found = []
    for _ in range(12):
        beginning = tokens(1, 20)
        for _ in range(generator.randint(1, 4)):
            end = tokens(1, 9)
            found.append(Text(beginning + end, generator.randint(1, len(end))))
    same = tokens(4, 8)
    return [*found, *(Text([*same, last], 1) for last in range(5)), Text(same, 2), Text(same, 2)]


@pytest.mark.parametrize("batch_tokens", [1, 100, 10000])
@pytest.mark.parametrize("share", [True, False])
def test_each_score_is_that_of_the_text_alone(model, batch_tokens, share):
    given = texts(1)
    with torch.no_grad():
        likeliest = model(torch.tensor([[5, 6, 7]]))[0, -1].argmax()
    given.append(Text([5, 6, 7, int(likeliest)], 1))
    scores = dict(pair for some in score(model, given, batch_tokens, torch.device("cpu"), share) for pair in some)
    assert sorted(scores) == list(range(len(given)))
    for number, text in enumerate(given):
        log_likelihood, greedy = alone(model, text)
        assert scores[number].log_likelihood == pytest.approx(log_likelihood, abs=1e-4)
        assert scores[number].greedy == greedy
    assert {found.greedy for found in scores.values()} == {True, False}


def test_what_is_common_is_laid_out_once():
    beginning = list(range(10))
    (tree,) = trees([Text([*beginning, 50, 51, 52], 3), Text([*beginning, 60, 61], 2), Text([*beginning, 70], 1)], 99)
    assert tree == (beginning, [[], [50, 51], [60]], [2, 0, 1])
    assert (tree.tokens, tree.longest) == (13, 12)
    tokens, packing = pack([tree, tree], [1, 3, 2] * 2, torch.device("cpu"))
    assert tokens.tolist() == [[*beginning, 50, 51, 60] * 2]
    assert packing.positions.tolist() == [*range(10), 10, 11, 10] * 2
    assert packing.stems.tolist() == [[*range(10)], [*range(13, 23)]]
    assert packing.rests.tolist() == [[10, 11], [12, 0], [23, 24], [25, 0]]
    assert packing.texts[:2].tolist() == [[*range(12)], [*range(10), 12, 0]]
    assert packing.visible[0, 0].tolist() == [[True] * 11 + [False], [True] * 12]
    assert packing.places.tolist() == [*range(10), 20, 21, 22, *range(10, 20), 24, 25, 26]
    assert packing.asked.tolist() == [9, 9, 10, 11, 9, 12, 22, 22, 23, 24, 22, 25]


def test_a_text_that_is_cut_off_shares_what_is_left_of_it():
    """Each sees its own last tokens, so that beginnings of different lengths are cut at different places."""
    given = [Text([*range(8), 20, 21], 2), Text([*range(8), 30, 31, 32], 3)]
    assert [tree.stem for tree in trees(given, 6)] == [[3, 4, 5, 6, 7, 20], [4, 5, 6, 7, 30, 31]]


def test_texts_that_begin_alike_find_each_other_wherever_they_stand():
    beginning = list(range(10))
    given = [Text([*beginning, 50], 1), Text([90, 91, 92], 1), Text([*beginning, 60, 61], 2), Text([90, 91, 93], 1)]
    assert sorted(sorted(tree.texts) for tree in trees(given, 99)) == [[0, 2], [1, 3]]
    assert [tree.texts for tree in trees(given, 99, share=False)] != [tree.texts for tree in trees(given, 99)]


def test_a_text_joins_where_that_saves_something():
    """A third that shares 2 of 10 tokens would have the first two share only these: 4 tokens are saved, not 10."""
    beginning = list(range(10))
    given = [Text([*beginning, 50, 51], 1), Text([*beginning, 60, 61], 1), Text([0, 1, 70, 71, 72], 1)]
    assert sorted(sorted(tree.texts) for tree in trees(given, 99)) == [[0, 1], [2]]


def test_trees_stay_small():
    given = [Text([*range(20), number, 50], 1) for number in range(200)]
    laid = trees(given, LONGEST)
    assert all(len(tree.texts) * tree.longest <= 4 * LONGEST for tree in laid) and len(laid) == 50
    assert sorted(number for tree in laid for number in tree.texts) == list(range(200))


def test_batches_hold_no_more_than_they_may():
    laid = trees(texts(2), LONGEST)
    for most in (1, 60, 500):
        made = batches(laid, most)
        assert sorted(number for batch in made for tree in batch for number in tree.texts) == list(range(len(texts(2))))
        for batch in made:
            longest = [tree.longest for tree in batch]
            assert longest == sorted(longest, reverse=True)
            assert len(batch) == 1 or sum(tree.tokens for tree in batch) <= most
            assert len(batch) == 1 or sum(len(tree.texts) for tree in batch) * longest[0] <= 4 * most
            assert len({len(tree.texts) == 1 for tree in batch}) == 1
    assert len(batches(laid, 1)) == len(laid) and len(batches(laid, 10000)) == 2


def test_the_parts_of_a_long_end_are_all_of_it(model):
    text = Text([7 * number % 97 for number in range(60)], 55)
    parts = in_parts(text, LONGEST)
    assert [(len(part.tokens), part.scored) for part in parts] == [(60, 24), (36, 24), (12, 7)]
    assert in_parts(Text([1, 2, 3], 2), LONGEST) == [Text([1, 2, 3], 2)]


@pytest.mark.parametrize("tokens, scored", [([1, 2], 2), ([1], 1), ([1, 2], 0), (list(range(30)), 25)])
def test_what_cannot_be_scored_is_told(tokens, scored):
    with pytest.raises(ValueError, match=f"{scored} of {len(tokens)} tokens cannot be scored"):
        trees([Text(tokens, scored)], LONGEST)
