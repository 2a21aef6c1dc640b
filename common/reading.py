"""Reading of files that may come from somebody else: regular files of a bounded size, with content of a known shape.

Every JSON and YAML file of the project is read here. An error is a `ValueError` whose message says what is wrong with
the content; `read_json` makes one sentence of it.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import UserError, one_line

#: Most bytes of a JSON file, of a line of JSON, and of a YAML file.
MOST_JSON, MOST_LINE, MOST_YAML = 1 << 26, 1 << 20, 1 << 18


class Record(BaseModel):
    """The shape of an object in a file of the project: types are strict; further fields are kept."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


R = TypeVar("R", bound=BaseModel)


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading. A FIFO, device or folder in its place is an `OSError`, and is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENXIO, "not a file", str(path))
    return open(path, "rb", opener=lambda *_: descriptor)


def read_bytes(path: Path, most: int = MOST_JSON) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: it cannot be read, or is not a regular file.
        ValueError: it has more than `most` bytes.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most:,} bytes")
    return content


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file without their ends; of a longer one than `MOST_LINE` bytes only the beginning."""
    with open_regular(path) as file:
        while line := file.readline(MOST_LINE):
            yield line.rstrip(b"\n")
            while len(line) == MOST_LINE and not line.endswith(b"\n"):
                line = file.readline(MOST_LINE)


def parse_json(content: str | bytes) -> Any:
    """Return a value in JSON.

    Raises:
        ValueError: it is none, not UTF-8, nested too deeply, or has half of a surrogate pair, which no output takes.
    """
    text = content.decode() if isinstance(content, bytes) else content
    try:
        value = json.loads(text)
        if r"\ud" in text or r"\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_yaml(content: str | bytes) -> Any:
    """Return a value in YAML; raise `ValueError` if it is none, nested too deeply, or has aliases.

    A few lines of aliases can stand for gigabytes.
    """
    try:
        return yaml.load(content, Loader=_PlainLoader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # PyYAML raises KeyError, IndexError and others for scalars that are wrong
        raise ValueError(one_line(error) or type(error).__name__) from error


def parse_record(shape: type[R], content: str | bytes) -> R:
    """Return an object in JSON; raise `ValueError` if it has another shape."""
    return check_record(shape, parse_json(content))


def check_record(shape: type[R], value: Any) -> R:
    """Return a value as a record; raise `ValueError` if it has another shape."""
    if not isinstance(value, dict):
        raise ValueError("not an object")
    try:
        return shape.model_validate(value)
    except ValidationError as invalid:
        error = invalid.errors()[0]
        place = ".".join(map(str, error["loc"]))
        raise ValueError(f"{place}={repr(error['input'])[:40]}: {error['msg']}") from None


def read_json(path: Path, shape: type[R]) -> R:
    """Return the object in a JSON file; raise `UserError` if it cannot be read, or has another shape."""
    try:
        return parse_record(shape, read_bytes(path))
    except (OSError, ValueError) as error:
        raise UserError(damage(path, error, "remove it, and the same command makes it again")) from error


def damage(path: Path, error: Exception, advice: str) -> str:
    """Return that a file is damaged and what to do about it; one that must not be read may be whole."""
    if isinstance(error, PermissionError):
        return f"{path} cannot be read ({error.strerror})"
    return f"{path} is damaged ({one_line(error)}): {advice}"


class _PlainLoader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if ":" in node.value:  # a long one takes minutes
            raise ValueError("numbers to the base 60 are not allowed")
        return super().construct_yaml_int(node)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
