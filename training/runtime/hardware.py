"""How fast a run could be: the arithmetic of its model, and what devices do at most."""

from models import LlamaConfig

#: Dense bf16 operations a second that NVIDIA states for a device, by a part of the name that torch gives it.
PEAK_FLOPS = {
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "L4": 121e12,
    "4090": 165.2e12,
    "3090": 71e12,
}


def flops_per_token(config: LlamaConfig, sequence_length: int) -> float:
    """Return the operations of forward and backward pass for one token.

    Six for each weight that is multiplied, the embeddings being looked up; for attention twelve for each layer, channel
    and position, as if it were not causal (PaLM, appendix B). The paper's 1B model has 6.43e9.
    """
    multiplied = config.parameters - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    return 6 * multiplied + 12 * config.num_hidden_layers * config.hidden_size * sequence_length


def peak(device: str) -> float | None:
    """Return the dense bf16 operations a second of a device, by its name; `None` if it is not known."""
    return next((value for part, value in PEAK_FLOPS.items() if part in device), None)
