"""The section `eval`: its defaults are those of configs/eval/paper.yaml, and a wrong value is named in one sentence."""

import pytest
from omegaconf import OmegaConf

from common.errors import ConfigError, prefix_errors
from common.settings import parse
from evaluation.config import EvalConfig
from tests.helpers import CHECKOUT


def test_defaults_are_the_papers():
    values = OmegaConf.to_container(OmegaConf.load(CHECKOUT / "configs" / "eval" / "paper.yaml"))
    assert parse(EvalConfig, values) == EvalConfig() and set(values) == set(EvalConfig.model_fields)


def test_one_or_several_numbers_of_examples():
    assert EvalConfig(tasks=["a"], num_fewshot=5).requested == [("a", 5)]
    assert EvalConfig(tasks=["a", "b"], num_fewshot=[0, 5, 0]).requested == [("a", 0), ("a", 5), ("b", 0), ("b", 5)]


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("tasks", [], "eval.tasks=[] is not allowed: it must be a list of tasks, as [hellaswag]"),
        ("tasks", ["a", None], "eval.tasks=['a', None] is not allowed: it must be a list of tasks, as [hellaswag]"),
        ("num_fewshot", [0, -1], "eval.num_fewshot=[0, -1] is not allowed: it must be integers from 0, as 0 or [0,5]"),
        ("num_fewshot", True, "eval.num_fewshot=true is not allowed: it must be integers from 0, as 0 or [0,5]"),
        ("num_fewshot", [], "eval.num_fewshot=[] is not allowed: it must be integers from 0, as 0 or [0,5]"),
        ("limit", 0, "eval.limit=0 is not allowed: it must be an integer from 1, or null"),
        ("seed", 0.5, "eval.seed=0.5 is not allowed: it must be an integer"),
        ("batch_tokens", 0, "eval.batch_tokens=0 is not allowed: it must be an integer from 1, or null"),
        ("data_dir", "", "eval.data_dir= is not allowed: it must be a folder, or null"),
    ],
)
def test_wrong_values_are_named(key, value, message):
    with pytest.raises(ConfigError) as caught, prefix_errors("eval"):
        parse(EvalConfig, {key: value})
    assert str(caught.value) == message
