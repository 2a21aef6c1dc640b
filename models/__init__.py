"""The LLaMA architecture. Takes token ids, returns logits or loss."""

from models.config import LlamaConfig, ModelConfig
from models.llama import Llama

__all__ = ["Llama", "LlamaConfig", "ModelConfig"]
