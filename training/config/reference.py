"""The reference of all settings: `python -m training.config.reference` writes it to docs/reference/.

It is generated from the typed models and from the files in configs/, so it cannot differ from what train.py accepts.
Defaults are those of `python train.py` without arguments. A test compares the files with what this writes.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from pydantic.fields import FieldInfo

from common.files import write_atomic
from common.settings import allowed_words, fields_of, section_in
from common.text import flatten, markdown_table
from data.config import SourceConfig
from training.config.compose import CONFIGS, container
from training.config.schema import Config

FOLDER = CONFIGS.parent / "docs" / "reference"

HEADER = """# Configuration

Set any key on the command line, as `python train.py lr=1e-3 trainer.max_steps=500`. Choose an option of a group by its
name, as `python train.py model=60m clip=fixed`. `python train.py --cfg job` prints all keys with their values.
[The command line](command-line.md) has the syntax.

This page and `config.schema.json`, the same as a JSON schema, are generated from the code by `make reference`.
Defaults are those of `python train.py` without arguments.

## Groups

A group is a folder of `configs/`, and an option is a file in it that sets several keys at once.

"""

GROUPS_NOTE = """
`experiment` has further options: [the sets of runs of the paper](../how-to/reproduce-the-paper.md). Options of your own
go into another folder with the same groups, which `--config-dir=FOLDER` names.

## Top level
"""

#: Groups whose keys are not a section of the configuration of a run.
FREE_GROUPS = ("scale", "experiment")

#: What the section of a group says besides the generated text.
NOTES = {
    "clip": "[Strategies](strategies.md) has them.",
    "update": "[Clip updates](../how-to/clip-updates.md) explains them.",
    "optim": "[Choose an optimizer](../how-to/choose-an-optimizer.md) shows their use.",
    "data": "[Train on your own text](../how-to/text-and-tokens.md) explains these by tasks.",
    "trainer": "[Use several processes](../how-to/many-processes.md) explains the split of the batch.",
    "logger": "[Log to Weights & Biases](../how-to/loggers.md) shows its use.",
    "eval": "[Evaluate](../how-to/evaluate.md) shows their use.",
    "paper": "[Reproduce the paper](../how-to/reproduce-the-paper.md) shows their use.",
}


def markdown() -> str:
    """Return the reference as Markdown: the groups, and a section with a table of keys for each part."""
    with initialize_config_dir(str(CONFIGS.absolute()), version_base="1.3"):
        plain = container(compose("train"))
    top: dict[str, FieldInfo] = {}
    parts: list[str] = []
    groups = default_options()
    for name, field in Config.model_fields.items():
        section = section_in(field.annotation)
        if section is None:
            top[name] = field
            continue
        text = [f"## {name}\n", " ".join((section.__doc__ or "").split("\n\n")[0].split()), NOTES.get(name, "")]
        parts += ["\n".join(filter(None, text)) + "\n"]
        parts += [_options(name)] if name in groups else []
        parts += [_table(f"{name}.", dict(fields_of(section)), plain)]
        if name == "data":
            parts += ["### data.sources\n\nThe keys of each source, such as `data.sources.books.path`.\n"]
            parts += [_table("data.sources.NAME.", dict(fields_of(SourceConfig)), {})]
    parts += [f"## {name}\n\n{_options(name)}" for name in FREE_GROUPS]
    parts += ["## hydra/launcher\n\nHow the runs of a sweep are started.\n", _options("hydra/launcher")]
    for launcher in _files("hydra/launcher"):
        parts += [f"Keys of `hydra/launcher={launcher.stem}`:\n", _launcher_table(launcher)]
    return "\n".join([HEADER + _groups_table(groups) + GROUPS_NOTE, _table("", top, plain), *parts])


def json_schema() -> str:
    """Return the JSON schema of a configuration, for editors."""
    return json.dumps(Config.model_json_schema(), indent=1) + "\n"


def default_options() -> dict[str, str]:
    """Return the option of each group that train.py takes by default."""
    defaults = yaml.safe_load((CONFIGS / "train.yaml").read_text())["defaults"]
    pairs = [pair for entry in defaults if isinstance(entry, dict) for pair in entry.items()]
    return {group: option for group, option in pairs if not group.startswith("override ")}


def first_comment(file: Path) -> str:
    """Return the comment at the beginning of a configuration file, without the line for Hydra."""
    lines = file.read_text().splitlines()
    comment = lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    return " ".join(line.lstrip("# ") for line in comment if not line.startswith("# @package"))


def _files(group: str) -> list[Path]:
    """Return the files of a group, by name; those whose names are sizes, such as 60m and 1b, by size."""

    def place(file: Path) -> tuple[float, str]:
        size = re.fullmatch(r"(\d+)([mb])", file.stem)
        return (int(size[1]) * {"m": 1.0, "b": 1e3}[size[2]] if size else 0.0), file.stem

    return sorted((CONFIGS / group).glob("*.yaml"), key=place)


def _groups_table(defaults: Mapping[str, str]) -> str:
    names = {**defaults, "hydra/launcher": "basic"}
    rows = [
        [f"[`{group}`](#{group.replace('/', '')})", f"`{option}`", " ".join(f"`{file.stem}`" for file in _files(group))]
        for group, option in names.items()
    ]
    return _left_table(("group", "default", "options"), rows)


def _options(group: str) -> str:
    rows = [[f"`{group}={file.stem}`", _cell(first_comment(file))] for file in _files(group)]
    return _left_table(("option", "meaning"), rows)


def _table(prefix: str, fields: Mapping[str, FieldInfo], plain: Mapping[str, Any]) -> str:
    defaults = flatten(plain)
    rows = []
    for name, field in fields.items():
        key = f"{prefix}{name}"
        value = defaults[key] if key in defaults else plain.get(prefix.rstrip("."), {}).get(name, field.get_default())
        allowed = allowed_words(field.annotation, field.metadata)
        meaning = " ".join((field.description or "").split())
        rows.append([f"`{key}`", f"`{_default(value)}`", f"{_cell(meaning)} *Allowed: {_cell(allowed)}.*"])
    return _left_table(("key", "default", "meaning"), rows)


def _default(value: Any) -> str:
    """Return a default as the command line takes it; of a mapping only the names."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: ..." for name in value) + "}"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _launcher_table(file: Path) -> str:
    """Return the keys of a launcher, which are explained by the comments in its file."""
    lines = re.findall(r"^(\w+): (.*?) *(?:# (.*))?$", file.read_text(), re.M)
    meaning = ""
    rows = []
    for name, value, comment in lines:
        meaning = comment or meaning  # a comment is about the keys below it too, up to the next one
        if not name.startswith("_"):
            rows.append([f"`hydra.launcher.{name}`", f"`{value}`", _cell(meaning[:1].upper() + meaning[1:])])
    return _left_table(("key", "default", "meaning"), rows)


def _left_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return markdown_table(header, rows, left=len(header)) + "\n"


def _cell(text: str) -> str:
    """Return a text as it is in a cell of a table: outside of code, the characters of Markdown and HTML are plain."""
    pieces = text.split("`")
    pieces[::2] = [re.sub(r"(\*|(?<!\w)_|<)", r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces).replace("|", "\\|")


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_atomic(FOLDER / "config.md", markdown())
    write_atomic(FOLDER / "config.schema.json", json_schema())
    print(f"wrote {FOLDER / 'config.md'} and config.schema.json")
