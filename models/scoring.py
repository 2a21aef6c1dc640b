"""Log-likelihoods of continuations, computed once per common prefix.

Texts with a common prefix form a group: the prefix, then the suffix of each text, which attends to the prefix and to
itself. Groups of similar size form a batch, which is one row of tokens. The last block and the logits are computed for
scored positions only.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.llama import Llama
from models.prefix_tree import PrefixTree

#: A text joins a group if that saves at least this fraction of the tokens of the shortest text.
MIN_PREFIX_SAVING = 0.25

#: Limit of the tokens of all texts of a group, as a multiple of the context: attention holds each text in full.
MAX_GROUP_FACTOR = 4


class Text(NamedTuple):
    """A text whose last `scored` tokens, fewer than all, are scored."""

    tokens: Sequence[int]
    scored: int


def split_long(text: Text, context: int) -> list[Text]:
    """Return a text as several, the last part first, if more of its tokens are scored than fit the context."""
    parts = []
    tokens, scored = text
    while scored > context:
        parts.append(Text(tokens, context))
        tokens, scored = tokens[:-context], scored - context
    return [*parts, Text(tokens, scored)]


class Score(NamedTuple):
    """Score of the end of a text: its log-likelihood in nats, and whether each token is the greedy one."""

    log_likelihood: float
    greedy: bool


class PrefixGroup(NamedTuple):
    """Token ids of the texts at some indices: a common prefix, and the suffixes without their last tokens.

    The last tokens are targets only.
    """

    prefix: list[int]
    suffixes: list[list[int]]
    indices: list[int]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.prefix) + sum(map(len, self.suffixes))

    @property
    def longest(self) -> int:
        """Number of tokens of the longest text."""
        return len(self.prefix) + max(map(len, self.suffixes))


def group_by_prefix(texts: Sequence[Text], context: int) -> list[PrefixGroup]:
    """Group texts by their prefixes. Those with more than `context` tokens before the last lose their beginnings."""
    for text in texts:
        if not 0 < text.scored < len(text.tokens) or text.scored > context:
            raise ValueError(
                f"{text.scored} of {len(text.tokens)} tokens cannot be scored: there must be one at least, fewer than "
                f"all, and no more than {context}"
            )
    inputs = [list(text.tokens[-context - 1 : -1]) for text in texts]
    groups: list[tuple[list[int], int]] = []  # indices of texts, and the length of their prefix
    tokens = shortest = 0  # of the last group's texts, prefixes included
    for index in sorted(range(len(texts)), key=inputs.__getitem__):
        length = len(inputs[index])
        tokens, shortest = tokens + length, min(shortest, length)
        if groups:
            members, old_prefix = groups[-1]
            prefix = _common_length(inputs[members[0]], inputs[index], old_prefix)
            saved = prefix * len(members) - old_prefix * (len(members) - 1)
            if saved >= max(1.0, MIN_PREFIX_SAVING * shortest) and tokens <= MAX_GROUP_FACTOR * context:
                members.append(index)
                groups[-1] = members, prefix
                continue
        groups.append(([index], length))
        tokens = shortest = length
    return [
        PrefixGroup(inputs[members[0]][:prefix], [inputs[index][prefix:] for index in members], members)
        for members, prefix in groups
    ]


def _common_length(a: list[int], b: list[int], limit: int) -> int:
    """Return the length of the common prefix of two lists, at most `limit`."""
    for count, (x, y) in enumerate(zip(a[:limit], b, strict=False)):
        if x != y:
            return count
    return min(limit, len(a), len(b))


def batches(groups: Sequence[PrefixGroup], batch_tokens: int) -> list[list[PrefixGroup]]:
    """Return groups in batches, the longest texts first.

    A batch has at most `batch_tokens` tokens, or is a single group. Groups of one text, which are all prefix, have
    batches of their own. Attention pads the texts of a batch to the longest, so that their padded size is limited too.
    """
    result: list[list[PrefixGroup]] = []
    for single in (False, True):
        tokens = padded = longest = 0
        same_kind = [group for group in groups if (len(group.indices) == 1) == single]
        for group in sorted(same_kind, key=lambda group: -group.longest):
            tokens += group.tokens
            padded += len(group.indices) * longest
            if not longest or tokens > batch_tokens or padded > MAX_GROUP_FACTOR * batch_tokens:
                longest = group.longest
                tokens, padded = group.tokens, len(group.indices) * longest
                result.append([])
            result[-1].append(group)
    return result


def score(
    model: Llama, texts: Sequence[Text], batch_tokens: int, device: torch.device, rank: int = 0, world_size: int = 1
) -> dict[int, Score]:
    """Return the scores of texts by their indices, those of every `world_size`-th batch.

    All ranks compute the same number of batches, as sharded models need.
    """
    scores: dict[int, Score] = {}
    all_batches = batches(group_by_prefix(texts, model.config.max_position_embeddings), batch_tokens)
    for number in range(rank, -(-len(all_batches) // world_size) * world_size, world_size):
        batch = all_batches[min(number, len(all_batches) - 1)]
        indices = [index for group in batch for index in group.indices]
        targets = [list(texts[index].tokens[-texts[index].scored :]) for index in indices]
        tokens, tree = pack(batch, list(map(len, targets)), device)
        flat_targets = torch.tensor([token for ids in targets for token in ids], device=device)
        log_probs, greedy = (values.tolist() for values in model.score(tokens, tree, flat_targets))
        start = 0
        for index, ids in zip(indices, targets, strict=True):
            end = start + len(ids)
            scores[index] = Score(sum(log_probs[start:end]), all(greedy[start:end]))
            start = end
    return scores


def pack(batch: Sequence[PrefixGroup], scored: Sequence[int], device: torch.device) -> tuple[Tensor, PrefixTree]:
    """Return groups as one row of tokens, (1, seq), and its layout; queries are the tokens before scored ones.

    The number of scored tokens of each text is given in the order of the groups.
    """
    tokens: list[int] = []
    positions: list[int] = []
    prefixes: list[list[int]] = []
    suffixes: list[list[int]] = []
    sequences: list[list[int]] = []
    queries: list[int] = []
    counts = iter(scored)
    for group in batch:
        prefix = [*range(len(tokens), len(tokens) + len(group.prefix))]
        prefixes.append(prefix)
        tokens += group.prefix
        positions += range(len(prefix))
        for ids in group.suffixes:
            suffix = [*range(len(tokens), len(tokens) + len(ids))]
            queries += [*prefix, *suffix][-next(counts) :]
            tokens += ids
            positions += range(len(prefix), len(prefix) + len(suffix))
            if suffix:
                suffixes.append(suffix)
                sequences.append([*prefix, *suffix])

    def tensor(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    def padded(rows: list[list[int]]) -> Tensor:
        longest = max(map(len, rows), default=0)
        return tensor([row + [0] * (longest - len(row)) for row in rows]).view(len(rows), longest)

    prefix_index, suffix_index, sequence_index = padded(prefixes), padded(suffixes), padded(sequences)
    gather = [0] * len(tokens)
    for rows, index, offset in ((prefixes, prefix_index, 0), (suffixes, suffix_index, prefix_index.numel())):
        for number, row in enumerate(rows):
            for column, token in enumerate(row):
                gather[token] = offset + number * index.shape[1] + column
    starts = tensor([len(sequence) - len(suffix) for sequence, suffix in zip(sequences, suffixes, strict=True)])
    last_visible = starts[:, None] + torch.arange(suffix_index.shape[1], device=device)
    visible = torch.arange(sequence_index.shape[1], device=device) <= last_visible[:, None, :, None]
    tree = PrefixTree(
        tensor(positions), prefix_index, suffix_index, sequence_index, visible, tensor(gather), tensor(queries)
    )
    return tensor([tokens]), tree
