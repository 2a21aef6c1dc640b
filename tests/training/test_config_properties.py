"""Every configuration that the schema allows survives config.yaml; every other is refused by key and value."""

import copy
from collections.abc import Mapping
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import StringConstraints
from pydantic.fields import FieldInfo

from common.errors import ConfigError, UserError, shown
from common.settings import fields_of, parse
from tests.helpers import compose_config
from training.config.compose import read_config, to_yaml
from training.config.identity import changes_result, differences, identity, run_name
from training.config.schema import Config
from training.runtime.hardware import PEAK_FLOPS

#: The leaves of a configuration, by their dotted keys.
FIELDS = dict(fields_of(Config))

#: Keys, or sections, that do not change what a run computes. This repeats identity.py on purpose.
NOT_IDENTITY = (
    "name", "experiment", "resume", "print_run_dir", "plan", "logger", "eval", "hardware", "paths", "paper",
    "trainer.checkpoint_every", "trainer.keep_last", "trainer.keep_every", "trainer.async_save", "trainer.log_every",
    "trainer.val_every", "trainer.val_tokens", "trainer.eval_every", "trainer.nodes", "trainer.devices",
)  # fmt: skip

#: Settings of `optim=muon`.
MUON = {
    "optim.name": "muon", "optim.amsgrad": None, "optim.momentum": 0.95, "optim.nesterov": True, "optim.ns_steps": 5,
    "optim.adjust_lr_fn": "original",
}  # fmt: skip

#: Other settings with which a key can have several values.
NEEDS: dict[str, dict[str, Any]] = {
    "trainer.nodes": {"trainer.strategy": "fsdp"},
    "trainer.devices": {"trainer.strategy": "fsdp"},
    "trainer.dp_replicate": {"trainer.strategy": "hsdp", "trainer.devices": 8, "trainer.dp_replicate": 2},
    "trainer.keep_every": {"trainer.checkpoint_every": 500},
    "fork_data": {"fork_from": "runs/main/NAME@100"},
    "fork_statistics": {"fork_from": "runs/main/NAME@100"},
    "optim.name": {"optim._target_": "elsewhere.Own"},
    **dict.fromkeys(("optim.momentum", "optim.nesterov", "optim.ns_steps", "optim.adjust_lr_fn"), MUON),
}

SOURCE = {
    "path": None, "hub": "owner/name", "subset": None, "split": "train", "revision": None, "column": "text",
    "weight": 1.0, "sotu": False,
}  # fmt: skip

#: Folder names; pydantic's \\w is not Python's.
FOLDER_NAMES = st.text("abzAZ019_=,+-.äλ日", min_size=1, max_size=12).filter(lambda text: text.strip("."))

#: Values of keys whose type says less than what is allowed, also because of the values of other keys.
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "hardware.device": st.sampled_from(sorted(PEAK_FLOPS)),
    "clip._target_": st.sampled_from(["zclip.ZClip", "zclip.AutoClip", "zclip.AdaGC", "elsewhere.Unknown"]),
    "update._target_": st.sampled_from(["zclip.updates.UpdateMonitor", "zclip.updates.UpdateClip", None]),
    "fork_from": st.none() | st.integers(0, 10**15 - 1).map(lambda step: f"runs/main/NAME@{step}"),
    "paper.suite": st.none(),
    "optim.name": FOLDER_NAMES,
    "optim.betas": st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
    "optim.eps": st.floats(1e-12, 1),
    "optim.weight_decay": st.floats(0, 1),
    "optim.fused": st.booleans(),
    "optim.amsgrad": st.booleans(),
    "optim.momentum": st.floats(0, 1, exclude_max=True),
    "optim.nesterov": st.booleans(),
    "optim.ns_steps": st.integers(1, 99),
    "optim.adjust_lr_fn": st.sampled_from(["original", "match_rms_adamw"]),
    "data.sources": st.dictionaries(
        st.from_regex(r"[a-z]{1,5}", fullmatch=True),
        st.none() | st.floats(0.1, 10).map(lambda weight: SOURCE | {"weight": weight}),
        max_size=3,
    ).map(lambda sources: sources | {"always": SOURCE}),
    "trainer.dp_replicate": st.sampled_from([2, 4, 8]),
    "trainer.strategy": st.sampled_from(["single", "ddp", "fsdp"]),
    "trainer.keep_every": st.none() | st.integers(1, 9).map(lambda times: 500 * times),
    "model.num_attention_heads": st.sampled_from([3, 6, 12]),
    "model.num_key_value_heads": st.sampled_from([1, 3]),
    "model.hidden_size": st.integers(1, 99).map(lambda times: 6 * times),
    "data.sequence_length": st.integers(1, 256),
    "model.max_position_embeddings": st.integers(256, 9999),
    "data.corruption.steps": st.lists(st.integers(1, 300), unique=True, max_size=4),
}


def values_of(annotation: Any, metadata: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Return the values that a type allows, in the types of YAML."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return values_of(inner, (*metadata, *more))
    constraints: dict[str, Any] = {}
    for one in metadata:
        for part in getattr(one, "metadata", [one]):
            if isinstance(part, annotated_types.Interval | annotated_types.Ge | annotated_types.Gt):
                constraints |= {name: value for name, value in vars_of(part).items() if value is not None}
            elif isinstance(part, annotated_types.Le | annotated_types.Lt | annotated_types.MinLen):
                constraints |= vars_of(part)
            elif isinstance(part, StringConstraints):
                constraints |= {"pattern": part.pattern, "min_length": part.min_length or 0}
            elif getattr(part, "pattern", None):
                constraints["pattern"] = part.pattern
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if get_origin(annotation) is tuple:
        kinds = [kind for kind in get_args(annotation) if kind is not Ellipsis]
        if len(kinds) > 1:
            return st.tuples(*map(values_of, kinds)).map(list)
        return st.lists(values_of(kinds[0]), unique=True, max_size=3)
    if get_origin(annotation) is list:
        return st.lists(values_of(*get_args(annotation)), min_size=constraints.get("min_length", 1), max_size=3)
    if get_args(annotation):
        return st.one_of(*(values_of(option, metadata) for option in get_args(annotation)))
    if annotation is NoneType:
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        most = constraints.get("lt", 2**31) - 1
        return st.integers(constraints.get("ge", 0), most) | st.integers(constraints.get("ge", 0), 64)
    if annotation is float:
        low, high = constraints.get("ge", constraints.get("gt", 0.0)), constraints.get("le", constraints.get("lt"))
        numbers = st.floats(
            low, high, exclude_min="gt" in constraints, exclude_max="lt" in constraints, allow_infinity=False
        )
        return numbers | st.integers(1, 1 if high is not None else 9).filter(lambda n: "lt" not in constraints)
    assert annotation is str, annotation
    if constraints.get("pattern"):
        return FOLDER_NAMES
    characters = st.characters(codec="utf-8", exclude_characters="\0")  # which no path can have
    return st.text(characters, min_size=constraints.get("min_length", 0), max_size=20)


def vars_of(constraint: Any) -> dict[str, Any]:
    return {name: getattr(constraint, name) for name in constraint.__dataclass_fields__}


def valid_values(key: str) -> st.SearchStrategy[Any]:
    field = FIELDS[key]
    return VALUES[key] if key in VALUES else values_of(field.annotation, tuple(field.metadata))


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """The configuration of `python train.py`, as plain nested dicts with all keys."""
    return compose_config().model_dump(mode="json", by_alias=True)


def changed(plain: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with other values of some keys."""
    nested: Any = copy.deepcopy(plain)
    for key, value in values.items():
        *sections, name = key.split(".")
        section = nested
        for part in sections:
            section = section[part]
        section[name] = value
    return nested


def parsed(plain: Mapping[str, Any], values: Mapping[str, Any]) -> Config:
    """Return a configuration; examples whose keys do not fit each other are skipped.

    What no key alone could have violated is checked by validators of sections, which tests of their own hold.
    """
    try:
        return parse(Config, changed(plain, values))
    except UserError as error:
        assert any(key in str(error) for key in CROSS), f"{error}: {values}"
        assume(False)
        raise


#: Keys that validators of sections compare with others.
CROSS = (
    "keep_every", "trainer.strategy", "dp_replicate", "num_attention_heads", "num_key_value_heads",
    "data.sequence_length", "data.corruption.steps", "data.corruption.random_steps", "repetition_max_period",
    "hub",
)  # fmt: skip


@st.composite
def overrides(draw: st.DrawFn) -> dict[str, Any]:
    """Draw keys and a valid value of each."""
    keys = draw(st.lists(st.sampled_from(sorted(FIELDS.keys() - NEEDS.keys())), unique=True, min_size=1, max_size=6))
    return {key: draw(valid_values(key)) for key in keys}


def drawn(examples: int) -> Any:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.filter_too_much],
    )


def check_saved(plain: dict[str, Any], folder: Any, examples: int) -> None:
    @drawn(examples)
    @given(overrides())
    def check(values: dict[str, Any]) -> None:
        config = parsed(plain, values)
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        read = read_config(folder / "config.yaml")
        assert read == config and identity(read) == identity(config) and run_name(read) == run_name(config)
        assert not differences(read, config)

    check()


def test_saved_configurations_are_the_same(plain, tmp_path):
    check_saved(plain, tmp_path, 60)


@pytest.mark.slow
def test_many_saved_configurations_are_the_same(plain, tmp_path):
    check_saved(plain, tmp_path, 1000)


@pytest.mark.parametrize("key", sorted(FIELDS))
def test_each_value_of_each_key_is_saved(key, plain, tmp_path):
    check_key(key, plain, tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(FIELDS))
def test_many_values_of_each_key_are_saved(key, plain, tmp_path):
    check_key(key, plain, tmp_path, 20)


def check_key(key: str, plain: dict[str, Any], folder: Any, examples: int) -> None:
    """Save values of one key, and see that the run's name changes if and only if the result can."""
    plain = changed(plain, NEEDS.get(key, {}))
    base = parse(Config, plain)
    is_identity = not any(key == name or key.startswith(f"{name}.") for name in NOT_IDENTITY)
    assert changes_result(key) == is_identity

    @drawn(examples)
    @given(valid_values(key))
    def check(value: Any) -> None:
        config = parsed(plain, {key: value})
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        assert read_config(folder / "config.yaml") == config
        if key == "name":
            assert run_name(config) == (run_name(base) if value is None else value)
            return
        assert (run_name(config) != run_name(base)) == (is_identity and config != base), value
        assert bool(differences(config, base)) == (is_identity and config != base), value

    check()


def test_checkpoint_every_is_identity_of_a_run_that_rewinds(plain):
    one, other = (
        parse(Config, changed(plain, {"trainer.on_nonfinite": "rewind", "trainer.checkpoint_every": n})) for n in (5, 6)
    )
    assert run_name(one) != run_name(other)
    assert list(differences(one, other)) == ["trainer.checkpoint_every"]


def invalid_values(field: FieldInfo) -> st.SearchStrategy[Any]:
    """Return values of a wrong type, and numbers out of every range. A number is a text where a text is meant."""
    names = str(field.annotation) + str(field.metadata)
    is_text = "str" in names and "Literal" not in names
    wrong: list[Any] = [{"a": 1}, [None], [[1]]]
    if "str" not in names and "Literal" not in names:
        wrong += ["text", "", "1", "true"]
    elif "Literal" in names:
        wrong += ["none of them", ""]
    if "bool" not in names:
        wrong += [] if is_text else [True, False]
    else:
        wrong += [0, 1]
    if "int" not in names.replace("Constraint", "").replace("Interval", "") and "float" not in names:
        wrong += [] if is_text else [3, 0.5]
    if "None" not in str(field.annotation):
        wrong += [None]
    if "float" in names or "Ge(" in names or "Interval" in names:
        wrong += [-1, float("nan"), float("inf"), -0.5]
    return st.sampled_from(wrong)


@pytest.mark.parametrize("key", sorted(set(FIELDS) - {"data.sources", "paper.suite"}))
def test_invalid_value_is_refused_by_key_and_value(key, plain):
    @drawn(8)
    @given(invalid_values(FIELDS[key]))
    def check(value: Any) -> None:
        with pytest.raises(ConfigError) as caught:
            parse(Config, changed(plain, {key: value}))
        assert caught.value.field == key
        assert str(caught.value).startswith(f"{key}={shown(value)} is not allowed: it must be "), str(caught.value)
        assert "\n" not in str(caught.value)

    check()
