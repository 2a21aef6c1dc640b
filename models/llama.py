"""LLaMA: the paper's architecture (Table 4), small or large by its config alone.

Pre-norm blocks of rotary attention with grouped-query heads and SwiGLU, RMSNorm throughout, no biases.
Modules and parameters carry the names of Hugging Face's `LlamaForCausalLM`, and the rotary embedding its
convention (the two halves of a head rotate together), so weights go over without a change.
"""

from collections.abc import Callable
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import LlamaConfig
from models.loss import chunk_rows, linear_cross_entropy


class PrefixTree(NamedTuple):
    """Texts in one row of tokens, in which what several of them begin with, their stem, stands once.

    Attributes:
        positions: (seq,) of each token in its text.
        stems: (stems, longest) indices in the row of each stem's tokens; it and the next two are filled up with any.
        rests: (rests, longest) of the tokens of each text behind its stem; no rows where each stem is a text.
        texts: (rests, longest) of the tokens of the same texts, from their beginnings.
        visible: (rests, 1, longest rest, longest text), true where one of `rests` sees one of `texts`.
        places: (seq,) of each token of the row the index in the flattened `stems` and, behind them, `rests`.
        asked: (n,) indices in the row of the tokens whose hidden states are asked for.
    """

    positions: Tensor
    stems: Tensor
    rests: Tensor
    texts: Tensor
    visible: Tensor
    places: Tensor
    asked: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grouped: bool, asked_only: bool) -> Tensor:
        """Return what each token of the row, or each that is asked for, sees of its text.

        Args:
            q: (1, heads, seq, head_dim), or n for seq.
            k, v: (1, key-value heads, seq, head_dim).
            grouped: whether there are fewer of these heads.
            asked_only: whether q is of the tokens that are asked for.

        Returns:
            (1, seq, hidden), or (1, n, hidden).
        """
        stems, rests, places = self.stems, self.rests, self.places
        if asked_only:
            of_row = torch.zeros_like(places)
            of_row[self.asked] = torch.arange(len(self.asked), device=places.device)
            stems, rests, places = of_row[stems], of_row[rests], places[self.asked]
        k_stems, v_stems = _at(k, self.stems), _at(v, self.stems)
        seen = [F.scaled_dot_product_attention(_at(q, stems), k_stems, v_stems, is_causal=True, enable_gqa=grouped)]
        if len(rests):
            k_texts, v_texts = _at(k, self.texts), _at(v, self.texts)
            seen.append(
                F.scaled_dot_product_attention(_at(q, rests), k_texts, v_texts, self.visible, enable_gqa=grouped)
            )
        rows = torch.cat([each.transpose(1, 2).flatten(2).flatten(0, 1) for each in seen])
        return rows.index_select(0, places).unsqueeze(0)


def _at(x: Tensor, index: Tensor) -> Tensor:
    """Return (rows, heads, longest, head_dim) of x: (1, heads, seq, head_dim) and indices (rows, longest)."""
    found = x.squeeze(0).transpose(0, 1).index_select(0, index.flatten())
    return found.unflatten(0, index.shape).transpose(1, 2)


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

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, packing: PrefixTree | None = None, asked_only: bool = False
    ) -> Tensor:
        """Return (batch, seq, hidden), or (1, n, hidden) of those that a packing asks for.

        Args:
            x: (batch, seq, hidden), where batch is 1 with a packing.
            cos, sin: (seq, head_dim).
            packing: of texts, which do not see each other; `None`: each sequence is a text.
            asked_only: whether to compute what the packing asks for alone.
        """
        looking, (cos_q, sin_q) = x, (cos, sin)
        if packing is not None and asked_only:
            looking, cos_q, sin_q = x[:, packing.asked], cos[packing.asked], sin[packing.asked]
        q, k, v = (
            proj(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (batch, heads, seq, head_dim)
            for proj, tokens in ((self.q_proj, looking), (self.k_proj, x), (self.v_proj, x))
        )
        q, k = rotate(self.q_norm(q), cos_q, sin_q), rotate(self.k_norm(k), cos, sin)
        if packing is not None:
            return self.o_proj(packing.attend(q, k, v, self.grouped, asked_only))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


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

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, packing: PrefixTree | None = None, asked_only: bool = False
    ) -> Tensor:
        """Take and return what `Attention` does."""
        seen = self.self_attn(self.input_layernorm(x), cos, sin, packing, asked_only)
        x = seen + (x[:, packing.asked] if packing is not None and asked_only else x)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face calls `model`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, tokens: Tensor, packing: PrefixTree | None = None) -> Tensor:
        """Return the hidden states after the last block.

        Args:
            tokens: (batch, seq) ids, where batch is 1 with a packing.
            packing: of texts in the row; `None`: each sequence is a text.

        Returns:
            (batch, seq, hidden), or (1, n, hidden) of those that the packing asks for.
        """
        x = self.embed_tokens(tokens)
        cos, sin = rotary(self.config, tokens.shape[1], x.device, x.dtype)
        if packing is not None:
            cos, sin = cos[packing.positions], sin[packing.positions]
        *others, last = self.layers
        for layer in others:
            x = layer(x, cos, sin, packing)
        return self.norm(last(x, cos, sin, packing, asked_only=packing is not None))


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
    def score(self, tokens: Tensor, packing: PrefixTree, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return how likely some tokens are after others.

        Args:
            tokens: (1, seq) ids.
            packing: of texts in the row; what it asks for is followed.
            targets: (n,) ids of the tokens that follow.

        Returns:
            (n,) float32 logarithms of probabilities, and (n,) bool: whether no other token is more likely.
        """
        hidden = self.model(tokens, packing).squeeze(0)
        rows = chunk_rows(len(targets), self.config.vocab_size, hidden.device.type)
        found, best = [], []
        for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
            log_p = self.lm_head(some).float().log_softmax(1)
            found.append(log_p.gather(1, wanted[:, None]).squeeze(1))
            best.append(found[-1] == log_p.amax(1))
        return torch.cat(found), torch.cat(best)


def rotary(config: LlamaConfig, seq: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotation angles as `rotate` takes them, each (seq, head_dim), made in float32."""
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    angles = torch.outer(torch.arange(seq, device=device, dtype=torch.float32), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of x: (..., seq, head_dim) by its position's angle.

    The first of a pair takes from the second what the sine, negative there, says, and the second from the first.
    """
    return (x * cos).add_(x.roll(x.shape[-1] // 2, dims=-1).mul_(sin))
