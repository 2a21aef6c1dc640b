"""Attention within a row of tokens in which several sequences share their prefixes."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class PrefixTree(NamedTuple):
    """Layout of several sequences in one row of tokens, in which a prefix that sequences share stands once.

    A sequence attends to its prefix and its own suffix only. Index tensors are padded with 0.

    Attributes:
        positions: (seq,) position of each token in its sequence.
        prefixes: (num_prefixes, longest) indices in the row of each prefix's tokens.
        suffixes: (num_suffixes, longest) indices of each suffix's tokens; no rows where each prefix is a sequence.
        sequences: (num_suffixes, longest) indices of the tokens of the same sequences, prefix and suffix.
        visible: (num_suffixes, 1, longest suffix, longest sequence), true where a token of `suffixes` attends to one of
            `sequences`.
        gather_index: (seq,) index of each token of the row in the flattened `prefixes` followed by `suffixes`.
        query_index: (n,) indices in the row of the tokens whose hidden states are returned.
    """

    positions: Tensor
    prefixes: Tensor
    suffixes: Tensor
    sequences: Tensor
    visible: Tensor
    gather_index: Tensor
    query_index: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grouped: bool, queries_only: bool) -> Tensor:
        """Return the attention output of each token of q, (1, seq, hidden).

        Args:
            q: (1, heads, seq, head_dim); with `queries_only` seq is n, the tokens at `query_index`.
            k, v: (1, key-value heads, seq, head_dim); `grouped` says whether they have fewer heads than q.
        """
        prefixes, suffixes, gather_index = self.prefixes, self.suffixes, self.gather_index
        if queries_only:
            row_to_query = torch.zeros_like(gather_index)
            row_to_query[self.query_index] = torch.arange(len(self.query_index), device=gather_index.device)
            prefixes, suffixes = row_to_query[prefixes], row_to_query[suffixes]
            gather_index = gather_index[self.query_index]
        k_prefix, v_prefix = _gather(k, self.prefixes), _gather(v, self.prefixes)
        outputs = [
            F.scaled_dot_product_attention(_gather(q, prefixes), k_prefix, v_prefix, is_causal=True, enable_gqa=grouped)
        ]
        if len(suffixes):
            k_all, v_all = _gather(k, self.sequences), _gather(v, self.sequences)
            outputs.append(
                F.scaled_dot_product_attention(_gather(q, suffixes), k_all, v_all, self.visible, enable_gqa=grouped)
            )
        rows = torch.cat([output.transpose(1, 2).flatten(2).flatten(0, 1) for output in outputs])
        return rows.index_select(0, gather_index).unsqueeze(0)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Return (rows, heads, longest, head_dim) of x: (1, heads, seq, head_dim) at an index of (rows, longest)."""
    tokens = x.squeeze(0).transpose(0, 1).index_select(0, index.flatten())
    return tokens.unflatten(0, index.shape).transpose(1, 2)
