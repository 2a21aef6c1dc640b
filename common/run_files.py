"""The shapes of the files in a run folder, for those who write them and those who read them.

Their names are in `training/run_dir.py`, which says what each is for. Numbers that were not finite are null.
"""

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from common.errors import shown
from common.reading import Record, parse_record, read_lines

Step = Annotated[int, Field(ge=0, lt=2**53)]
#: A value of the setting `fork_from`. A number of 15 digits is below the bound of a `Step`.
_FOLDER_AND_STEP = re.compile(r"(.+)@([0-9]{1,15})", re.DOTALL)
Number = Annotated[float, Field(allow_inf_nan=False)]


def _finite(value: Any) -> Any:
    """Return a value; raise `ValueError` if a number in it is none that a float can be."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        _finite(each)
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
        raise ValueError("a number must be finite")
    return value


#: An argument of a strategy.
Argument = Annotated[Any, AfterValidator(_finite)]


#: Columns of metrics.jsonl, besides times, that a run repeated bit for bit would not have.
_MEASURED = ("tokens_per_second", "mfu", "peak_memory_gib")


def is_measured(column: str) -> bool:
    """Whether a column of metrics.jsonl measures the machine: a run repeated bit for bit would have other numbers."""
    return column.endswith("_seconds") or column in _MEASURED


class MetricsLine(Record):
    """A line of metrics.jsonl: further fields are the strategy's telemetry and the times of the step's phases."""

    __pydantic_extra__: dict[str, Number | None] = Field(init=False)

    step: Annotated[int, Field(ge=1, lt=2**53)]
    tokens: Step
    loss: Number | None
    grad_norm: Number | None
    tokens_per_second: Number | None = None


class ValidationLine(Record):
    """A line of val_metrics.jsonl. A loss that was not finite is absent."""

    __pydantic_extra__: dict[str, Number] = Field(init=False)

    step: Step
    val_tokens: Step


class Change(Record):
    """A change of an argument of the clipping strategy or the rule over updates, which a start has made."""

    model_config = ConfigDict(serialize_by_alias=True)

    setting: Annotated[str, Field(pattern=r"^(clip|update)\.\w{1,100}$")]
    before: Argument = Field(None, alias="from")
    """Absent if the run had left the setting at its default."""
    after: Argument = Field(alias="to")

    @model_validator(mode="after")
    def _is_live(self) -> "Change":
        if self.setting.partition(".")[2] in ("name", "_target_"):
            raise ValueError(f"{self.setting} does not change")
        return self


class Start(Record):
    """One start of a run, with the environment that it had."""

    started: str | None = None
    command: list[str] = Field([])
    commit: str | None = None
    uncommitted_changes: bool = False
    versions: dict[str, str] = Field({})
    device: str = "an unknown device"
    platform: str | None = None
    data_fingerprint: str | None = None
    data_folder: str | None = None
    tokenizer: dict[str, str] = Field({})
    """SHA-256 of each file of the tokenizer, in hexadecimal, by its name."""
    step: Step | None = None
    slurm_job: str | None = None
    changes: list[Change] = Field([])
    """Of settings, that this start has made."""


class Environment(Record):
    """environment.json."""

    starts: list[Start]


class SlurmJob(Record):
    """job.json."""

    slurm: str | None = None


class Rewind(Record):
    """A rewind from a step to an earlier one, and the batches that the run has skipped in all so far."""

    from_step: Step
    to_step: Step
    skipped_batches: Step

    @model_validator(mode="after")
    def _goes_back(self) -> "Rewind":
        if self.to_step >= self.from_step:
            raise ValueError("to_step must be below from_step")
        return self


class Rewinds(Record):
    """rewinds.json."""

    rewinds: list[Rewind]


def corrupted_steps(steps: Iterable[int], rewinds: Iterable[Mapping[str, Any]]) -> list[int]:
    """Return those of `data.corruption.steps` that are corrupted after some rewinds.

    A corrupted batch that a rewind skips does not come back: its step is taken again with the batch of the text.
    """
    taken_again = [range(rewind["to_step"] + 1, rewind["from_step"] + 1) for rewind in rewinds]
    return [step for step in steps if not any(step in again for again in taken_again)]


def folder_and_step(fork_from: str) -> tuple[str, int] | None:
    """Return the run folder and the step of a text FOLDER@STEP; `None` if it has another form."""
    match = _FOLDER_AND_STEP.fullmatch(fork_from)
    return None if match is None else (match[1], int(match[2]))


class Result(Record):
    """result.json, see `experiments.run.summary.summarise` and `training.run.train`."""

    steps: Annotated[int, Field(ge=1)]
    tokens: Step
    fork_step: Step | None = None
    train_loss: Number | None
    test_loss: Number | None
    test_bits_per_byte: Number | None = None
    unigram_entropy: Number
    test_tokens: Step
    parameters: Step
    data_fingerprint: str
    spikes: Step
    spike_definition: str
    clipped_share: Annotated[float, Field(ge=0, le=1)]
    skipped: Step = 0
    clipped_by_z: Step | None = None
    clipped_by_max_share: Annotated[float, Field(ge=0, le=1)] | None = None
    update_clipped_share: Annotated[float, Field(ge=0, le=1)] | None = None
    lowest_update_scale: Annotated[float, Field(ge=0, le=1)] | None = None
    highest_clipped_element_share: Annotated[float, Field(ge=0, le=1)] | None = None
    low_rate_steps: Step | None = None
    low_rate_longest: Step | None = None
    low_rate_from: Step | None = None
    tokens_per_second: Number | None
    mfu: Number | None = None
    step_seconds: dict[str, Number | None] = Field({})
    saving_seconds: Number | None = None
    peak_memory_gib: Number | None = None
    changes: list[dict[str, Any]] = Field([])
    """Of settings, while the run trained: see `setting_changes`."""
    corrupted_batches: Step = 0
    corruption_kind: str | None = None
    masked_rows: Step | None = None
    masked_steps: Step | None = None


class Score(Record):
    """A score on a task, see `evaluation.scores.score_task`: further fields are the metrics."""

    task: str
    num_fewshot: Step
    limit: Step | None = None
    seed: int | None = None
    step: Step | None
    dtype: str | None = None
    model: str | None = None
    items: Annotated[int, Field(ge=1)]
    versions: dict[str, str] = Field({})
    date: str | None = None


class TaskScores(Record):
    """task_scores.json."""

    scores: list[Score]


def value_before(change: Mapping[str, Any]) -> str:
    """Return the value that a setting had before a change, as text."""
    return shown(change["from"]) if "from" in change else "at its default"


def setting_changes(starts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the changes of settings that starts of a run have made: `step`, `setting`, `from` and `to` of each.

    A change holds since the step of its start, or since that of a later start that went back further.
    """
    changes: list[dict[str, Any]] = []
    lowest = math.inf
    for start in reversed(starts):
        lowest = min(lowest, start.get("step") or 0)
        changes += [{"step": lowest, **change} for change in reversed(start.get("changes", ()))]
    return changes[::-1]


def read_validation(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a val_metrics.jsonl, which may not exist; a damaged one, perhaps cut off, does not count."""
    rows = []
    for line in read_lines(path) if path.exists() else ():
        with suppress(ValueError):
            rows.append(as_dict(parse_record(ValidationLine, line)))
    return rows


def as_dict(record: Record) -> dict[str, Any]:
    """Return the fields that a record was read with."""
    return record.model_dump(exclude_unset=True)
