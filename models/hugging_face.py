"""To and from folders that Hugging Face's `from_pretrained` reads: safetensors and config.json.

Our parameters have the names that transformers gives them, so nothing is renamed. A model with `qk_norm` is a
`Qwen3ForCausalLM` there, every other a `LlamaForCausalLM`.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.settings import parse
from models.config import LlamaConfig
from models.llama import Llama

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: What must hold of a config.json beside the shape, and the value if it is not said.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "rope_type": "default",
}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def export(state: Mapping[str, Tensor], config: LlamaConfig, folder: Path, end_of_text: int | None = None) -> None:
    """Write a model into a folder, in files of at most 5 GB.

    Args:
        state: `Llama.state_dict()`, in the dtype to be written.
        config: of the model.
        folder: made if it is not there.
        end_of_text: id of the token that ends a text.
    """
    from huggingface_hub import save_torch_state_dict

    kind = "qwen3" if config.qk_norm else "llama"
    facts = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
        **{name: value for name, value in config.shape.items() if name not in ("qk_norm", "rope_theta")},
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,  # where transformers 4 looks; transformers 5 looks below
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **{name: value for name, value in _FIXED.items() if name != "rope_type"},
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor for name, tensor in state.items() if not _is_tied(name, config)}
    save_torch_state_dict({name: tensor.contiguous() for name, tensor in weights.items()}, folder)
    (folder / CONFIG).write_text(json.dumps(facts, indent=2) + "\n")
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / CONFIG, file)  # it was made for its owner only


def config_of(folder: Path) -> LlamaConfig:
    """Return the shape of the model in a folder.

    Raises:
        ValueError: there is none, or it is of an architecture that is not ours.
    """
    file = folder / CONFIG
    try:
        facts = json.loads(file.read_text())
        kind = facts["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"init_from={folder} cannot be read ({_said(error)}): it must be a folder with a {CONFIG} and "
                         "safetensors") from error  # fmt: skip
    rope = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    said = {**facts, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    strange = {name: said[name] for name, value in _FIXED.items() if said.get(name, value) != value}
    if kind not in _ARCHITECTURES:
        strange = {"model_type": kind}
    else:
        values = {name: facts[name] for name in LlamaConfig.model_fields if name in facts}
        values["rope_theta"] = rope.get("rope_theta", facts.get("rope_theta", 10000.0))
        values["num_key_value_heads"] = facts.get("num_key_value_heads") or facts.get("num_attention_heads")
        values["qk_norm"] = kind == "qwen3"
        for name, field in LlamaConfig.model_fields.items():
            if field.is_required() and values.get(name) is None:
                raise ValueError(f"init_from={folder} cannot be read ({CONFIG} is incomplete: it has no {name})")
        config = parse(LlamaConfig, values)
        if facts.get("head_dim") not in (None, config.head_dim):
            strange["head_dim"] = facts["head_dim"]
        if not strange:
            return config
    found = ", ".join(f"{name}={value}" for name, value in strange.items())
    raise ValueError(
        f"init_from={folder} is another architecture ({found}): it must be a LLaMA, or a Qwen3 whose heads make up "
        "hidden_size, without biases and with plain rotary positions"
    )


def load(model: Llama, folder: Path, assign: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
    """Copy the weights in a folder into a model, in the model's dtype.

    Args:
        model: to be filled.
        folder: with the weights.
        assign: puts a whole weight, on the CPU, into a parameter.

    Raises:
        ValueError: a weight is missing, unknown, or of another shape, or cannot be read.
    """
    own = model.state_dict()
    for name, tensor in _weights(folder, model.config, whole=True):
        with torch.no_grad():
            assign(own[name], tensor)


def check_weights(folder: Path, config: LlamaConfig) -> None:
    """Raise what `load` would raise for a model of this shape, as far as the files' headers tell."""
    for _ in _weights(folder, config, whole=False):
        pass


def _weights(folder: Path, config: LlamaConfig, whole: bool) -> Iterator[tuple[str, Any]]:
    """Yield each weight of a folder once, or without reading it its shape."""
    from safetensors import SafetensorError, safe_open

    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in Llama(config).state_dict().items() if not _is_tied(name, config)}
    try:
        for file in _weight_files(folder):
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - it is no dict
                    if _is_tied(name, config) or name.endswith("rotary_emb.inv_freq"):
                        continue
                    shape = tuple(weights.get_slice(name).get_shape())
                    if wanted.get(name) != shape:
                        raise ValueError(
                            f"{name} is {shape} in {file}, and {wanted.get(name, 'not in the model')} here"
                        )
                    del wanted[name]
                    yield name, weights.get_tensor(name) if whole else shape
        if wanted:
            raise ValueError(f"{len(wanted)} weights are missing, {min(wanted)} among them")
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"init_from={folder} cannot be read ({_said(error)})") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        return [folder / name for name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]
    if not (folder / WEIGHTS).exists():
        raise ValueError(f"there is no {WEIGHTS}")
    return [folder / WEIGHTS]


def _is_tied(name: str, config: LlamaConfig) -> bool:
    return config.tie_word_embeddings and name == "lm_head.weight"


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
