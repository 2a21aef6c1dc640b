"""The architecture: the paper's size, Hugging Face's names, and the properties of a causal model."""

import copy
import math
import pickle

import pytest
import torch
from omegaconf import OmegaConf

from common.errors import ConfigError
from common.settings import parse
from models import Llama, LlamaConfig, ModelConfig
from models.llama import rotary, rotate
from tests.helpers import CHECKOUT


def from_yaml(name: str) -> LlamaConfig:
    fields = OmegaConf.to_container(OmegaConf.load(CHECKOUT / "configs" / "model" / f"{name}.yaml"))
    return parse(ModelConfig, fields).llama


TINY = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
)


def altered(config: LlamaConfig, **change: object) -> LlamaConfig:
    return parse(LlamaConfig, {**config.shape, **change})


def test_1b_has_the_size_in_table_4():
    config = from_yaml("1b")
    with torch.device("meta"):
        model = Llama(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameters == 1_071_712_256
    assert config.shape == {
        "vocab_size": 65536, "hidden_size": 2048, "intermediate_size": 5440, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 2048,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "initializer_range": 0.02, "embedding_initializer_range": None,
        "tie_word_embeddings": False, "qk_norm": False,
    }  # fmt: skip


def test_parameters_have_hugging_face_names():
    names = set(Llama(TINY).state_dict())
    layer = "model.layers.1."
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} < names
    assert {n for n in names if n.startswith(layer)} == {
        f"{layer}{n}.weight"
        for n in ("input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
                  "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }  # fmt: skip


def test_untrained_loss_follows_from_the_variance_of_the_logits():
    """Logits have variance hidden_size 0.02^2, which puts the loss half of that above ln(vocabulary)."""
    torch.manual_seed(0)
    config = altered(from_yaml("micro"), hidden_size=768, num_attention_heads=12, num_key_value_heads=12)
    tokens = torch.randint(config.vocab_size, (4, 129))
    loss, _ = Llama(config)(tokens[:, :-1], tokens[:, 1:])
    assert float(loss.detach()) == pytest.approx(math.log(4096) + 768 * 0.02**2 / 2, abs=0.03)


def test_attention_is_causal():
    torch.manual_seed(0)
    model = Llama(TINY)
    tokens = torch.randint(97, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 97
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_loss_equals_the_cross_entropy_of_the_logits():
    torch.manual_seed(0)
    model, tokens = Llama(TINY), torch.randint(97, (3, 11))
    logp = model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:])[0], -logp.mean())


def test_rotary_attention_scores_depend_on_distance_only():
    cos, sin = rotary(TINY, 16, torch.device("cpu"), torch.float32)
    q, k = torch.randn(8).expand(16, 8), torch.randn(8).expand(16, 8)
    scores = rotate(q, cos, sin) @ rotate(k, cos, sin).T
    for distance in range(1, 8):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)


def test_grouped_heads_equal_repeated_full_heads():
    torch.manual_seed(0)
    grouped = Llama(TINY)
    full = Llama(altered(TINY, num_key_value_heads=4))
    state = grouped.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].view(2, 1, 8, 32).expand(2, 2, 8, 32).reshape(32, 32)
    full.load_state_dict(state)
    tokens = torch.randint(97, (2, 9))
    torch.testing.assert_close(grouped(tokens), full(tokens))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_can_have_another_initial_scale(tied):
    """The other weights are those that are drawn without it."""
    plain, scaled = ({}, {"embedding_initializer_range": 1.0})
    models = []
    for more in (plain, scaled):
        torch.manual_seed(0)
        models.append(dict(Llama(altered(TINY, tie_word_embeddings=tied, **more)).named_parameters()))
    for name, weight in models[0].items():
        factor = 50 if name == "model.embed_tokens.weight" else 1
        torch.testing.assert_close(models[1][name], factor * weight)


def test_tied_embeddings_are_one_parameter():
    tied = Llama(altered(TINY, tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = sum(p.numel() for p in Llama(TINY).parameters())
    assert untied == TINY.parameters and untied - tied.config.parameters == 97 * 32
    assert untied - sum(p.numel() for p in tied.parameters()) == 97 * 32


@pytest.mark.parametrize(
    "change",
    [{"num_attention_heads": 5}, {"num_key_value_heads": 3}, {"num_hidden_layers": 0}, {"vocab_size": -1}],
)
def test_impossible_shapes_are_errors_that_name_the_field(change):
    ((name, value),) = change.items()
    with pytest.raises(ConfigError, match=f"^{name}={value} is not allowed"):
        altered(TINY, **change)


def test_config_can_be_pickled_copied_and_hashed():
    assert pickle.loads(pickle.dumps(TINY)) == copy.deepcopy(TINY) == TINY
    assert hash(altered(TINY)) == hash(TINY) and vars(TINY) == TINY.shape
    section = ModelConfig(**TINY.shape, name="tiny")
    assert section.llama == TINY and section.shape == TINY.shape and section.parameters == TINY.parameters
    with torch.device("meta"):
        assert Llama(section).state_dict().keys() == Llama(TINY).state_dict().keys()
