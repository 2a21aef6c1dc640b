"""The LLaMA architecture. torch only; takes token ids, returns logits or loss."""

from models.llama import Llama, LlamaConfig

__all__ = ["Llama", "LlamaConfig"]
