"""LLaMA: the paper's architecture (Table 4), small or large by its config alone.

Pre-norm blocks of rotary attention with grouped-query heads and SwiGLU, RMSNorm throughout, no biases.
Modules and parameters carry the names of Hugging Face's `LlamaForCausalLM`, and the rotary embedding its
convention (the two halves of a head rotate together), so weights go over without a change.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.loss import linear_cross_entropy, rows_at_once

_ALLOWED: dict[object, tuple[tuple[type, ...], str]] = {
    int: ((int,), "an integer from 1"),
    float: ((int, float), "a number above 0"),
    bool: ((bool,), "true or false"),
}


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a LLaMA, under the field names of Hugging Face's `LlamaConfig`.

    `qk_norm` is no LLaMA's: it normalises queries and keys head by head, as Qwen3 does (a `Qwen3ForCausalLM` with the
    same names), against the growth of attention logits that can end in spikes (arXiv 2302.05442, 2309.14322).

    Raises:
        ValueError: a size is not positive, or the heads do not divide.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kinds, allowed = _ALLOWED[field.type]
            if type(value) not in kinds or (field.type is not bool and not 0 < value < float("inf")):
                raise ValueError(f"{field.name}={value} is not allowed: it must be {allowed}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads):
            raise ValueError(
                f"num_attention_heads={heads} is not allowed: hidden_size={self.hidden_size} must be a "
                "multiple of twice the number of heads"
            )
        if heads % kv_heads:
            raise ValueError(
                f"num_key_value_heads={kv_heads} is not allowed: it must divide num_attention_heads={heads}"
            )

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        kv_width = self.num_key_value_heads * self.head_dim
        attention = 2 * self.hidden_size * (self.hidden_size + kv_width)
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + norms
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + self.hidden_size

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped-query heads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (batch, seq, hidden); cos, sin: (seq, head_dim), or with a mask as `Decoder` takes it theirs."""
        batch, seq, hidden = x.shape
        q, k, v = (
            proj(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)  # (batch, heads, seq, head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.o_proj(out.transpose(1, 2).reshape(batch, seq, hidden))


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, seq, hidden)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (batch, seq, hidden); the others as in `Attention`."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face calls `model`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the hidden states after the last block.

        Args:
            tokens: (batch, seq) ids.
            positions: (batch, seq) of each token in its text; `None`: in order.
            mask: (batch, 1, seq, seq), true where a token (third) sees another (fourth); `None`: all up to itself.

        Returns:
            (batch, seq, hidden).
        """
        x = self.embed_tokens(tokens)
        cos, sin = rotary(self.config, tokens.shape[1], x.device, x.dtype)
        if positions is not None:
            cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)  # (batch, 1, seq, head_dim)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)


class Llama(nn.Module):
    """A LLaMA language model.

    Weights start from a normal distribution of standard deviation `initializer_range`, norms from 1. With
    0.02 the untrained 1B model has a loss of 11.5 (ln 65536 + hidden_size 0.02^2 / 2).
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss = linear_cross_entropy
        self.tie_weights()
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    def tie_weights(self) -> None:
        """Have embedding and head share their weight, if they are to."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, assign: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Draw the weights anew from torch's global generator.

        Args:
            assign: puts a whole weight, made on the CPU, into a parameter.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                weight = torch.empty(module.weight.shape, device="cpu")
                assign(module.weight, weight.normal_(std=self.config.initializer_range))
            elif isinstance(module, nn.RMSNorm):
                assign(module.weight, torch.ones(module.weight.shape, device="cpu"))

    @overload
    def forward(self, tokens: Tensor) -> Tensor: ...
    @overload
    def forward(self, tokens: Tensor, targets: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, z_loss: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits, or the loss where targets are given.

        Args:
            tokens: (batch, seq) token ids.
            targets: (batch, seq) ids of the tokens that follow.
            z_loss: see `linear_cross_entropy`.

        Returns:
            (batch, seq, vocab) logits; with targets what is to be minimised, and the mean cross entropy in nats, which
            has no gradient: equal without z-loss, both 0-dim float32.
        """
        hidden = self.model(tokens)
        if targets is None:
            return self.lm_head(hidden)
        return self.loss(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(), z_loss)

    @torch.no_grad()
    def score(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, where: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return how likely some tokens are after others.

        Args:
            tokens, positions, mask: as `Decoder` takes them.
            where: (n,) indices into the flattened batch: what is followed.
            targets: (n,) ids of the tokens that follow.

        Returns:
            (n,) float32 logarithms of probabilities, and (n,) bool: whether no other token is more likely.
        """
        hidden = self.model(tokens, positions, mask).flatten(0, 1)[where]
        rows = rows_at_once(len(where), self.config.vocab_size, hidden.device.type)
        found, best = [], []
        for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = self.lm_head(some).float()
            below = logits.gather(1, wanted[:, None]) - (most := logits.amax(1, keepdim=True))
            found.append((below - logits.sub_(most).exp_().sum(1, keepdim=True).log()).squeeze(1))
            best.append(below.squeeze(1) == 0)
        return torch.cat(found), torch.cat(best)


def rotary(config: LlamaConfig, seq: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotation angles, each (seq, head_dim), computed in float32."""
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    angles = torch.outer(torch.arange(seq, device=device, dtype=torch.float32), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of x: (..., seq, head_dim) by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
