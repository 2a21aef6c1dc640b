"""Weights and logits survive the way to transformers and back, for every kind of model that it has a class for."""

import errno
import json
import os
import random
import resource
import stat

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import models
from common.errors import ConfigError
from models import Llama
from models.hugging_face import check_weights, config_of, export, load
from models.hugging_face_config import FORMATS


def shapes() -> list[models.LlamaConfig]:
    """Random shapes: multi-head and grouped-query, tied and untied, with and without normed queries and keys."""
    generator, configs = random.Random(0), []
    for tied in (False, True):
        for qk_norm in (False, True):
            for groups in (1, 2, 4):
                heads = groups * generator.choice([1, 2])
                configs.append(
                    models.LlamaConfig(
                        vocab_size=generator.randint(50, 300),
                        hidden_size=heads * generator.choice([4, 8, 16]),
                        intermediate_size=generator.randint(8, 100),
                        num_hidden_layers=generator.randint(1, 3),
                        num_attention_heads=heads,
                        num_key_value_heads=heads // groups,
                        max_position_embeddings=32,
                        rope_theta=generator.choice([10000.0, 500000.0]),
                        rms_norm_eps=generator.choice([1e-5, 1e-6]),
                        tie_word_embeddings=tied,
                        qk_norm=qk_norm,
                    )
                )
    return configs


def random_model(config: models.LlamaConfig) -> Llama:
    """A model with weights, norms included, that are large enough to affect the logits."""
    torch.manual_seed(0)
    model = Llama(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model.eval()


def logits(model: torch.nn.Module, vocab_size: int) -> torch.Tensor:
    tokens = torch.randint(vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(tokens)
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("config", shapes(), ids=lambda c: f"{c.num_attention_heads}-{c.num_key_value_heads}"
                         f"{'-tied' * c.tie_word_embeddings}{'-qk' * c.qk_norm}")  # fmt: skip
def test_export_and_load_keep_the_logits(config, tmp_path):
    model = random_model(config)
    export(model.state_dict(), config, tmp_path, end_of_text=3)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(reference) is (Qwen3ForCausalLM if config.qk_norm else LlamaForCausalLM)
    assert sum(p.numel() for p in reference.parameters()) == config.parameters
    assert reference.config.eos_token_id == 3 and reference.config.max_position_embeddings == 32
    expected = logits(model, config.vocab_size)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(reference, config.vocab_size), expected, rtol=0, atol=1e-4)
    reference.save_pretrained(tmp_path / "reference", max_shard_size="20KB")
    assert config_of(tmp_path / "reference") == config
    back = Llama(config)
    load(back, tmp_path / "reference")
    torch.testing.assert_close(logits(back, config.vocab_size), expected, rtol=0, atol=0)


def test_other_architectures_and_damaged_folders_are_errors(tmp_path):
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4)
    config = models.LlamaConfig(**shape, num_key_value_heads=4, max_position_embeddings=16)
    for difference, change in (
        ("attention_bias=True", {"attention_bias": True}),
        ("hidden_act=gelu", {"hidden_act": "gelu"}),
        ("rope_type=linear", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
        ("head_dim=16", {"head_dim": 16}),
        ("attention_dropout=0.5", {"attention_dropout": 0.5}),
    ):
        LlamaForCausalLM(LlamaConfig(**shape, **change)).save_pretrained(tmp_path / difference)
        with pytest.raises(ValueError, match=rf"^init_from=\S+ is another architecture \({difference}\): it must be"):
            config_of(tmp_path / difference)
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"is another architecture \(model_type=gpt2\)"):
        config_of(tmp_path / "gpt")
    for content, message in (
        (
            {"model_type": "llama", "vocab_size": "x"},
            r"cannot be read \(config.json has vocab_size='x': Input should be",
        ),
        ({"model_type": "llama", "rope_parameters": [1]}, r"cannot be read \(config.json has rope_parameters=\[1\]"),
        ({"model_type": ["llama"]}, r"cannot be read \(model_type=\['llama'\]: Input should be a valid string\)"),
        (
            {"model_type": "llama", "rms_norm_eps": float("nan")},
            r"is not possible \(config.json has rms_norm_eps=nan is",
        ),
        (
            {"model_type": "llama", "vocab_size": True},
            r"cannot be read \(config.json has vocab_size=True: Input should",
        ),
        ({"model_type": "llama", "vocab_size": 10**4000}, r"is not possible \(config.json has vocab_size=10000"),
        ({"model_type": "llama", "layer_types": "\ud800"}, r"cannot be read \("),
        (
            {"model_type": "llama", "hidden_size": 33},
            r"is not possible \(config.json has num_attention_heads=32 is not allowed",
        ),
        ([], r"cannot be read"),
    ):
        (tmp_path / "gpt" / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"init_from=\S+gpt {message}"):
            config_of(tmp_path / "gpt")
    with pytest.raises(
        ValueError, match=r"init_from=\S+none cannot be read .*: it must be a folder with a config.json"
    ):
        config_of(tmp_path / "none")

    folder = tmp_path / "exported"
    export(random_model(config).state_dict(), config, folder)
    check_weights(folder, config)
    weights = folder / "model.safetensors"
    for change, damage, message in (
        ({"vocab_size": 65}, None, r"init_from=\S+ cannot be read \(\S+ is \(64, 32\)"),
        ({"num_hidden_layers": 2}, None, "9 weights are missing, model.layers.1.input_layernorm.weight among them"),
        ({}, lambda: weights.write_bytes(weights.read_bytes()[:-100]), r"init_from=\S+ cannot be read \("),
        ({}, weights.unlink, r"init_from=\S+ cannot be read \(there is no model.safetensors\)"),
    ):
        if damage is not None:
            damage()
        other = models.LlamaConfig(**{**vars(config), **change})
        with pytest.raises(ValueError, match=message):
            load(Llama(other), folder)
        with pytest.raises(ValueError, match=message):
            check_weights(folder, other)


def test_exported_files_can_be_read_by_those_who_can_read_new_files(tmp_path):
    config = shapes()[0]
    export(random_model(config).state_dict(), config, tmp_path)
    (tmp_path / "new").touch()
    modes = {file.name: stat.filemode(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert set(modes) == {"new", "config.json", "model.safetensors"} and len(set(modes.values())) == 1, modes


def test_qwen3_with_wide_heads_is_an_error(tmp_path):
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4)
    Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=4, head_dim=16)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another architecture \(head_dim=16\)"):
        config_of(tmp_path)


@pytest.mark.parametrize("model_type, theirs", [("llama", LlamaConfig), ("qwen3", Qwen3Config)])
def test_absent_fields_have_the_defaults_of_transformers(model_type, theirs):
    """`rope_theta` and `rope_scaling` are the older names of `rope_parameters`."""
    ours, expected = FORMATS[model_type](), theirs()
    for field in set(type(ours).model_fields) - {"rope_theta", "rope_scaling", "rope_parameters", "layer_types"}:
        value = getattr(ours, field)
        if value is None and field == "num_key_value_heads":
            value = ours.num_attention_heads
        if value is None and field == "head_dim":
            value = ours.hidden_size // ours.num_attention_heads
        default = {"mlp_bias": False, "use_sliding_window": False, "quantization_config": None}.get(field)
        assert value == getattr(expected, field, default), field
    assert expected.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
    assert set(getattr(expected, "layer_types", None) or ["full_attention"]) == {"full_attention"}


def test_a_config_without_optional_fields_keeps_the_logits(tmp_path):
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({name: content[name] for name in ("model_type", *shape)}))
    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path), Llama(config_of(tmp_path))
    load(ours, tmp_path)
    torch.testing.assert_close(logits(ours, 64), logits(theirs, 64), rtol=0, atol=1e-5)
    for content, difference in (
        ({"partial_rotary_factor": 0.5}, "partial_rotary"),
        ({"type": "yarn"}, "rope_type=yarn"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **shape, "rope_scaling": content}))
        with pytest.raises(ValueError, match=rf"is another architecture \({difference}"):
            config_of(tmp_path)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 1000, "\0", "[1, 2]", "{}", '{"weight_map": 3}', os.mkfifo]
)
def test_hostile_files_are_refused_without_waiting(content, tmp_path):
    config, folder = shapes()[0], tmp_path / "folder"
    export(random_model(config).state_dict(), config, folder)

    def damage(name: str) -> None:
        (folder / name).unlink(missing_ok=True)
        if callable(content):
            content(folder / name)
        else:
            (folder / name).write_text(content)

    damage("config.json")
    with pytest.raises(
        ConfigError, match=r"^init_from=\S+ cannot be read \(.*\): it must be a folder with a config.json"
    ):
        config_of(folder)
    for name in ("model.safetensors", "model.safetensors.index.json"):
        damage(name)
        with pytest.raises(ConfigError, match=r"^init_from=\S+ cannot be read \("):
            check_weights(folder, config)


def test_index_cannot_name_files_outside_the_folder(tmp_path):
    config = shapes()[0]
    export(random_model(config).state_dict(), config, tmp_path / "weights")
    export(random_model(config).state_dict(), config, tmp_path / "index")
    (tmp_path / "index" / "model.safetensors").unlink()
    index = tmp_path / "index" / "model.safetensors.index.json"
    for name in ("", "..", "."):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(ValueError, match=r"^init_from=\S+ cannot be read \("):
            check_weights(tmp_path / "index", config)
    for name in ("../weights/model.safetensors", str(tmp_path / "weights" / "model.safetensors")):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(ValueError, match=r"names \S+, which is not the name of a file in the folder"):
            check_weights(tmp_path / "index", config)


def test_folder_of_too_many_layers_is_refused_before_a_model_is_made(tmp_path):
    content = {"model_type": "llama", "hidden_size": 2, "num_attention_heads": 1, "num_hidden_layers": 2**30}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"has num_hidden_layers=1073741824 in config\.json: it must be at most 1000"):
        check_weights(tmp_path, config_of(tmp_path))


def test_full_disk_is_the_systems_error(tmp_path):
    """The safetensors library has the number in its message alone."""
    model = random_model(config := shapes()[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/model\.safetensors'") as error:
            export(model.state_dict(), config, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
