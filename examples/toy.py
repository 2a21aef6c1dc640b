"""The model and the batches of the examples: a language of 64 tokens, of which each has four successors.

Its loss cannot fall below log 4 = 1.39 nats. A bad batch is one token, repeated, as broken data often is.
"""

import torch
from torch import nn
from torch.nn import functional as F

TOKENS, LENGTH, SEQUENCES = 64, 16, 16
#: Steps of a run, and those of them that get a bad batch.
STEPS, BAD_STEPS = 100, (70, 71, 72)


class TinyLM(nn.Module):
    """A causal transformer of one layer and 17,000 parameters, which returns its loss."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, width)
        self.positions = nn.Parameter(torch.zeros(LENGTH, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, TOKENS))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy, in nats, of (sequences, length + 1) tokens."""
        hidden = self.block(self.embed(tokens[:, :-1]) + self.positions, self.mask, is_causal=True)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), tokens[:, 1:].flatten())


def make_batches(bad_steps: tuple[int, ...] = BAD_STEPS) -> torch.Tensor:
    """Return (steps, sequences, length + 1) tokens. They are always the same, but for those of the bad steps."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(TOKENS, (TOKENS, 4), generator=generator)
    tokens = [torch.randint(TOKENS, (STEPS, SEQUENCES), generator=generator)]
    for _ in range(LENGTH):
        choice = torch.randint(4, (STEPS, SEQUENCES, 1), generator=generator)
        tokens.append(successors[tokens[-1]].gather(2, choice).squeeze(2))
    batches = torch.stack(tokens, dim=2)
    batches[list(bad_steps)] = 7
    return batches
