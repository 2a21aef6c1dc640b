"""How likely continuations are: what several texts begin with is computed once.

Texts that follow each other and begin alike make a tree: the common beginning, then the rest of each, which sees the
beginning and itself. Trees of about the same size make a batch. Logits are made of what is scored alone.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.llama import Llama

#: Texts share their beginning if it is this part of the shorter one, at least.
WORTH_SHARING = 0.25


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
    """Texts that begin alike, laid out one behind the other.

    Attributes:
        tokens: the common beginning, then the rest of each, without their last tokens, which nothing follows.
        positions: of each token in its text.
        branch: 0 for the beginning, then numbers from 1.
        where: of each text, the indices of what its scored tokens follow.
        texts: numbers of the texts.
    """

    tokens: list[int]
    positions: list[int]
    branch: list[int]
    where: list[list[int]]
    texts: list[int]


def trees(texts: Sequence[Text], longest: int, share: bool = True) -> list[Tree]:
    """Lay out texts.

    Args:
        texts: those that may begin alike follow each other.
        longest: tokens that the model takes: of longer texts, whose last one it need not see, it sees the end.
        share: whether to share beginnings.
    """
    found: list[Tree] = []
    group: list[tuple[int, list[int], int]] = []
    shared = 0
    for number, text in enumerate(texts):
        if not 0 < text.scored < len(text.tokens) or text.scored > longest:
            raise ValueError(
                f"{text.scored} of {len(text.tokens)} tokens cannot be scored: there must be one at least, fewer than "
                f"all, and no more than {longest}"
            )
        seen = list(text.tokens[-longest - 1 : -1])
        if group and share:
            common = _common(group[0][1], seen, shared)
            if common >= max(1.0, WORTH_SHARING * min(len(seen), *(len(each) for _, each, _ in group))):
                shared = common
                group.append((number, seen, text.scored))
                continue
        if group:
            found.append(_tree(group, shared))
        group, shared = [(number, seen, text.scored)], len(seen)
    return [*found, _tree(group, shared)] if group else []


def _common(one: list[int], other: list[int], most: int) -> int:
    """Return how many tokens are the same from the first, up to so many."""
    for count, (a, b) in enumerate(zip(one[:most], other, strict=False)):
        if a != b:
            return count
    return min(most, len(one), len(other))


def _tree(group: list[tuple[int, list[int], int]], shared: int) -> Tree:
    tokens, branch = group[0][1][:shared], [0] * shared
    positions = list(range(shared))
    where = []
    for number, (_, seen, scored) in enumerate(group, 1):
        behind = len(tokens) - shared  # of a position in the text, for those that are not shared
        first = len(seen) - scored
        where.append([at if at < shared else at + behind for at in range(first, len(seen))])
        tokens += seen[shared:]
        positions += range(shared, len(seen))
        branch += [number] * (len(seen) - shared)
    return Tree(tokens, positions, branch, where, [number for number, _, _ in group])


def batches(laid: Sequence[Tree], batch_tokens: int) -> list[list[Tree]]:
    """Return trees in batches of at most so many tokens, padding included, but of one tree at least.

    The longest come first. Those of a single text are by themselves, as they need no mask.
    """
    found: list[list[Tree]] = []
    for shared in (True, False):
        alike = [tree for tree in laid if (len(tree.texts) > 1) == shared]
        first = len(found)
        for tree in sorted(alike, key=lambda tree: -len(tree.tokens)):
            if len(found) > first and (len(found[-1]) + 1) * len(found[-1][0].tokens) <= batch_tokens:
                found[-1].append(tree)
            else:
                found.append([tree])
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
        texts: those that may begin alike follow each other.
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
    width = max(len(tree.tokens) for tree in batch)

    def padded(rows: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=device)

    tokens = padded([tree.tokens for tree in batch], 0)
    positions = padded([tree.positions for tree in batch], 0)
    where = [row * width + at for row, tree in enumerate(batch) for some in tree.where for at in some]
    mask = None
    if any(len(tree.texts) > 1 for tree in batch):
        branch = padded([tree.branch for tree in batch], -1)
        before = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        mask = before & ((branch[:, None] == branch[:, :, None]) | (branch[:, None] == 0))
        mask = mask.unsqueeze(1)
    targets = torch.tensor([token for some in wanted for token in some], device=device)
    found, best = model.score(tokens, positions, mask, torch.tensor(where, device=device), targets)
    return found.tolist(), best.tolist()
