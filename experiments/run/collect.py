"""Collecting declared runs from disk, with warnings about runs that are missing or do not fit.

A declaration names each run by a spec, such as a `RunSpec` of the paper's tables or an `Arm` of a lab, and a seed.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.reading import read_lines
from common.text import flatten
from experiments.run.definitions import diverged
from experiments.run.read import Run, corrupted_rows, read_config, read_run

#: What can go wrong in reading the files of a run.
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)

#: A declared run, and its seed.
Key = tuple[Any, int]
#: Returns the settings that determine a run's numbers, from its config.yaml as a nested dict.
Identity = Callable[[dict[str, Any]], Mapping[str, Any]]


class ExpectedRun(NamedTuple):
    """The folder of a run that a table or figure needs, and the settings that determine its numbers."""

    path: Path
    identity: Mapping[str, Any]


class RunCollection(NamedTuple):
    """The declared runs that exist on disk."""

    runs: dict[Key, Run]  # those that are finished
    diverged: set[Key]  # the finished runs that have diverged
    unfinished: dict[Key, int]  # their number of steps
    warnings: list[str]  # sentences about excluded folders and missing seeds
    excluded: frozenset[Key]  # the expected runs among the excluded folders

    @property
    def seeds(self) -> list[int]:
        """Seeds of which any run exists, even an excluded one."""
        return sorted({seed for _, seed in [*self.runs, *self.unfinished, *self.excluded]})

    def runs_of(self, spec: Hashable) -> list[Run]:
        """Return the finished runs of a spec, in the order of their seeds."""
        return [run for seed in self.seeds if (run := self.runs.get((spec, seed))) is not None]

    def diverged_seeds(self, spec: Hashable) -> list[int]:
        """Return the seeds with which a run has diverged."""
        return [seed for seed in self.seeds if (spec, seed) in self.diverged]

    def complete_seeds(self, specs: Collection[Hashable]) -> list[int]:
        """Return the seeds of which all runs are finished."""
        return [seed for seed in self.seeds if all((spec, seed) in self.runs for spec in specs)]

    def notes(self, labelled_specs: Iterable[tuple[str, Hashable]], with_diverged: bool = True) -> list[str]:
        """Return a sentence for each kind of missing run, such as "not run: ZClip (seed 1)", and for diverged runs."""
        kinds: dict[str, dict[str, list[str]]] = {"not run": {}, "excluded": {}, "unfinished": {}, "diverged": {}}
        for label, spec in dict.fromkeys(labelled_specs):
            for seed in self.seeds:
                key, shown = (spec, seed), str(seed)
                if key in self.unfinished:
                    kind, shown = "unfinished", f"{seed} after {self.unfinished[key]} steps"
                elif key in self.excluded:
                    kind = "excluded"
                elif key not in self.runs:
                    kind = "not run"
                elif key in self.diverged and with_diverged:
                    kind = "diverged"
                else:
                    continue
                kinds[kind].setdefault(label, []).append(shown)
        return [
            f"{kind}: " + ", ".join(f"{label} ({seeds_text(seeds)})" for label, seeds in labels.items())
            for kind, labels in kinds.items()
            if labels
        ]


def seeds_text(seeds: Sequence[object]) -> str:
    """Return `seed 0` or `seeds 0, 1`."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def collect(expected: Mapping[Key, ExpectedRun], identity: Identity, varied: Collection[str] = ()) -> RunCollection:
    """Read the expected runs that exist, and report folders next to them that do not belong.

    Args:
        expected: the runs.
        identity: returns the settings by which a run is known.
        varied: settings, or sections of them, in which the runs of other sets differ. A folder that differs from an
            expected run in nothing else is not reported.
    """
    runs: dict[Key, Run] = {}
    unfinished: dict[Key, int] = {}
    excluded: set[Key] = set()
    folders_by_reason: dict[str, list[str]] = {}
    for key, (path, expected_identity) in expected.items():
        has_config, has_result = ((path / name).is_file() for name in ("config.yaml", "result.json"))
        reason = ""
        if not has_config:
            reason = "no config.yaml" if has_result else ""
        elif (saved := _saved_identity(path, identity)) is None:
            reason = "config.yaml cannot be read"
        elif changes := _differences(saved, expected_identity):
            reason = f"config.yaml was changed ({changes})"
        elif not has_result:
            metrics = path / "metrics.jsonl"
            unfinished[key] = sum(1 for _ in read_lines(metrics)) if metrics.is_file() else 0
        else:
            try:
                run = read_run(path)
                _check(run)
                if run.changes:
                    reason = f"{run.changes[0]['setting']} was changed while it trained"
                else:
                    runs[key] = run
            except READ_ERRORS as error:
                reason = f"damaged ({error}): restore the file, or remove the folder to train it again"
        if reason:
            excluded.add(key)
            folders_by_reason.setdefault(reason, []).append(path.name)
    for folder in _unexpected_folders(expected):
        if reason := _why_unexpected(folder, expected, identity, varied):
            folders_by_reason.setdefault(reason, []).append(folder.name)
    warnings = [f"{_listed(names)} excluded: {reason}" for reason, names in folders_by_reason.items()]
    has_diverged = {key for key, run in runs.items() if _has_diverged(run)}
    collection = RunCollection(runs, has_diverged, unfinished, warnings, frozenset(excluded))
    if missing := [seed for seed in dict.fromkeys(seed for _, seed in expected) if seed not in collection.seeds]:
        warnings.append(f"there is no run of {seeds_text(missing)}")
    return collection


def _has_diverged(run: Run) -> bool:
    """Return whether a finished run has a final loss that is not finite, or has diverged by `definitions.diverged`."""
    finals = [run.result.get(name) for name in ("train_loss", "test_loss")]
    loss = np.delete(run.metrics["loss"], sorted(corrupted_rows(run)))
    return any(final is None or not np.isfinite(final) for final in finals) or diverged(loss)


def _listed(names: Sequence[str]) -> str:
    """Name the first three and the number of further ones, followed by the verb."""
    names = list(dict.fromkeys(names))
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)} {'are' if names[1:] else 'is'}"


def _check(run: Run) -> None:
    """Raise `ValueError` if a file of a finished run lacks something that tables and figures need."""
    if missing := [name for name in ("paper", "data", "model", "clip") if not isinstance(run.config.get(name), dict)]:
        raise ValueError(f"config.yaml has no {', '.join(missing)}")
    columns = ["step", "tokens", "loss", "grad_norm", "clipped_norm", "clipped"]
    columns += ["mean", "std", "spike"] if run.config["clip"].get("_target_") == "zclip.ZClip" else []
    if missing := [name for name in columns if name not in run.metrics]:
        raise ValueError(f"metrics.jsonl has no {', '.join(missing)}")
    for name in ("grad_norm", "clipped_norm"):
        _require(not (run.metrics[name] < 0).any(), f"metrics.jsonl has {name} below 0")
    step = run.metrics["step"]
    is_whole = len(step) == run.result["steps"] and np.array_equal(step, np.arange(1, len(step) + 1))
    _require(is_whole, "its metrics.jsonl and result.json are not of the same run")
    _require(bool((np.diff(run.metrics["tokens"], prepend=0) > 0).all()), "metrics.jsonl has tokens that do not grow")
    for score in run.scores:
        numeric = [key for key in score if key.startswith("acc") or key == "truncated_fraction"]
        numbers = [score[key] for key in numeric if score[key] is not None]
        is_valid = all(type(number) in (int, float) and np.isfinite(number) for number in numbers)
        _require(is_valid, f"task_scores.json has a score of {score['task']} that is not a number")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _saved_identity(folder: Path, identity: Identity) -> Mapping[str, Any] | None:
    """Return the identity of a run from its config.yaml; `None` if that cannot be read."""
    try:
        return identity(read_config(folder))
    except READ_ERRORS:
        return None


def _unexpected_folders(expected: Mapping[Key, ExpectedRun]) -> list[Path]:
    """Return the run folders next to the expected ones."""
    paths = {run.path.resolve() for run in expected.values()}
    return [
        config.parent
        for parent in sorted({path.parent for path in paths})
        for config in sorted(parent.glob("*/config.yaml"))
        if config.parent not in paths
    ]


def _why_unexpected(
    folder: Path, expected: Mapping[Key, ExpectedRun], identity: Identity, varied: Collection[str]
) -> str:
    """Return why a folder is excluded; empty if it differs from an expected run only in its seed or in `varied`."""
    saved = _saved_identity(folder, identity)
    if saved is None:
        return "config.yaml cannot be read"
    settings = _settings(saved).items()
    nearest = min(expected.values(), key=lambda run: len(settings ^ _settings(run.identity).items()))
    seeds = {run.identity.get("seed") for run in expected.values()}
    if saved.get("seed") not in seeds and not _differences({**saved, "seed": None}, {**nearest.identity, "seed": None}):
        return ""
    changed = _changed_keys(saved, nearest.identity)
    if not changed:
        return f"a copy of {nearest.path.name} under another name"
    if all(key in varied or key.partition(".")[0] in varied for key in changed):
        return ""
    differences = _differences(saved, nearest.identity)
    return f"not a run of these experiments ({differences})"


def _changed_keys(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys of the settings that differ."""
    one, other = _settings(saved), _settings(expected)
    return [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]


def _differences(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Name up to three settings that differ; empty if none does."""
    one, other = _settings(saved), _settings(expected)
    keys = _changed_keys(saved, expected)
    shown = [f"{key}={one.get(key)}, not {other.get(key)}" for key in keys[:3]]
    return ", ".join(shown) + (f", and {len(keys) - 3} more" if len(keys) > 3 else "")


def _settings(identity: Mapping[str, Any]) -> dict[str, str]:
    """Return settings by dotted key, as text, so that lists and numbers can be compared."""
    return {key: _setting_text(value) for key, value in flatten(identity).items()}


def _setting_text(value: Any) -> str:
    """Return a setting as text; 2.0 is 2: a class of one's own is not imported to see which it declares."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_setting_text, value))}]"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
