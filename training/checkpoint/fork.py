"""A new run from a step of an old one: `fork_from=runs/main/NAME@STEP`, for example with another clipping strategy.

Model, text, seed and batches must be the old run's; clipping, optimizer and length are the new one's. The statistics of
the clipper, and of a rule over updates, are restored if its settings are the same, and reset otherwise, or with
`fork_statistics=reset`. With `fork_data=new`, the text and the length of sequences are the new run's too: see
`training.checkpoint.fork_data`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.errors import ConfigError, RunError, UserError, shown
from common.files import write_atomic
from common.run_files import corrupted_steps, folder_and_step
from common.text import flatten
from training.checkpoint.fork_data import check_new_data
from training.checkpoint.saved_config import checkpoint_config, why_no_checkpoint
from training.checkpoint.state import find_problem
from training.config.identity import ADDED, identity, saved_identity_of
from training.config.optimizer import state_differences
from training.config.schema import Config
from training.run_dir import RunDir
from training.runtime.distributed import rank

#: Settings that a run and those forked from it share.
SHARED = ("model", "data", "seed", "trainer.global_batch_size", "trainer.precision")
#: Of them, those that may differ after the step: the order of the sequences is the same.
NOT_SHARED = ("data.corruption.", "data.instance_filter.")


class ForkSource(NamedTuple):
    """Where a forked run starts: after a step of the old run."""

    run_dir: RunDir
    step: int
    keeps_clipping: bool  # whether the new run begins with the statistics of the old one's clipper
    keeps_rule: bool  # the same of their rules over updates, if both have one
    new_data: bool = False  # whether the new run's data begin at the step

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of that step."""
        return self.run_dir.checkpoint(self.step)

    def batches_before(self, run_dir: RunDir) -> int:
        """Return the global batches of the old run up to the step, with those that it has skipped.

        Raises:
            RunError: it was rewound to the step after the run in `run_dir` had started from there.
        """
        rewinds = self.run_dir.rewinds(self.step)
        if run_dir.rewinds(self.step)[: len(rewinds)] != rewinds:
            raise RunError(
                f"{self.run_dir.path} was rewound to step {self.step} since {run_dir.path} began there, or its "
                f"{self.run_dir.rewinds_file.name} was changed: remove {run_dir.path} to fork again"
            )
        return self.step + self.run_dir.skipped_batches(self.step)

    def copy_history(self, run_dir: RunDir) -> None:
        """Write the old run's metrics and rewinds up to the step into the new run's folder, unless it has metrics."""
        if run_dir.metrics_file.exists():
            return
        run_dir.write_rewinds(self.run_dir.rewinds(self.step))
        lines = [json.dumps(row) + "\n" for step, row in self.run_dir.metrics_rows().items() if step <= self.step]
        write_atomic(run_dir.metrics_file, "".join(lines))


def find_fork_source(config: Config, run_dir: RunDir) -> ForkSource | None:
    """Return the step of another run from which a run starts; `None` if it starts from nothing.

    A run that has a checkpoint of its own can do without the other run, which may be gone, damaged or changed. If it is
    as it was, the run can be rewound to its step.

    Raises:
        ConfigError: there is no such checkpoint, or its run has other settings.
        UserError: the other run cannot be read by this version, or its tokenizer was changed.
        RunError: the record of its rewinds is damaged.
    """
    if (folder := fork_folder(config, run_dir)) is None:
        return None
    try:
        return _fork_source(config, folder)
    except (UserError, RunError):
        if run_dir.checkpoint_steps():
            return None
        raise


def fork_folder(config: Config, run_dir: RunDir) -> Path | None:
    """Return the folder of the run that `fork_from` names; `None` if it is null.

    A name alone is a run next to the one in `run_dir`, so that both can be moved together.
    """
    if (source := folder_and_step(config.fork_from or "")) is None:
        return None
    folder, _ = source
    return Path(folder) if "/" in folder else run_dir.path.parent / folder


def fork_step(config: Config) -> int:
    """Return the step that `fork_from` names; 0 if it is null."""
    source = folder_and_step(config.fork_from or "")
    return 0 if source is None else source[1]


def check_corruption(
    config: Config, old: Config, rewinds: list[dict[str, int]], step: int, impossible: Callable[[str], ConfigError]
) -> None:
    """Raise `ConfigError` if the corrupted batches up to the step are not the old run's, or one would not come."""
    said, trained = config.corrupted_batches, old.corrupted_batches
    ours, theirs = ({s for s in corrupted_steps(kinds, rewinds) if s <= step} for kinds in (said, trained))
    if ours != theirs:
        raise impossible(f" with data.corruption.{_setting(config)}: up to step {step}, that run has {sorted(theirs)}")
    if [said[s] for s in sorted(ours)] != [trained[s] for s in sorted(ours)]:
        kind = config.data.corruption.kind
        raise impossible(f" with data.corruption.kind={kind}: that run has {old.data.corruption.kind}")
    taken_again = {*said} - {*corrupted_steps(said, rewinds), *trained, *range(step + 1)}
    if taken_again:
        was = f"that run was rewound, and takes the batch of the text at step {min(taken_again)}"
        raise impossible(f" with data.corruption.{_setting(config)}: {was}")


def _setting(config: Config) -> str:
    """Return the setting that chooses the corrupted steps, with its value."""
    corruption = config.data.corruption
    if corruption.random_steps:
        return f"random_steps={corruption.random_steps} and trainer.max_steps={config.trainer.max_steps}"
    return f"steps={list(corruption.steps)}"


def _fork_source(config: Config, folder: Path) -> ForkSource:
    def impossible(problem: str) -> ConfigError:
        return ConfigError("fork_from", config.fork_from, problem=f"is not possible{problem}")

    run_dir, step, new_data = RunDir(folder), fork_step(config), config.fork_data == "new"
    if not (run_dir.config_file.is_file() or run_dir.checkpoint_steps()):
        raise impossible(f": there is no run in {run_dir.path}")
    if not run_dir.checkpoint(step).exists():
        if not (steps := run_dir.checkpoint_steps()):
            raise impossible(f": {run_dir.path} {why_no_checkpoint(run_dir)}")
        raise impossible(f": the run has no checkpoint of that step, but of {', '.join(map(str, steps))}")
    if rank() == 0 and (problem := find_problem(run_dir.checkpoint(step))):
        raise impossible(f": {run_dir.checkpoint(step)} {problem}")
    old = checkpoint_config(run_dir.checkpoint(step))
    requested, saved = identity(config), saved_identity_of(old, config)
    values, saved_values = (flatten(ADDED) | flatten(each) for each in (requested, saved))
    for key in dict.fromkeys((*values, *saved_values)):
        value, saved_value = values.get(key), saved_values.get(key)
        shared = any(f"{key}.".startswith(f"{part}.") for part in SHARED) and not key.startswith(NOT_SHARED)
        is_data = key.startswith("data.")
        if shared and value != saved_value and not (is_data and new_data):
            hint = "; fork_data=new begins other data on purpose" if is_data else ""
            raise impossible(f" with {key}={shown(value)}: that run has {key}={shown(saved_value)}{hint}")
    if new_data:
        check_new_data(config, old, run_dir)
    check_corruption(config, old, run_dir.rewinds(step), step, impossible)
    if old.trainer.sharded != config.trainer.sharded:
        raise impossible(
            f" with trainer.strategy={config.trainer.strategy}: the checkpoints of trainer.strategy="
            f"{old.trainer.strategy} are {'' if old.trainer.sharded else 'not '}sharded"
        )
    for key, value, saved_value in state_differences(config.optim, old.optim):
        raise impossible(f" with optim.{key}={shown(value)}: that run has optim.{key}={shown(saved_value)}")
    if step >= config.trainer.max_steps:
        raise impossible(f" with trainer.max_steps={config.trainer.max_steps}: it must be more")
    clipping, old_clipping = flatten(requested["clip"]), flatten(saved["clip"])
    # A scope of null is no scope.
    same_clipping = all(clipping.get(key) == old_clipping.get(key) for key in clipping.keys() | old_clipping.keys())
    rules, keeps = (requested.get("update"), saved.get("update")), config.fork_statistics == "same"
    keeps_rule = None in rules or (keeps and rules[0] == rules[1])
    return ForkSource(run_dir, step, keeps and same_clipping, keeps_rule, new_data)
