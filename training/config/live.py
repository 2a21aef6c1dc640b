"""Settings that may change while a run trains: arguments of its clipping strategy and its rule over updates.

`resume=FOLDER clip.KEY=VALUE` and `resume=FOLDER update=NAME update.KEY=VALUE` change them.

config.yaml keeps the settings with which the run began, whose hash its name has. environment.json lists the changes of
each start. Together they are the settings in force.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.errors import shown
from common.run_files import value_before
from common.settings import parse
from training.config.identity import run_name
from training.config.schema import Config

#: Sections of the configuration whose arguments may change, and what a run keeps there, in words.
SECTIONS = {"clip": "strategy", "update": "rule over updates"}

#: In place of a value: the configuration leaves the setting at its default.
_DEFAULT = object()


def is_live(key: str) -> bool:
    """Whether a setting, by its dotted key, may change while a run trains."""
    section, _, name = key.partition(".")
    return section in SECTIONS and name not in ("", "name", "_target_")


def argument(config: Config, key: str) -> Any:
    """Return the value of a setting for which `is_live`; `None` if the configuration leaves it at its default."""
    section, _, name = key.partition(".")
    return getattr(config, section).arguments.get(name)


def with_changes(config: Config, changes: Sequence[Mapping[str, Any]]) -> Config:
    """Return a configuration after changes, each of them with `setting`, `to`, and `from` unless it had its default."""
    return _with_values(config, {change["setting"]: change["to"] for change in changes})


def without_changes(config: Config, changes: Sequence[Mapping[str, Any]]) -> Config:
    """Return the configuration before changes, of which it may have any."""
    return _with_values(config, {change["setting"]: change.get("from", _DEFAULT) for change in reversed(changes)})


def under_first_name(config: Config, begun: Config) -> Config:
    """Return a configuration with the name of the run, which has the hash of the settings with which it began."""
    if config.name is not None or (config.clip, config.update) == (begun.clip, begun.update):
        return config
    return config.model_copy(update={"name": run_name(begun)})


def live_changes(before: Config, after: Config) -> list[dict[str, Any]]:
    """Return the changes of arguments between two configurations of a run, sorted by their keys."""
    changes = []
    for section in SECTIONS:
        old, new = (getattr(config, section).arguments for config in (before, after))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                had = {"from": old[name]} if name in old else {}
                changes.append({"setting": f"{section}.{name}", **had, "to": new.get(name)})
    return changes


def describe_changes(changes: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a sentence on each change of a run, with its `step`."""
    return [f"{c['setting']}={shown(c['to'])} since step {c['step']} (it was {value_before(c)})" for c in changes]


def _with_values(config: Config, values: Mapping[str, Any]) -> Config:
    if not values:
        return config
    plain = config.model_dump(mode="json", by_alias=True)
    for key, value in values.items():
        section, _, name = key.partition(".")
        if value is _DEFAULT:
            plain[section].pop(name, None)
        else:
            plain[section][name] = value
    return parse(Config, plain)
