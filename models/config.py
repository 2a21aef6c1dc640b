"""Settings of the model: the shape of a LLaMA, and the section `model` of a configuration."""

from typing import Annotated, Any, Literal

from pydantic import model_validator

from common.errors import ConfigError
from common.settings import Allowed, Count, Flag, FolderName, PathText, Positive, Settings

#: Name of a data type that weights are computed or written in.
WeightDtype = Annotated[Literal["float32", "bfloat16", "float16"], Allowed("one of float32, bfloat16, float16")]


class LlamaConfig(Settings):
    """Shape and initial weights of a LLaMA, under the field names of Hugging Face's `LlamaConfig`."""

    vocab_size: Count
    """Number of token ids."""
    hidden_size: Count
    """Width of the residual stream."""
    intermediate_size: Count
    """Width of the SwiGLU feed-forward."""
    num_hidden_layers: Count
    """Number of blocks."""
    num_attention_heads: Count
    """Heads of queries. `hidden_size` is a multiple of twice their number."""
    num_key_value_heads: Count
    """Heads of keys and values; a divisor of `num_attention_heads`."""
    max_position_embeddings: Count
    """Context length in tokens."""
    rope_theta: Positive = 10000.0
    """Base of the rotary frequencies."""
    rms_norm_eps: Positive = 1e-5
    """Epsilon of RMSNorm."""
    initializer_range: Positive = 0.02
    """Standard deviation of the initial weights."""
    embedding_initializer_range: Annotated[Positive | None, Allowed("a number above 0, or null")] = None
    """Standard deviation of the initial embeddings, and of a head that shares them; null: that of the other weights.

    Small embeddings make the gradients of the first layers large, which can end in loss spikes (arXiv 2312.16903). No
    field of Hugging Face's.
    """
    tie_word_embeddings: Flag = False
    """Whether the embedding and the head share their weight."""
    qk_norm: Flag = False
    """Whether RMSNorm is applied to queries and keys per head, as in Qwen3.

    It limits the growth of attention logits that can end in loss spikes (arXiv 2302.05442, 2309.14322). A LLaMA has no
    such norm: the model is a `Qwen3ForCausalLM` in transformers.
    """

    @model_validator(mode="after")
    def _check_heads(self) -> "LlamaConfig":
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads):
            required = f"hidden_size={self.hidden_size} must be a multiple of twice the number of heads"
            raise ConfigError("num_attention_heads", heads, problem=f"is not allowed: {required}")
        if heads % kv_heads:
            problem = f"is not allowed: it must divide num_attention_heads={heads}"
            raise ConfigError("num_key_value_heads", kv_heads, problem=problem)
        return self

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

    @property
    def shape(self) -> dict[str, Any]:
        """Values of the fields of `LlamaConfig`, of a subclass too."""
        return {name: getattr(self, name) for name in LlamaConfig.model_fields}


class ModelConfig(LlamaConfig):
    """The section `model`: a shape, its name, and the weights that training starts from."""

    name: FolderName
    """Name of the model, as in run names."""
    init_from: Annotated[PathText | None, Allowed("a Hugging Face folder, or null")] = None
    """Hugging Face folder whose weights training starts from; null: random weights."""

    @property
    def llama(self) -> LlamaConfig:
        """The shape alone."""
        return LlamaConfig(**self.shape)
