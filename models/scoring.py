"""How likely continuations are: what several texts begin with is computed once.

Texts that begin alike make a tree: the common beginning, then the rest of each, which sees the beginning and itself.
Trees of about the same size make a batch. The last block and the logits are computed of what is scored alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.llama import Llama, PrefixTree

#: A text joins a tree if that saves as many tokens as this part of the shortest of them, at least.
WORTH_SHARING = 0.25

#: The texts of a tree have together no more tokens than so many of the longest: attention sees each whole.
LARGEST = 4


class Text(NamedTuple):
    """A text whose end is scored.

    Attributes:
        tokens: ids.
        scored: how many of the last; the first token of a text never is.
    """

    tokens: Sequence[int]
    scored: int


def in_parts(text: Text, longest: int) -> list[Text]:
    """Return a text as several, if more of it is scored than the model can see at once; the last part first."""
    found = []
    tokens, scored = text
    while scored > longest:
        found.append(Text(tokens, longest))
        tokens, scored = tokens[:-longest], scored - longest
    return [*found, Text(tokens, scored)]


class Score(NamedTuple):
    """How likely the end of a text is.

    Attributes:
        log_likelihood: sum over its tokens, in nats.
        greedy: whether each of them is the most likely one.
    """

    log_likelihood: float
    greedy: bool


class Tree(NamedTuple):
    """Texts that begin alike: their stem, and the rest of each; without their last tokens, which nothing follows.

    Attributes:
        stem: ids.
        rests: ids of each text behind the stem.
        texts: numbers of the texts.
    """

    stem: list[int]
    rests: list[list[int]]
    texts: list[int]

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.stem) + sum(map(len, self.rests))

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return len(self.stem) + max(map(len, self.rests))


def trees(texts: Sequence[Text], longest: int, share: bool = True) -> list[Tree]:
    """Lay out texts.

    Args:
        texts: in any order.
        longest: tokens that the model takes: of longer texts, whose last one it need not see, it sees the end.
        share: whether to share beginnings.
    """
    for text in texts:
        if not 0 < text.scored < len(text.tokens) or text.scored > longest:
            raise ValueError(
                f"{text.scored} of {len(text.tokens)} tokens cannot be scored: there must be one at least, fewer than "
                f"all, and no more than {longest}"
            )
    seen = [list(text.tokens[-longest - 1 : -1]) for text in texts]
    groups: list[tuple[list[int], int]] = []  # numbers of texts, and how many tokens they share
    tokens = shortest = 0  # of the last group's texts, each whole
    for number in sorted(range(len(texts)), key=seen.__getitem__):
        length = len(seen[number])
        tokens, shortest = tokens + length, min(shortest, length)
        if groups and share:
            others, before = groups[-1]
            shared = _common(seen[others[0]], seen[number], before)
            saved = shared * len(others) - before * (len(others) - 1)
            if saved >= max(1.0, WORTH_SHARING * shortest) and tokens <= LARGEST * longest:
                others.append(number)
                groups[-1] = others, shared
                continue
        groups.append(([number], length))
        tokens = shortest = length
    return [
        Tree(seen[numbers[0]][:shared], [seen[number][shared:] for number in numbers], numbers)
        for numbers, shared in groups
    ]


def _common(one: list[int], other: list[int], most: int) -> int:
    """Return how many tokens are the same from the first, up to so many."""
    for count, (a, b) in enumerate(zip(one[:most], other, strict=False)):
        if a != b:
            return count
    return min(most, len(one), len(other))


def batches(laid: Sequence[Tree], batch_tokens: int) -> list[list[Tree]]:
    """Return trees in batches of at most so many tokens, but of one tree at least; those with the longest texts first.

    Trees of a single text, which is their stem, are by themselves. Attention sees texts filled up to the longest, each
    with its stem: the places that it sees are limited too.
    """
    found: list[list[Tree]] = []
    for alone in (False, True):
        tokens = places = longest = 0
        for tree in sorted((each for each in laid if (len(each.texts) == 1) == alone), key=lambda each: -each.longest):
            tokens += tree.tokens
            places += len(tree.texts) * longest
            if not longest or tokens > batch_tokens or places > LARGEST * batch_tokens:
                longest = tree.longest
                tokens, places = tree.tokens, len(tree.texts) * longest
                found.append([])
            found[-1].append(tree)
    return found


def score(
    model: Llama,
    texts: Sequence[Text],
    batch_tokens: int,
    device: torch.device,
    share: bool = True,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[list[tuple[int, Score]]]:
    """Yield, batch for batch, the numbers of some texts and their scores; in the end there is one of each.

    Of several processes each yields its share. All compute as many batches, which sharded models need.

    Args:
        model: in evaluation mode. Its `max_position_embeddings` is the most that it sees of a text.
        texts: in any order.
        batch_tokens: tokens computed at once.
        device: of the model.
        share: whether to compute common beginnings once.
        rank: of this process.
        processes: how many there are.
    """
    made = batches(trees(texts, model.config.max_position_embeddings, share), batch_tokens)
    for own in range(rank, -(-len(made) // processes) * processes, processes):
        batch = made[min(own, len(made) - 1)]
        wanted = [list(texts[number].tokens[-texts[number].scored :]) for tree in batch for number in tree.texts]
        found, best = score_batch(model, batch, wanted, device)
        numbers = [number for tree in batch for number in tree.texts]
        scores: list[tuple[int, Score]] = []
        first = 0
        for number, tokens in zip(numbers, wanted, strict=True):
            last = first + len(tokens)
            scores.append((number, Score(sum(found[first:last]), all(best[first:last]))))
            first = last
        if own < len(made):
            yield scores


def score_batch(
    model: Llama, batch: Sequence[Tree], wanted: Sequence[Sequence[int]], device: torch.device
) -> tuple[list[float], list[bool]]:
    """Return the logarithm of the probability of each wanted token, text after text, and whether none is likelier."""
    tokens, packing = pack(batch, [len(some) for some in wanted], device)
    targets = torch.tensor([token for some in wanted for token in some], device=device)
    found, best = model.score(tokens, packing, targets)
    return found.tolist(), best.tolist()


def pack(batch: Sequence[Tree], scored: Sequence[int], device: torch.device) -> tuple[Tensor, PrefixTree]:
    """Return trees as one row of tokens, (1, seq), and how it is packed; asked for is what scored tokens follow."""
    tokens: list[int] = []
    positions: list[int] = []
    stems: list[list[int]] = []
    rests: list[list[int]] = []
    texts: list[list[int]] = []
    asked: list[int] = []
    left = iter(scored)
    for tree in batch:
        stem = [*range(len(tokens), len(tokens) + len(tree.stem))]
        stems.append(stem)
        tokens += tree.stem
        positions += range(len(stem))
        for ids in tree.rests:
            rest = [*range(len(tokens), len(tokens) + len(ids))]
            asked += [*stem, *rest][-next(left) :]
            tokens += ids
            positions += range(len(stem), len(stem) + len(rest))
            if rest:
                rests.append(rest)
                texts.append([*stem, *rest])

    def tensor(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    def filled(rows: list[list[int]]) -> Tensor:
        longest = max(map(len, rows), default=0)
        return tensor([row + [0] * (longest - len(row)) for row in rows]).view(len(rows), longest)

    of_stems, of_rests, of_texts = filled(stems), filled(rests), filled(texts)
    places = [0] * len(tokens)
    for rows, longest, first in ((stems, of_stems.shape[1], 0), (rests, of_rests.shape[1], of_stems.numel())):
        for number, row in enumerate(rows):
            for column, token in enumerate(row):
                places[token] = first + number * longest + column
    behind = tensor([len(text) - len(rest) for text, rest in zip(texts, rests, strict=True)])
    last = behind[:, None] + torch.arange(of_rests.shape[1], device=device)
    visible = torch.arange(of_texts.shape[1], device=device) <= last[:, None, :, None]
    packing = PrefixTree(tensor(positions), of_stems, of_rests, of_texts, visible, tensor(places), tensor(asked))
    return tensor([tokens]), packing
