"""What a model is trained on."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """TokenDataset to train on.

    Attributes:
        tokens: (rows, length + 1) ids, of any integer type; inputs are all but the last, targets all but the first.
        targets: (rows, length) ids to predict instead; `None`: those of `tokens`.
        documents: (rows, length) of which document each input is, from 0 within the row; `None`: not asked for.
    """

    tokens: Tensor
    targets: Tensor | None = None
    documents: Tensor | None = None
