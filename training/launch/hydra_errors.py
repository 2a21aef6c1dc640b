"""Hydra's and OmegaConf's errors as one sentence each: what the user typed, why it is not possible, what is allowed."""

import re
import sys
from collections.abc import Iterator

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf, errors

from common.errors import UserError, one_line
from common.text import nearest
from training.config.compose import CONFIGS

#: What makes an argument known that the composed configuration lacks when a run resumes, by the argument's group.
OWN_NAMES = {
    "clip": "the run's own strategy is named too, as clip=adagc",
    "update": "the run's own rule is named too, as update=brake",
}


def describe(error: Exception, sweeps: bool) -> str:
    """Return one line that says what is wrong with the command line of a program, which accepts `-m` if `sweeps`."""
    if not isinstance(error, UserError):  # ours may be the cause of theirs
        error = next((cause for cause in _causes(error) if isinstance(cause, UserError)), error)
    message = one_line(error, most=None)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_option(error)
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"{error.override} is not allowed: settings are given as KEY=VALUE"
        example = _quoted_for_shell(error.override)
        return f"{error.override} cannot be read: special characters must be quoted, as {example}"
    if isinstance(error, errors.MissingMandatoryValue | errors.InterpolationToMissingValueError):
        return f"{error.full_key} is not set: give it as {error.full_key}=..."
    if isinstance(error.__cause__, errors.ConfigAttributeError | errors.ConfigKeyError):
        return _unknown_key(error.__cause__)
    if match := re.match(r"Ambiguous value for argument '([^']+)'", message):
        hint = "add -m to run a sweep, or quote the value" if sweeps else "give a list, as KEY=[0,1]"
        return f"{match[1]} has several values: {hint}"
    if message.startswith("Config group override must be a string or a list"):
        argument = next(filter(_is_no_option, sys.argv[1:]), "this value of a group")
        return f"{argument} is not allowed: a group takes the name of one of its options"
    return message


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors that led to an error, the last one first."""
    cause = error.__cause__ or error.__context__
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _quoted_for_shell(override: str) -> str:
    """Return a setting as a shell and Hydra take it, or another one as an example, if its text has brackets or quotes.

    They may be those of a list or a mapping, which is no text.
    """
    key, _, value = override.partition("=")
    if not re.fullmatch(r"\+*[\w./]+", key) or not value or {*value} & {*"'\"\\[]{}"}:
        return "'overrides=[\"trainer.max_steps=400\"]'"
    return f"'{key}=\"{value}\"'"


def _unknown_option(error: MissingConfigException) -> str:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    options = ", ".join(error.options or sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")))
    if options and group:
        return f"{group}={option} is not known: it must be one of {options}"
    return f"there is no configuration file {error.missing_cfg_file}.yaml in configs/"


def _unknown_key(error: errors.ConfigAttributeError | errors.ConfigKeyError) -> str:
    key, last = str(error.full_key), str(error.key)
    argument = next((a for a in sys.argv[1:] if re.match(rf"\+*{re.escape(key)}[.=]", a)), key)
    near = nearest(last, map(str, error.parent_node)) if OmegaConf.is_dict(error.parent_node) else None
    hint = f" (the nearest is {key.removesuffix(last)}{near})" if near else ""
    given = {argument.partition("=")[0] for argument in sys.argv[1:]}
    group = key.partition(".")[0]
    if group in OWN_NAMES and "resume" in given and group not in given:
        hint += f", unless {OWN_NAMES[group]}"
    section = "hydra" if key.startswith("hydra.") else "job"
    return f"{argument} is not possible: there is no key {key}{hint}; `--cfg {section}` lists all keys"


def _is_no_option(argument: str) -> bool:
    """Whether an argument gives a configuration group, such as `clip`, a value that cannot name an option of it."""
    if not (CONFIGS / argument.partition("=")[0]).is_dir() or "=" not in argument:
        return False
    override = OverridesParser.create().parse_override(argument)
    values = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    return not all(isinstance(value, str | list | QuotedString) for value in values)
