"""The batch of a training step."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Sequences to train on.

    Attributes:
        tokens: (rows, length + 1) token ids of any integer type. The inputs are all but the last, the targets all
            but the first.
        targets: (rows, length) token ids to predict instead; `None` predicts those of `tokens`.
        documents: (rows, length) number of the document that each input belongs to, counted from 0 in each row;
            `None` if they were not requested.
    """

    tokens: Tensor
    targets: Tensor | None = None
    documents: Tensor | None = None
