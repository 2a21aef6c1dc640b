"""Archives of finished runs: what tables and figures read of them, without checkpoints, small enough for git.

An archive is a JSON object, compressed as .json.xz: `files` has the text of each small file of the run folder, and
`metrics` the columns of metrics.jsonl. Columns named in `differences` have each number minus the one before, which for
steps and tokens takes little space. A run of 6,000 steps takes 45 to 65 kB.
"""

import json
import lzma
from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from common.files import commit_new, temporary_folder, write_atomic
from common.reading import Record, check_record, open_regular, parse_json, parse_record, read_bytes, read_lines
from common.run_files import Environment, MetricsLine, as_dict, is_measured
from experiments.run.read import read_config, read_run

#: Ending of an archive's name, behind that of the run folder.
ENDING = ".json.xz"
#: Significant digits of numbers that are no integers, and of those that follow from other columns.
DIGITS, DERIVED_DIGITS = 5, 4
#: Columns that follow from others, but for rounding.
DERIVED = ("z", "mean", "std", "update_bound", "lr")
#: Files whose text is kept, beside config.yaml and environment.json.
FILES = ("result.json", "val_metrics.jsonl", "task_scores.json", "rewinds.json")
#: Most bytes of an archive's content: some 300,000 steps.
MOST = 1 << 25


class Archive(Record):
    """The content of an archive."""

    files: dict[str, str]
    metrics: dict[str, list[float | int | None]]
    differences: tuple[str, ...] = Field(default=(), strict=False)


def write_archive(run: Path, archive: Path) -> None:
    """Write the archive of a finished run.

    `paths` in the configuration become the defaults, and the recorded commands lose the settings that begin with
    `paths.`. Other paths, such as `data.path`, are kept: the run is known by them. Columns that measure the machine are
    left out.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a file of the run is damaged, or it has too many steps.
    """
    files = {"config.yaml": _portable_config(run), "environment.json": _portable_environment(run)}
    files |= {name: read_bytes(run / name).decode() for name in FILES if (run / name).exists()}
    rows = [as_dict(parse_record(MetricsLine, line)) for line in read_lines(run / "metrics.jsonl")]
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if not is_measured(name)]
    metrics: dict[str, list[Any]] = {
        name: [_rounded(row.get(name), DERIVED_DIGITS if name in DERIVED else DIGITS) for row in rows] for name in names
    }
    differences = [name for name in names if all(type(value) is int for value in metrics[name])]
    for name in differences:
        metrics[name] = [value - before for before, value in pairwise([0, *metrics[name]])]
    archived = {"files": files, "metrics": metrics, "differences": differences}
    content = json.dumps(archived, separators=(",", ":")).encode()
    if len(content) > MOST:
        raise ValueError(f"its metrics take more than {MOST:,} bytes")
    write_atomic(archive, lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


def restore_archive(archive: Path, run: Path) -> None:
    """Make the run folder of an archive. It is there complete or not at all.

    Raises:
        OSError: a file cannot be read or written, or there is something in the place of the folder.
        ValueError: the archive is damaged, or not of a finished run.
    """
    content = read_archive(archive)
    if unknown := set(content.files) - {"config.yaml", "environment.json", *FILES}:
        raise ValueError(f"a run has no file {min(unknown)!r}")
    if len({len(column) for column in content.metrics.values()}) > 1:
        raise ValueError("columns of metrics differ in length")
    names = list(content.metrics)
    rows = zip(*content.metrics.values(), strict=True)
    lines = [json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows]
    run.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(run) as folder:
        for name, text in content.files.items():
            write_atomic(folder / name, text)
        write_atomic(folder / "metrics.jsonl", "".join(lines))
        if not read_run(folder).result:
            raise ValueError("it has no result.json")
        commit_new(folder, run)


def read_archive(archive: Path) -> Archive:
    """Return the content of an archive, with whole columns and no `differences`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    with open_regular(archive) as compressed, lzma.open(compressed) as file:
        try:
            content = file.read(MOST + 1)
        except (lzma.LZMAError, EOFError):
            raise ValueError("not compressed by xz, or cut off") from None
    if len(content) > MOST:
        raise ValueError(f"more than {MOST:,} bytes")
    archived = check_record(Archive, parse_json(content))
    metrics = dict(archived.metrics)
    for name in archived.differences:
        column = [value for value in metrics.get(name, ()) if type(value) is int]
        if len(column) != len(metrics.get(name, [None])):
            raise ValueError(f"differences of {name!r} must be those of a column of integers")
        metrics[name] = [*accumulate(column)]
    return archived.model_copy(update={"metrics": metrics, "differences": ()})


def _portable_config(run: Path) -> str:
    return yaml.safe_dump({**read_config(run), "paths": {"runs": "runs", "cache": "cache"}}, sort_keys=False)


def _portable_environment(run: Path) -> str:
    starts = parse_record(Environment, read_bytes(run / "environment.json")).starts
    portable = [_portable_start(as_dict(start)) for start in starts]
    return json.dumps({"starts": portable}, indent=1)


def _portable_start(start: Mapping[str, Any]) -> dict[str, Any]:
    command = [word for word in start.get("command", ()) if not word.startswith("paths.")]
    return {**start, "command": command}


def _rounded(value: float | None, digits: int) -> float | int | None:
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
