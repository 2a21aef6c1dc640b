"""Export to and import from folders that Hugging Face's `from_pretrained` reads: safetensors and config.json.

Parameters have the names that transformers gives them, so none is renamed. A model with `qk_norm` is a
`Qwen3ForCausalLM` there, every other a `LlamaForCausalLM`.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError, one_line
from common.reading import Record, open_regular, parse_record, read_bytes
from models.config import LlamaConfig
from models.hugging_face_config import FIXED, FORMATS
from models.llama import Llama

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: Most layers of a model in a folder; the largest models have less than 200.
MOST_LAYERS = 1000


class _Typed(Record):
    """config.json of any model."""

    model_type: str


class _Index(Record):
    """The index of weights in several files."""

    weight_map: dict[str, str]


#: Fields of a shape that config.json has not, or elsewhere.
_OURS = ("qk_norm", "rope_theta", "embedding_initializer_range")
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def export(state: Mapping[str, Tensor], config: LlamaConfig, folder: Path, end_of_text: int | None = None) -> None:
    """Write `Llama.state_dict()`, in its dtype, into a folder, which is made, in files of at most 5 GB.

    `end_of_text` is the id of the token that ends a text.
    """
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    model_type = "qwen3" if config.qk_norm else "llama"
    content = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
        **{name: value for name, value in config.shape.items() if name not in _OURS},
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,  # read by transformers 4; transformers 5 reads rope_parameters
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **FIXED,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor for name, tensor in state.items() if not _is_tied(name, config)}
    try:
        save_torch_state_dict({name: tensor.contiguous() for name, tensor in weights.items()}, folder)
    except SafetensorError as error:  # of a full disk, with the system's error number in its message alone
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder / WEIGHTS)) from error
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / CONFIG, file)  # safetensors makes files that only their owner can read


def config_of(folder: Path) -> LlamaConfig:
    """Return the shape of the model in a folder; raise `ConfigError` if it is not such a folder, or no such model."""
    try:
        content = read_bytes(folder / CONFIG)
        model_type = parse_record(_Typed, content).model_type
    except (OSError, ValueError) as error:
        allowed = f"it must be a folder with a {CONFIG} and safetensors"
        raise ConfigError("init_from", folder, problem=f"{_cannot_be_read(error)}: {allowed}") from error
    if model_type not in FORMATS:
        raise _other_architecture(folder, {"model_type": model_type[:40]})
    try:
        described = parse_record(FORMATS[model_type], content)
        config = described.shape()
    except ConfigError as error:
        raise ConfigError("init_from", folder, problem=f"is not possible ({CONFIG} has {error})") from error
    except ValueError as error:
        problem = f"cannot be read ({CONFIG} has {one_line(error)})"
        raise ConfigError("init_from", folder, problem=problem) from error
    different = described.differences(config)
    if different:
        raise _other_architecture(folder, different)
    return config


def load(model: Llama, folder: Path, copy_weight: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
    """Copy the weights in a folder into a model; raise `ConfigError` if they are not those of the model.

    `copy_weight` copies a full weight on the CPU into a parameter.
    """
    parameters = model.state_dict()
    for name, weight in _weights(folder, model.config, read=True):
        with torch.no_grad():
            copy_weight(parameters[name], weight)


def check_weights(folder: Path, config: LlamaConfig) -> None:
    """Raise what `load` would raise for a model of this shape. Reads only the headers of the files."""
    for _ in _weights(folder, config, read=False):
        pass


def _weights(folder: Path, config: LlamaConfig, read: bool) -> Iterator[tuple[str, Any]]:
    """Yield the name of each weight in a folder once, with the weight, or `None` if only headers are read."""
    from safetensors import SafetensorError, safe_open

    if config.num_hidden_layers > MOST_LAYERS:  # a model of many takes hours to make, even without storage
        problem = f"has num_hidden_layers={config.num_hidden_layers} in {CONFIG}: it must be at most {MOST_LAYERS}"
        raise ConfigError("init_from", folder, problem=problem)
    with torch.device("meta"):
        state = Llama(config).state_dict()
    missing = {name: tuple(tensor.shape) for name, tensor in state.items() if not _is_tied(name, config)}
    try:
        for file in _weight_files(folder):
            open_regular(file).close()
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - it is no dict
                    if _is_tied(name, config) or name.endswith("rotary_emb.inv_freq"):
                        continue
                    shape = tuple(weights.get_slice(name).get_shape())
                    if (expected := missing.pop(name, "not in the model")) != shape:
                        raise ValueError(f"{name} is {shape} in {file}, and {expected} here")
                    yield name, weights.get_tensor(name) if read else None
        if missing:
            raise ValueError(f"{len(missing)} weights are missing, {min(missing)} among them")
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ConfigError("init_from", folder, problem=_cannot_be_read(error)) from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        names = set(parse_record(_Index, read_bytes(folder / INDEX)).weight_map.values())
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{INDEX} names {outside[0][:80]}, which is not the name of a file in the folder")
        return [folder / name for name in sorted(names)]
    if not (folder / WEIGHTS).exists():
        raise ValueError(f"there is no {WEIGHTS}")
    return [folder / WEIGHTS]


def _is_tied(name: str, config: LlamaConfig) -> bool:
    return config.tie_word_embeddings and name == "lm_head.weight"


def _cannot_be_read(error: Exception) -> str:
    return f"cannot be read ({one_line(error, 200)})"


def _other_architecture(folder: Path, different: Mapping[str, Any]) -> ConfigError:
    differences = ", ".join(f"{name}={value}" for name, value in different.items())
    allowed = (
        "it must be a LLaMA, or a Qwen3 whose heads make up hidden_size, without biases and with plain rotary positions"
    )
    return ConfigError("init_from", folder, problem=f"is another architecture ({differences}): {allowed}")
