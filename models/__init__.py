"""The LLaMA architecture, its scoring, and its exchange with Hugging Face. It takes token ids, and knows no text."""

from models.config import LlamaConfig, ModelConfig
from models.llama import Llama

__all__ = ["Llama", "LlamaConfig", "ModelConfig"]
