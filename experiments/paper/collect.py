"""The runs that a table or figure is made of, found on disk; what is missing or does not belong is named."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.paper.suites import Setting
from experiments.run.definitions import diverged
from experiments.run.read import Run, corrupted_rows, read_run

#: Columns of metrics.jsonl that a run must have, those that one with ZClip must; numbers of result.json, and those that
#: may be null; and sections of config.yaml.
COLUMNS = ("step", "tokens", "loss", "grad_norm", "clipped_norm", "clipped")
COLUMNS_OF_ZCLIP = ("mean", "std", "spike")
RESULTS = ("steps", "tokens", "parameters")
RESULTS_OR_NULL = ("train_loss", "test_loss", "tokens_per_second")
SECTIONS = ("paper", "data", "model", "clip")

#: A setting, and a seed.
Key = tuple[Setting, int]


class Expected(NamedTuple):
    """A run that may be there.

    Attributes:
        path: its folder.
        identity: the settings that make it what it is.
    """

    path: Path
    identity: Mapping[str, Any]


class Found(NamedTuple):
    """The runs that are there.

    Attributes:
        runs: that are done, by setting and seed.
        diverged: which of them have diverged.
        unfinished: of those that are not done, the steps they have.
        others: sentences about folders that were left out.
        refused: which of the runs these are.
    """

    runs: dict[Key, Run]
    diverged: set[Key]
    unfinished: dict[Key, int]
    others: list[str]
    refused: frozenset[Key] = frozenset()

    @property
    def seeds(self) -> list[int]:
        """Seeds of which there is any run, be it one that was left out."""
        return sorted({seed for _, seed in [*self.runs, *self.unfinished, *self.refused]})

    def notes(self, settings: Iterable[tuple[str, Setting]], diverged: bool = True) -> list[str]:
        """Return a sentence for each kind of run that is missing, unfinished or diverged, by their labels.

        Args:
            settings: each with its label.
            diverged: whether those that have diverged are named too.
        """
        kinds: dict[str, dict[str, list[str]]] = {"not run": {}, "left out": {}, "unfinished": {}, "diverged": {}}
        for label, setting in dict.fromkeys(settings):
            for seed in self.seeds:
                key, said = (setting, seed), str(seed)
                if key in self.unfinished:
                    kind, said = "unfinished", f"{seed} after {self.unfinished[key]} steps"
                elif key in self.refused:
                    kind = "left out"
                elif key not in self.runs:
                    kind = "not run"
                elif key in self.diverged:
                    kind = "diverged"
                else:
                    continue
                kinds[kind].setdefault(label, []).append(said)
        return [
            f"{kind}: "
            + ", ".join(f"{label} (seed{'s' * (len(seeds) > 1)} {', '.join(seeds)})" for label, seeds in there.items())
            for kind, there in kinds.items()
            if there and (diverged or kind != "diverged")
        ]


def collect(expected: Mapping[Key, Expected], identity: Callable[[DictConfig], Mapping[str, Any]]) -> Found:
    """Read the runs that are there.

    Args:
        expected: those that may be.
        identity: the part of a run's configuration that makes it what it is.
    """
    found = Found({}, set(), {}, [])
    left: dict[str, list[str]] = {}  # why, and which folders
    refused: set[Key] = set()
    paths = {each.path.resolve() for each in expected.values()}
    for key, each in expected.items():
        if not (each.path / "config.yaml").is_file():
            if (each.path / "result.json").is_file():
                left.setdefault("no config.yaml", []).append(each.path.name)
                refused.add(key)
            continue
        own = _settings(each.path, identity)
        if own is None or (changed := _differences(own, each.identity)):
            why = "cannot be read" if own is None else f"was changed ({changed})"
            left.setdefault(f"config.yaml {why}", []).append(each.path.name)
            refused.add(key)
            continue
        if not (each.path / "result.json").is_file():
            metrics = each.path / "metrics.jsonl"
            found.unfinished[key] = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
            continue
        try:
            run = _checked(read_run(each.path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            left.setdefault(f"damaged ({error}); a folder that is removed is trained again", []).append(each.path.name)
            refused.add(key)
            continue
        found.runs[key] = run
        loss = np.delete(run.metrics["loss"], sorted(corrupted_rows(run)))
        ends = [(run.result or {}).get(name) for name in ("train_loss", "test_loss")]
        if any(end is None or not np.isfinite(end) for end in ends) or diverged(loss):
            found.diverged.add(key)
    strangers = [
        other.parent
        for folder in sorted({path.parent for path in paths})
        for other in sorted(folder.glob("*/config.yaml"))
        if other.parent not in paths
    ]
    for folder in strangers:
        if stranger := _stranger(folder, expected, identity):
            left.setdefault(stranger, []).append(folder.name)
    found.others.extend(f"{_listed(names)} left out: {why}" for why, names in left.items())
    found = found._replace(refused=frozenset(refused))
    there = found.seeds
    if gone := [str(seed) for seed in dict.fromkeys(seed for _, seed in expected) if seed not in there]:
        found.others.append(f"there is no run of seed{'s' * (len(gone) > 1)} {', '.join(gone)}")
    return found


def _listed(names: Sequence[str]) -> str:
    """Name the first three, and say how many more there are, with the verb."""
    names = list(dict.fromkeys(names))
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)} {'are' if names[1:] else 'is'}"


def _checked(run: Run) -> Run:
    """Return a finished run, or raise `ValueError` if one of its files lacks what tables and figures need."""
    if missing := [name for name in SECTIONS if not isinstance(run.config.get(name), dict)]:
        raise ValueError(f"config.yaml has no {', '.join(missing)}")
    columns = COLUMNS + (COLUMNS_OF_ZCLIP if "z_thresh" in run.config["clip"] else ())
    if missing := [name for name in columns if name not in run.metrics]:
        raise ValueError(f"metrics.jsonl has no {', '.join(missing)}")
    result: Any = run.result
    if not isinstance(result, dict):
        raise ValueError("result.json holds no numbers")
    for key in (*RESULTS, *(key for key in RESULTS_OR_NULL if result.get(key) is not None)):
        if not isinstance(result.get(key), int | float):
            raise ValueError(f"result.json has {key}={result.get(key)!r}, which is no number")
    if not isinstance(result.get("data_fingerprint"), str):
        raise ValueError("result.json has no data_fingerprint")
    if not isinstance(result.get("step_seconds", {}), dict):
        raise ValueError(f"result.json has step_seconds={result['step_seconds']!r}, which are no parts of a step")
    if not np.array_equal(run.metrics["step"], np.arange(1, result["steps"] + 1)):
        raise ValueError("its metrics.jsonl and result.json are not of one run")
    if not all(isinstance(start, dict) and isinstance(start.get("versions"), dict) for start in run.starts):
        raise ValueError("environment.json holds no list of starts with their versions")
    for score in run.scores:
        numbers = [value for key, value in score.items() if key.startswith("acc") and value is not None]
        if not {"task", "num_fewshot", "step", "items"} <= {*score} or not all(
            isinstance(each, int | float) for each in numbers
        ):
            raise ValueError(f"task_scores.json has a score that is none: {score}")
    return run


def _settings(folder: Path, identity: Callable[[DictConfig], Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return what makes a run what it is; `None` if its configuration cannot be read."""
    try:
        return identity(OmegaConf.load(folder / "config.yaml"))  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, OmegaConfBaseException):
        return None


def _stranger(
    folder: Path, expected: Mapping[Key, Expected], identity: Callable[[DictConfig], Mapping[str, Any]]
) -> str | None:
    """Say why a folder is left out; `None` if it is of another seed alone."""
    own = _settings(folder, identity)
    if own is None:
        return "config.yaml cannot be read"
    nearest = min(expected.values(), key=lambda each: len(_flat(own).items() ^ _flat(each.identity).items()))
    seeds = {each.identity.get("seed") for each in expected.values()}
    if own.get("seed") not in seeds and not _differences({**own, "seed": None}, {**nearest.identity, "seed": None}):
        return None
    differs = _differences(own, nearest.identity)
    if not differs:
        return f"{nearest.path.name} again, under a name of its own"
    return f"no run of these experiments ({differs})"


def _differences(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Name up to three settings that differ; empty if none does."""
    mine, theirs = _flat(own), _flat(other)
    keys = [key for key in dict.fromkeys([*mine, *theirs]) if mine.get(key) != theirs.get(key)]
    said = [f"{key}={mine.get(key)}, not {theirs.get(key)}" for key in keys[:3]]
    return ", ".join(said) + (f", and {len(keys) - 3} more" if len(keys) > 3 else "")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found
