"""config.json of Hugging Face folders: its fields, the values that transformers gives to absent ones, and our shape."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from common.settings import parse
from models.config import LlamaConfig

#: Fields that every model of ours has with these values, which are the format's defaults too.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


class RopeParameters(BaseModel):
    """Rotary positions: `rope_parameters` of transformers 5, `rope_scaling` of transformers 4."""

    model_config = ConfigDict(strict=True)

    rope_type: str | None = None
    type: str | None = None  # older than rope_type
    rope_theta: float | None = None
    partial_rotary_factor: float = 1.0


class LlamaFormat(BaseModel):
    """config.json of a `LlamaForCausalLM`, with the defaults that transformers has; other fields are ignored."""

    model_config = ConfigDict(strict=True)

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    rope_theta: float | None = None
    rope_parameters: RopeParameters | None = None
    rope_scaling: RopeParameters | None = None
    quantization_config: dict[str, Any] | None = None

    @property
    def rope(self) -> RopeParameters:
        """The rotary positions, wherever they are written."""
        return self.rope_parameters or self.rope_scaling or RopeParameters()

    def shape(self) -> LlamaConfig:
        """Return the shape of the model; raise `ConfigError` if no such model is possible."""
        values = {name: value for name, value in vars(self).items() if name in LlamaConfig.model_fields}
        return parse(
            LlamaConfig,
            values
            | {
                "num_key_value_heads": self.num_key_value_heads or self.num_attention_heads,
                "rope_theta": self.rope.rope_theta or self.rope_theta or 10000.0,
                "qk_norm": isinstance(self, Qwen3Format),
            },
        )

    def differences(self, config: LlamaConfig) -> dict[str, Any]:
        """Return the fields that no `Llama` of this shape can have, with their values."""
        other_layers = [name for name in self.layer_types or () if name != "full_attention"]
        checks = {name: (getattr(self, name), value) for name, value in FIXED.items()} | {
            "attention_dropout": (self.attention_dropout, 0.0),
            "use_sliding_window": (self.use_sliding_window, False),
            "layer_types": (other_layers, []),
            "quantization_config": (self.quantization_config, None),
            "rope_type": (self.rope.rope_type or self.rope.type or "default", "default"),
            "partial_rotary_factor": (self.rope.partial_rotary_factor, 1.0),
            "head_dim": (self.head_dim or config.head_dim, config.head_dim),
        }
        return {name: value for name, (value, required) in checks.items() if value != required}


class Qwen3Format(LlamaFormat):
    """config.json of a `Qwen3ForCausalLM`, whose queries and keys are normed."""

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    head_dim: int | None = 128
    max_position_embeddings: int = 32768


#: Formats by the field `model_type`.
FORMATS = {"llama": LlamaFormat, "qwen3": Qwen3Format}
