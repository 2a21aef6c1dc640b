"""The configuration of a run that has begun: that in its newest checkpoint counts, and config.yaml must agree with it.

Both may differ by the changes that environment.json lists, see `training.config.live`.

config.yaml can be lost or edited. Training continues from the checkpoint, whose settings hold for all its steps.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import ConfigError, UserError, one_line, shown
from common.settings import parse
from training.checkpoint.format import is_valid, load_header, saved_config
from training.config.compose import read_config
from training.config.identity import differences
from training.config.live import SECTIONS, argument, is_live, live_changes, with_changes, without_changes
from training.config.schema import Config
from training.config.strategy import clipping_strategy, update_rule
from training.run_dir import RunDir


def why_no_checkpoint(run_dir: RunDir) -> str:
    """Return why a run has no checkpoint at all, with what to do, as the end of a sentence about the run."""
    if run_dir.result_file.exists():
        again = f"remove {run_dir.path} to train it again"
        return f"has no checkpoints, as after scripts/archive.py has restored it; {again}"
    return "has no checkpoint yet: train it first"


def config_of_run(run_dir: RunDir) -> Config | None:
    """Return the configuration with which a run was begun; `None` if there is no run in the folder.

    Raises:
        UserError: config.yaml is damaged, of another version, or says what the run's checkpoint was not trained with.
    """
    trained = _config_of_newest(run_dir)
    if not run_dir.config_file.is_file():
        return None if trained is None else _before_changes(run_dir, trained)
    return agreed_config(run_dir, trained)


def agreed_config(run_dir: RunDir, trained: Config | None) -> Config:
    """Return the configuration in config.yaml; raise `UserError` if it is not that of a checkpoint.

    Settings that were changed while the run trained are those before the changes.
    """
    config = read_config(run_dir.config_file)
    trained = None if trained is None else _before_changes(run_dir, trained)
    if trained is not None and (changed := differences(config, trained, is_named=False)):
        pairs = [f"{key}={shown(there)} (trained: {shown(ours)})" for key, (there, ours) in changed.items()][:4]
        if all(map(is_live, changed)):  # the changes are lost or edited, or config.yaml is
            raise UserError(
                f"{run_dir.config_file}, with the changes in environment.json, says what the run was not trained with, "
                f"{', '.join(pairs)}: restore both, or remove both and continue by resume={run_dir.path}"
            )
        raise UserError(
            f"{run_dir.config_file} says what the run was not trained with, {', '.join(pairs)}: restore it, or remove "
            "it: the same command as at first makes it again"
        )
    return config


def _before_changes(run_dir: RunDir, trained: Config) -> Config:
    """Return the configuration of a checkpoint before the recorded changes; raise `UserError` if it has others."""
    changes = run_dir.setting_changes()
    recorded: dict[str, list[Any]] = {}
    for change in changes:
        recorded.setdefault(change["setting"], [change.get("from")]).append(change["to"])
    for key, values in recorded.items():
        if (value := argument(trained, key)) not in values:
            raise UserError(
                f"{run_dir.environment_file} says what the run was not trained with, {key}={shown(values[-1])} "
                f"(trained: {shown(value)}): restore it"
            )
    return without_changes(trained, changes)


def check_changes(run_dir: RunDir, before: Config, after: Config) -> None:
    """Raise `ConfigError` if an argument of the strategy or rule cannot change in a run that has begun.

    The run must not be finished, and the statistics in its newest checkpoint must fit the new value. Writes nothing.
    """
    changes, problem = live_changes(before, after), f"is not possible with resume={run_dir.path}"
    if changes and run_dir.result_file.exists():
        raise ConfigError(changes[0]["setting"], changes[0]["to"], problem=f"{problem}: the run is finished")
    states = _statistics_of_newest(run_dir) if changes else {}
    for section in SECTIONS:
        changed = [change for change in changes if change["setting"].startswith(f"{section}.")]
        if changed and (error := _misfit(after, section, states)) is not None:
            for change in changed:  # one that does not fit by itself is the cause
                if (own := _misfit_alone(before, change, section, states)) is not None:
                    changed, error = [change], own
                    break
            kept = (f"{c['setting']}={shown(c['from'])}" if "from" in c else f"no {c['setting']}" for c in changed)
            raise ConfigError(
                changed[0]["setting"],
                changed[0]["to"],
                problem=f"{problem}: {one_line(error)}; keep {' and '.join(kept)}, or fork the run",
            ) from error


def _misfit(config: Config, section: str, states: Mapping[str, Any]) -> ValueError | None:
    """Return why saved statistics do not fit the strategy or rule of a configuration; `None` if they do.

    Raises `ConfigError` if an argument is not possible at all.
    """
    part = clipping_strategy(config.clip) if section == "clip" else update_rule(config.update)
    try:
        if part is not None and section in states:
            part.load_state_dict(states[section], override=True)
    except ValueError as error:
        return error
    return None


def _misfit_alone(
    before: Config, change: Mapping[str, Any], section: str, states: Mapping[str, Any]
) -> ValueError | None:
    """Return why saved statistics do not fit one change by itself; `None` if they do, or it is not possible alone."""
    with suppress(ConfigError):
        return _misfit(with_changes(before, [change]), section, states)
    return None


def _statistics_of_newest(run_dir: RunDir) -> dict[str, Any]:
    """Return by section the states of strategy and rule in the newest checkpoint that is not damaged."""
    for step in reversed(run_dir.checkpoint_steps()):
        if is_valid(run_dir.checkpoint(step)):
            with suppress(LookupError, TypeError, ValueError):  # a hostile one is reported when the run resumes
                callbacks = load_header(run_dir.checkpoint(step))["callbacks"]
                (state,) = callbacks["TimedClippingCallback"]["strategies"]
                rule = callbacks.get("UpdateRuleCallback")
                return {"clip": state} if rule is None else {"clip": state, "update": rule["rule"]}
    return {}


def check_same_run(run_dir: RunDir, config: Config) -> None:
    """Raise `UserError` if the folder holds a run with other settings. Writes nothing."""
    begun = config_of_run(run_dir)
    if begun is not None and (changed := differences(config, begun)):
        pairs = [f"{key}={shown(ours)} (there: {shown(theirs)})" for key, (ours, theirs) in changed.items()][:4]
        raise UserError(
            f"name={config.name} is taken: {run_dir.path} holds a run with other settings, {', '.join(pairs)}; "
            "choose another name, or none"
        )


def _config_of_newest(run_dir: RunDir) -> Config | None:
    """Return the configuration in the newest checkpoint that can be read; `None` if there is none."""
    for step in reversed(run_dir.checkpoint_steps()):
        checkpoint = run_dir.checkpoint(step)
        if (plain := saved_config(checkpoint)) is not None:  # a damaged one is reported when the run resumes
            return _parsed(checkpoint, plain)
    return None


def checkpoint_config(checkpoint: Path) -> Config:
    """Return the configuration in a checkpoint; raise `UserError` if it has none of this version."""
    plain = saved_config(checkpoint)
    if plain is None:
        raise UserError(f"{checkpoint} is damaged: it has no configuration")
    return _parsed(checkpoint, plain)


def _parsed(checkpoint: Path, plain: Mapping[str, Any]) -> Config:
    try:
        return parse(Config, plain)
    except UserError as error:
        raise UserError(
            f"{checkpoint} has a configuration of another version ({one_line(error)}): such a run cannot be read or "
            "continued; choose another name"
        ) from error
