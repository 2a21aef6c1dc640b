"""Typed settings: the base of every configuration section, and what makes a sentence of a validation error.

A package owns the section that configures it, as a subclass of `Settings`. Each key is declared once, with its type,
default, bounds and a docstring that says what it means; `docs/reference` is generated from that.
"""

import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from common.errors import ConfigError, UserError, shown
from common.text import nearest

#: Most bytes of a name and of a path on common file systems, with room for what is put behind them.
MAX_NAME, MAX_PATH = 255, 3000


@dataclass(frozen=True)
class Allowed:
    """What a type allows, in words, such as "an integer from 1": metadata of an `Annotated` type."""

    words: str


def _fits_in_a_name(value: str) -> str:
    """File systems allow 255 bytes; temporary names are longer than the name itself."""
    if len(value.encode()) > 200:
        raise PydanticCustomError("too_long", "too long")
    return value


def _path(value: str) -> str:
    """Return a path with the user's folder in place of `~`; refuse one that no file system can have."""
    path = os.path.expanduser(value)  # noqa: PTH111 - pathlib would change other paths too
    if "\0" in path:
        raise ValueError("has a character 0, which no path can have")
    if len(path.encode()) > MAX_PATH or any(len(name.encode()) > MAX_NAME for name in path.split("/")):
        raise ValueError(f"is too long for a path: a name has at most {MAX_NAME} bytes, and all of it {MAX_PATH}")
    return path


#: Types of settings. Each says what is allowed in the words of the error message.
Count = Annotated[int, Field(ge=1, lt=2**31), Allowed("an integer from 1")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), Allowed("a number above 0")]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), Allowed("a number from 0")]
Fraction = Annotated[float, Field(ge=0, le=1), Allowed("a number from 0 to 1")]
AtLeastOne = Annotated[float, Field(ge=1, allow_inf_nan=False), Allowed("a number from 1")]
Flag = Annotated[bool, Allowed("true or false")]
#: A text that may be a path. A quoted `~`, as in 'data.path="~/texts"', stands for the user's folder.
PathText = Annotated[str, StringConstraints(min_length=1), AfterValidator(_path)]
Folder = Annotated[PathText, Allowed("a folder")]
FOLDER_NAME = r"^[\w.=,+-]*[\w=,+-][\w.=,+-]*$"
FolderName = Annotated[
    str,
    StringConstraints(pattern=FOLDER_NAME),
    AfterValidator(_fits_in_a_name),
    Allowed("a folder name of letters, digits and . _ = , + -, at most 200 bytes"),
]


class Settings(BaseModel):
    """A section of the configuration: types are strict, keys known, values fixed once they are parsed."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",  # null would be another value, and allowed for some
    )


class Values(dict[str, Any]):
    """Settings as plain nested values, with the text of those that the command line gave, by their dotted keys."""

    def __init__(self, values: Mapping[str, Any], given: Mapping[str, str]) -> None:
        super().__init__(values)
        self.given = given


S = TypeVar("S", bound=BaseModel)


def parse(section: type[S], values: Mapping[str, Any]) -> S:
    """Return a section with these values, nested for sections within.

    Where a text is meant, a value that YAML or Hydra has taken for a number or a truth value is one. The first value
    that is not allowed, key that is unknown, or key without a value is a `UserError`.
    """
    values = _with_texts(section, values, "", values.given if isinstance(values, Values) else {})
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise _user_error(section, error, values) from None


def _with_texts(annotation: Any, value: Any, key: str, given: Mapping[str, str]) -> Any:
    """Return a value of a type, or a section's values, in which texts are texts, as they were given."""
    if isinstance(value, Mapping):
        section, options = section_in(annotation), _options(annotation)
        inner = next((get_args(option)[1] for option in options if get_origin(option) is dict), None)
        converted = {}
        for name, one in value.items():
            field = _field(section, str(name)) if section is not None else None
            dotted = f"{key}.{name}" if key else str(name)
            converted[str(name)] = _with_texts(field.annotation if field else inner, one, dotted, given)
        return converted
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            given_bytes = value.encode(errors="backslashreplace").decode()
            raise ConfigError(key, given_bytes, "text in UTF-8") from None
        return value
    if isinstance(value, list) and list[str] in set(_base_types(annotation)):
        words = re.fullmatch(r"\[([^\[\]'\"]*)\]", given.get(key, ""))
        texts = words[1].split(",") if words else []
        one_by_one = texts if len(texts) == len(value) else [str(shown(one)) for one in value]
        return [_with_texts(str, one, "", {"": text.strip()}) for one, text in zip(value, one_by_one, strict=True)]
    if isinstance(value, bool | int | float) and is_text(annotation):
        return given.get(key, str(shown(value)))
    return value


def is_text(annotation: Any) -> bool:
    """Whether a type takes texts, and neither numbers nor truth values, which a text can look like."""
    types_ = set(_base_types(annotation))
    return str in types_ and not types_ & {bool, int, float}


def _base_types(annotation: Any) -> Iterator[Any]:
    """Yield the types that a value can have, without what is said about them; a list of texts is `list[str]`."""
    for option in _options(annotation):
        if get_origin(option) is Annotated:
            yield from _base_types(get_args(option)[0])
        elif get_origin(option) is list:
            yield list[str] if str in _base_types(get_args(option)[0]) else list
        else:
            yield option


def _user_error(section: type[BaseModel], invalid: ValidationError, values: Mapping[str, Any]) -> UserError:
    """Return the first of pydantic's errors as one of ours."""
    first = min(invalid.errors(), key=lambda error: error["type"] != "extra_forbidden")
    path, annotation, owner = _locate(section, first["loc"])
    key = ".".join(path)
    inner = section_in(annotation)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):  # a validator of a section, or of a key, names the key itself
        owner_path = path if inner is not None else path[:-1]
        return ConfigError(".".join([*owner_path, cause.field]), cause.value, problem=cause.problem)
    if isinstance(cause, UserError):
        return cause
    if first["type"] == "extra_forbidden":
        near = nearest(path[-1], owner.model_fields) if owner is not None else None
        meant = f" (the nearest is {key.removesuffix(path[-1])}{near})" if near else ""
        return ConfigError(key, first["input"], problem=f"is not possible: there is no key {key}{meant}")
    if first["type"] == "missing" and len(first["loc"]) == len(path):
        return UserError(f"{key} is not set: give it as {key}=...")
    if isinstance(cause, ValueError) and inner is None and len(first["loc"]) >= len(path) > 0:
        return ConfigError(key, first["input"], problem=str(cause))
    if isinstance(cause, ValueError) or not path:
        return UserError(": ".join(filter(None, [key, str(cause or first["msg"])])))
    value: Any = values
    for name in path:  # the whole value is named, of a list too
        value = value[name]
    if inner is not None or owner is None:
        fields = sorted(inner.model_fields) if inner else ["keys"]
        return ConfigError(key, value, problem=f"is not allowed: it must have {', '.join(fields)}")
    field = _field(owner, path[-1])
    assert field is not None
    return ConfigError(key, value, allowed_words(field.annotation, field.metadata))


def _locate(section: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], Any, type[BaseModel] | None]:
    """Return the keys of an error's location, the type of the value there, and the section that has the last key."""
    path: list[str] = []
    annotation: Any = section
    owner: type[BaseModel] | None = None
    for name in map(str, loc):
        inner = section_in(annotation)
        values = next((get_args(option)[1] for option in _options(annotation) if get_origin(option) is dict), None)
        if inner is None and section_in(values) is None:
            break
        path.append(name)
        field = _field(inner, name) if inner is not None else None
        annotation, owner = field.annotation if field else values, inner
    return path, annotation, owner


def section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a type is, or may be besides null; `None` if it is none."""
    sections = (option for option in _options(annotation) if isinstance(option, type) and issubclass(option, BaseModel))
    return next(sections, None)


def _field(section: type[BaseModel], key: str) -> FieldInfo | None:
    """Return the declaration of a key of a section, which may be an alias; `None` if there is no such key."""
    return next((field for name, field in section.model_fields.items() if key in (name, field.alias)), None)


def _options(annotation: Any) -> Sequence[Any]:
    """Return the members of a union; a type that is no union is its only member."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def allowed_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return what a type allows, in words."""
    for one in metadata:
        if isinstance(one, Allowed):
            return one.words
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return allowed_words(inner, more)
    if get_origin(annotation) is Literal:
        *others, last = map(str, get_args(annotation))
        if len(others) > 2:
            return f"one of {', '.join([*others, last])}"
        return f"{', '.join(others)} or {last}" if others else last
    if len(options := _options(annotation)) > 1:
        return ", or ".join(map(allowed_words, options))
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a text", type(None): "null"}
    return names.get(annotation, "of the right kind")


def fields_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key of a section and of those within it, dotted, with its declaration."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        inner = section_in(field.annotation)
        yield from [(key, field)] if inner is None else fields_of(inner, f"{key}.")
