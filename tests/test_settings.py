"""Errors of typed settings are one sentence that names the full key, the value and what is allowed."""

import re
from typing import Annotated, Literal, Self

import pytest
from pydantic import Field, field_validator, model_validator

from common.errors import ConfigError, UserError, prefix_errors
from common.settings import Allowed, Count, Folder, FolderName, Positive, Settings, Values, fields_of, parse


class Inner(Settings):
    """A section."""

    steps: Annotated[tuple[Count, ...], Field(strict=False), Allowed("a list of steps")] = ()
    """Steps."""
    kind: Literal["a", "b", "c"] = "a"
    """Kind."""
    limit: Count | None = None
    """Limit."""
    target: str = Field("x", alias="_target_")
    """Class."""

    @field_validator("kind")
    @classmethod
    def _not_c(cls, kind: str) -> str:
        if kind == "c":
            raise ConfigError("kind", kind, "a or b today")
        return kind

    @model_validator(mode="after")
    def _few(self) -> Self:
        if len(self.steps) > 3:
            raise ConfigError("steps", list(self.steps), "at most three")
        return self


class Outer(Settings):
    """All settings."""

    lr: Positive
    """Rate."""
    name: FolderName | None = None
    """Name."""
    inner: Inner
    """Section."""
    sources: dict[str, Inner | None] = Field({})
    """Sections by name."""

    @model_validator(mode="after")
    def _no_13(self) -> Self:
        if self.lr == 13:
            raise UserError("a sentence about several keys")
        return self


MESSAGES = {
    "lr=0 is not allowed: it must be a number above 0": {"lr": 0, "inner": {}},
    "lr=true is not allowed: it must be a number above 0": {"lr": True, "inner": {}},
    "lr is not set: give it as lr=...": {"inner": {}},
    "name=.. is not allowed: it must be a folder name of": {"lr": 1, "name": "..", "inner": {}},
    "inner.steps=[1, 0] is not allowed: it must be a list of steps": {"lr": 1, "inner": {"steps": [1, 0]}},
    "inner.steps=[1, 2, 3, 4] is not allowed: it must be at most three": {"lr": 1, "inner": {"steps": [1, 2, 3, 4]}},
    "inner.kind=x is not allowed: it must be a, b or c": {"lr": 1, "inner": {"kind": "x"}},
    "inner.kind=c is not allowed: it must be a or b today": {"lr": 1, "inner": {"kind": "c"}},
    "inner.limit=0 is not allowed: it must be an integer from 1, or null": {"lr": 1, "inner": {"limit": 0}},
    "inner._target_=[3] is not allowed": {"lr": 1, "inner": {"_target_": [3]}},
    "there is no key inner.limt (the nearest is inner.limit)": {"lr": 1, "inner": {"limt": 1}},
    "sources.a.limit=0 is not allowed": {"lr": 1, "inner": {}, "sources": {"a": {"limit": 0}}},
    "inner=3 is not allowed": {"lr": 1, "inner": 3},
    "a sentence about several keys": {"lr": 13, "inner": {}},
}


@pytest.mark.parametrize("message", MESSAGES)
def test_invalid_settings_are_one_sentence(message):
    with pytest.raises(UserError) as caught:
        parse(Outer, MESSAGES[message])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_valid_settings_have_their_types():
    settings = parse(Outer, {"lr": 1, "inner": {"steps": [1, 2]}})
    assert settings.lr == 1.0 and isinstance(settings.lr, float)
    assert settings.inner.steps == (1, 2)
    assert [key for key, _ in fields_of(Inner)] == ["steps", "kind", "limit", "_target_"]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("a" * 256, "cache=aaa"),
        ("ä" * 128 + "/b", "is too long for a path: a name has at most 255 bytes"),
        ("a/" * 1501, "is too long for a path"),
        ("a\0b", "has a character 0, which no path can have"),
        ("a\udcff", "cache=a\\udcff is not allowed: it must be text in UTF-8"),
        ("", "cache= is not allowed: it must be a folder"),
    ],
)
def test_path_that_no_file_can_have_is_named(path, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        parse(Texts, {"lr": 1, "inner": {}, "folders": "x", "cache": path})
    assert caught.value.field == "cache"
    str(caught.value).encode()


def test_type_of_a_setting_decides_whether_a_value_is_a_text(monkeypatch):
    """Hydra and YAML take `2024_01` for the number 202401, and `1.10` for 1.1."""
    monkeypatch.setenv("HOME", "/home/me")
    values: dict = {
        "lr": 2,
        "name": 202401,
        "inner": {"_target_": True},
        "folders": [1, "b"],
        "cache": "~/cache",
        "sources": {"a": {"_target_": 1.1}, "b": None},
    }
    given = {"name": "2024_01", "sources.a._target_": "1.10", "lr": "2"}
    settings = parse(Texts, Values(values, given))
    assert (settings.lr, settings.name, settings.folders) == (2.0, "2024_01", ["1", "b"])
    assert settings.cache == "/home/me/cache"
    assert settings.inner.target == "true" and settings.sources["a"].target == "1.10"
    assert parse(Texts, values).name == "202401" and values["name"] == 202401
    for text, folders in (("[1, b]", ["1", "b"]), ("[1.0,b]", ["1.0", "b"]), ("['1',b]", ["1", "b"])):
        assert parse(Texts, Values(values, {"folders": text})).folders == folders


class Texts(Outer):
    """Settings that are texts."""

    folders: Folder | list[Folder]
    """Folders."""
    cache: Folder
    """Folder."""


def test_prefix_names_the_section():
    with pytest.raises(ConfigError, match=r"^data\.path=null is not there$"), prefix_errors("data"):
        raise ConfigError("path", None, problem="is not there")
    with pytest.raises(UserError, match=r"^data: something else$"), prefix_errors("data"):
        raise ValueError("something else")
