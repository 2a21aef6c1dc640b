"""LLaMA, the architecture of the paper (Table 4). `LlamaConfig` sets its size.

Pre-norm blocks of rotary attention with grouped-query heads and SwiGLU, RMSNorm throughout, no biases.
Modules and parameters have the names of Hugging Face's `LlamaForCausalLM`, and the rotary embedding has its
convention (the two halves of a head rotate together), so weights are exchanged without conversion.
"""

from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import LlamaConfig
from models.loss import chunk_rows, linear_cross_entropy
from models.prefix_tree import PrefixTree


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
        self, x: Tensor, cos: Tensor, sin: Tensor, tree: PrefixTree | None = None, queries_only: bool = False
    ) -> Tensor:
        """Return the attention output, (batch, seq, hidden), or (1, n, hidden) with `queries_only`.

        Args:
            x: (batch, seq, hidden); batch is 1 with a tree.
            cos, sin: (seq, head_dim), see `rotary`.
            tree: layout of several sequences in the row; `None`: each row is one sequence.
            queries_only: whether to compute only the tokens at the tree's `query_index`.
        """
        x_q, cos_q, sin_q = x, cos, sin
        if tree is not None and queries_only:
            x_q, cos_q, sin_q = x[:, tree.query_index], cos[tree.query_index], sin[tree.query_index]
        q, k, v = (
            proj(inputs).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (batch, heads, seq, head_dim)
            for proj, inputs in ((self.q_proj, x_q), (self.k_proj, x), (self.v_proj, x))
        )
        q, k = rotate(self.q_norm(q), cos_q, sin_q), rotate(self.k_norm(k), cos, sin)
        if tree is not None:
            return self.o_proj(tree.attend(q, k, v, self.grouped, queries_only))
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
    """Transformer block: attention and feed-forward, each with a norm before it and a residual connection."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, tree: PrefixTree | None = None, queries_only: bool = False
    ) -> Tensor:
        """Return the hidden states after the block; arguments and shapes are those of `Attention.forward`."""
        attended = self.self_attn(self.input_layernorm(x), cos, sin, tree, queries_only)
        x = attended + (x[:, tree.query_index] if tree is not None and queries_only else x)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm (`model` in Hugging Face's names)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, tokens: Tensor, tree: PrefixTree | None = None) -> Tensor:
        """Return the final hidden states of (batch, seq) token ids: (batch, seq, hidden).

        With a tree, batch is 1, and the states are those at its `query_index`: (1, n, hidden).
        """
        x = self.embed_tokens(tokens)
        cos, sin = rotary(self.config, tokens.shape[1], x.device, x.dtype)
        if tree is not None:
            cos, sin = cos[tree.positions], sin[tree.positions]
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, cos, sin, tree)
        return self.norm(last(x, cos, sin, tree, queries_only=tree is not None))


class Llama(nn.Module):
    """A LLaMA language model.

    Initial weights are normal with standard deviation `initializer_range`, those of the embedding with
    `embedding_initializer_range` if it is set; norms start at 1. With the default of 0.02 the untrained 1B model has a
    loss of 11.5 (ln 65536 + hidden_size 0.02^2 / 2).
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
        """Make embedding and head share their weight if `tie_word_embeddings` is set."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, copy_weight: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Draw the weights from torch's global CPU generator; `copy_weight` copies a full weight into a parameter."""
        others = self.config.initializer_range
        embeddings = self.config.embedding_initializer_range or others
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                weight = torch.empty(module.weight.shape, device="cpu")
                is_embedding = module.weight is self.model.embed_tokens.weight
                copy_weight(module.weight, weight.normal_(std=embeddings if is_embedding else others))
            elif isinstance(module, nn.RMSNorm):
                copy_weight(module.weight, torch.ones(module.weight.shape, device="cpu"))

    @overload
    def forward(self, tokens: Tensor) -> Tensor: ...
    @overload
    def forward(
        self, tokens: Tensor, targets: Tensor, z_loss: float = 0.0, instance_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        z_loss: float = 0.0,
        instance_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits, (batch, seq, vocab), of (batch, seq) token ids.

        With the ids of the next tokens as targets, return what `linear_cross_entropy` returns. Sequences where the
        instance mask, (batch,) bool, is false count as sequences without any loss.
        """
        hidden = self.model(tokens)
        if targets is None:
            return self.lm_head(hidden)
        mask = None if instance_mask is None else instance_mask[:, None].expand(targets.shape).flatten()
        return self.loss(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(), z_loss, mask=mask)

    @torch.no_grad()
    def score(self, tokens: Tensor, tree: PrefixTree, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of target tokens in nats, (n,) float32, and which are the greedy ones.

        The greedy token is the first of the most likely ones, as in `torch.argmax` and lm-eval's `hf` backend.

        Args:
            tokens: (1, seq) token ids.
            tree: layout of the sequences in the row; the targets follow the tokens at its `query_index`.
            targets: (n,) ids.
        """
        hidden = self.model(tokens, tree).squeeze(0)
        rows = chunk_rows(len(targets), self.config.vocab_size, hidden.device.type)
        target_log_probs, greedy = [], []
        for chunk, chunk_targets in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = self.lm_head(chunk).float()
            index = chunk_targets[:, None]
            target_log_probs.append(logits.log_softmax(1).gather(1, index).squeeze(1))
            greedy.append(is_argmax(logits, index))
        return torch.cat(target_log_probs), torch.cat(greedy)


def is_argmax(logits: Tensor, index: Tensor) -> Tensor:
    """Return whether each row's index, (n, 1), is the first of the largest elements of the row: (n,) bool."""
    is_max = logits.gather(1, index).squeeze(1) == logits.amax(1)
    rows = is_max.nonzero().squeeze(1)
    is_max[rows] = logits[rows].argmax(1) == index[rows].squeeze(1)  # on a CPU, argmax takes ten times as long as amax
    return is_max


def rotary(config: LlamaConfig, seq: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and signed sine of the rotation angles for `rotate`, each (seq, head_dim), computed in float32."""
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    angles = torch.outer(torch.arange(seq, device=device, dtype=torch.float32), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + head_dim / 2) of x: (..., seq, head_dim) by its position's angle.

    The sine is negative in the first half: x_i cos - x_j sin there, and x_j cos + x_i sin in the second half.
    """
    return (x * cos).add_(x.roll(x.shape[-1] // 2, dims=-1).mul_(sin))
