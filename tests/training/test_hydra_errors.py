"""Errors of Hydra and OmegaConf: each of their messages becomes one sentence about what the user typed."""

import shlex
from pathlib import Path

import pytest

from tests.helpers import compose_config
from training.launch.cli import options_first, quote_texts
from training.launch.hydra_errors import describe


def description(monkeypatch, *overrides: str, sweeps: bool = True) -> str:
    """Return the sentence for the error of composing a configuration."""
    monkeypatch.setattr("sys.argv", ["train.py", *overrides])
    with pytest.raises(Exception) as error:
        compose_config(*overrides)
    return describe(error.value, sweeps)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("lr", "lr is not allowed: settings are given as KEY=VALUE"),
        ("lr=[", "lr=[ cannot be read: special characters must be quoted, as 'overrides=[\"trainer.max_steps=400\"]'"),
        ("data.path=~/texts", "data.path=~/texts cannot be read: special characters must be quoted, as "
                              "'data.path=\"~/texts\"'"),
        ("name=a)b", "name=a)b cannot be read: special characters must be quoted, as 'name=\"a)b\"'"),
        ("a b=1", "a b=1 cannot be read: special characters must be quoted, as "),
        ("lr=0,1", "lr=0,1 has several values: add -m to run a sweep, or quote the value"),
        ("clip=zclop", "clip=zclop is not known: it must be one of adagc, agc, autoclip, fixed, "),
        ("trainer=[cpuu]", "trainer=cpuu is not known: it must be one of cpu, ddp, fsdp, gpu, hsdp"),
        ("hydra/launcher=pbs", "hydra/launcher=pbs is not known: it must be one of basic, local, slurm"),
        ("clip=null", "clip=null is not allowed: a group takes the name of one of its options"),
        ("trainer=1", "trainer=1 is not allowed: a group takes the name of one of its options"),
        ("lr=???", "lr is not set: give it as lr=..."),
        ("clip._target_=???", "clip._target_ is not set: give it as clip._target_=..."),
        ("model=hf", "model.init_from=null is not possible with model=hf: it must be a Hugging Face folder"),
        ("trainer.max_stpes=3", "trainer.max_stpes=3 is not possible: there is no key trainer.max_stpes "
                                "(the nearest is trainer.max_steps); `--cfg job` lists all keys"),
        ("trainer.foo.bar=3", "trainer.foo.bar=3 is not possible: there is no key trainer.foo; `--cfg job` lists "),
        ("hydra.jub=1", "hydra.jub=1 is not possible: there is no key hydra.jub (the nearest is hydra.job); "
                        "`--cfg hydra` lists all keys"),
        ("+lr=1", "Could not append to config. An item is already at 'lr'. "),
        ("~foo", "Could not delete from config. 'foo' does not exist."),
    ],
)  # fmt: skip
def test_error_is_one_sentence(override, sentence, monkeypatch):
    text = description(monkeypatch, override)
    assert text.startswith(sentence) and "\n" not in text


def test_argument_of_another_strategy_than_the_default_asks_for_its_name(monkeypatch):
    hint = ", unless the run's own strategy is named too, as clip=adagc; `--cfg job` lists all keys"
    key = "clip.max_norm=2 is not possible: there is no key clip.max_norm (the nearest is clip.max_grad_norm)"
    assert description(monkeypatch, "resume=x", "clip.max_norm=2") == f"{key}{hint}"
    assert hint not in description(monkeypatch, "clip.max_norm=2")
    assert hint not in description(monkeypatch, "resume=x", "clip=adagc", "clip.max_norm=2")


def test_argument_of_a_rule_over_updates_asks_for_its_name(monkeypatch):
    hint = ", unless the run's own rule is named too, as update=brake; `--cfg job` lists all keys"
    key = "update.margin=2 is not possible: there is no key update.margin"
    assert description(monkeypatch, "resume=x", "update.margin=2") == f"{key}{hint}"
    assert hint not in description(monkeypatch, "update.margin=2")


@pytest.mark.parametrize(
    ("given", "sorted_arguments"),
    [
        ("clip=fixed --config-dir=D print_run_dir=true", "--config-dir=D clip=fixed print_run_dir=true"),
        ("lr=1 --config-dir D -m seed=1,2", "--config-dir D -m lr=1 seed=1,2"),
        ("lr=1 -c job seed=1 --resolve", "-c job --resolve lr=1 seed=1"),
        ("lr=1 --info defaults seed=1", "--info defaults lr=1 seed=1"),
        ("lr=1 seed=1 --info", "--info lr=1 seed=1"),
        ("", ""),
    ],
)
def test_options_may_stand_between_settings(given, sorted_arguments):
    assert options_first(given.split()) == sorted_arguments.split()


@pytest.mark.parametrize(
    ("given", "quoted"),
    [
        ("-m paths.runs=2024_01 lr=1e-3,3e-3", "-m paths.runs='2024_01' lr=1e-3,3e-3"),
        ("-m name=1_0,1.10,b,true,1e5", "-m name='1_0','1.10',b,'true','1e5'"),
        ("-m +name=1.10 ++data.path=7", "-m +name='1.10' ++data.path='7'"),
        ("-m name='1,2' data.path=choice(1.10,2) resume=null", "-m name='1,2' data.path=choice(1.10,2) resume=null"),
        (
            "-m seed=1,2 trainer.max_steps=1_0 --config-name=1.10",
            "-m seed=1,2 trainer.max_steps=1_0 --config-name=1.10",
        ),
    ],
)
def test_texts_of_a_sweep_are_taken_as_typed(given, quoted):
    assert quote_texts(given.split()) == quoted.split()


def test_missing_value_of_an_interpolation_is_named(monkeypatch):
    assert description(monkeypatch, "lr=${seed}", "seed=???") == "lr is not set: give it as lr=..."


def test_program_without_sweeps_does_not_suggest_one(monkeypatch):
    text = description(monkeypatch, "seed=0,1", sweeps=False)
    assert text == "seed=0,1 has several values: give a list, as KEY=[0,1]"


def test_option_of_a_swept_group_is_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "-m", "clip=fixed,null", "lr=1e-3"])
    error = ValueError("Config group override must be a string or a list. Got NoneType")
    assert describe(error, sweeps=True) == (
        "clip=fixed,null is not allowed: a group takes the name of one of its options"
    )


def test_quoted_example_is_read_as_the_text(monkeypatch):
    (example,) = shlex.split(description(monkeypatch, "data.path=~/texts").rpartition(" as ")[2])
    assert compose_config(example).data.path == str(Path("~/texts").expanduser())
