"""Check this project on one GPU within minutes: `python scripts/gpu_check.py [budget=540] [only=clipping,training]`.

Each stage runs in a process of its own with a time limit, and writes its results to OUT/STAGE.json as it has them. A
second call goes on with the stages that are not done. The table of all results so far is printed last.
`dry_run=true` runs every stage in tiny sizes on any machine.

    python scripts/gpu_check.py dry_run=true out=build/rehearsal
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator
from rich.console import Console
from rich.table import Table

from common.console import make_console
from common.errors import ConfigError, one_line
from common.settings import Allowed, Flag, Folder, Positive, Settings, parse
from scripts.gpu_stages.context import Context, environment_for_children, read_state, write_state

#: The stages in their order, with the most seconds of each, and those that the stages before leave it.
STAGES = {
    "environment": (25, 10),
    "cuda_tests": (130, 40),
    "clipping": (40, 15),
    "training": (200, 60),
    "resume": (80, 50),
    "evaluation": (45, 25),
    "figure": (240, 150),
}

#: Results that the table leaves to the files.
DETAILS = ("versions", "milliseconds", "over_clip_grad_norm")

#: Most seconds of each stage in a dry run.
DRY_RUN_SECONDS = 240


class GpuCheckConfig(Settings):
    """Settings of the command line."""

    out: Folder = "build/gpu-check"
    """Folder with the results. Those in it are kept."""
    carried: Folder = "build/gpu-carry"
    """Folder with what scripts/gpu_carry.py has prepared."""
    budget: Positive = 540
    """Seconds after which no stage runs on."""
    only: Annotated[
        tuple[str, ...],
        BeforeValidator(lambda names: tuple(str(names).split(","))),
        Allowed(f"some of {', '.join(STAGES)}, with commas"),
    ] = tuple(STAGES)
    """Stages that run."""
    dry_run: Flag = False
    """Whether sizes are tiny, so that a CPU can run all stages."""
    report: Folder | None = None
    """Folder to which the results and the figure are copied after each stage; null: none."""
    stage: Annotated[str | None, Allowed("set by this program")] = None
    """Stage that this process runs; null: it starts a process for each."""


def main(values: _entry.Values) -> None:
    """Run the stages that are not done, and print the table of all."""
    config = parse(GpuCheckConfig, values)
    if unknown := [name for name in config.only if name not in STAGES]:
        raise ConfigError("only", unknown[0], f"some of {', '.join(STAGES)}, with commas")
    out = Path(config.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment_for_children(out)
    if config.stage is not None:
        run_here(config, out)
        return
    console = make_console(soft_wrap=False, width=120)
    end = time.time() + config.budget
    for name in config.only:
        run_stage(name, config, out, end, console)
        if config.report is not None:
            Path(config.report).mkdir(parents=True, exist_ok=True)
            for file in (*out.glob("*.json"), *out.glob("figure1.png")):
                shutil.copy(file, config.report)
    console.print(summary(out))


def run_here(config: GpuCheckConfig, out: Path) -> None:
    """Run a stage in this process; its file has the error if it fails."""
    assert config.stage is not None
    before = read_state(out / f"{config.stage}.json").get("results", {})
    deadline = float(os.environ["GPU_CHECK_DEADLINE"])
    context = Context(config.stage, out, Path(config.carried).resolve(), config.dry_run, deadline, before)
    context.save()
    try:
        importlib.import_module(f"scripts.gpu_stages.{config.stage}").run(context)
    except Exception as error:
        state = "unfinished" if isinstance(error, TimeoutError) else "failed"
        write_state(context.file, state, context.results, error=one_line(error, 300))
        raise
    write_state(context.file, "done", context.results)


def run_stage(name: str, config: GpuCheckConfig, out: Path, end: float, console: Console) -> None:
    """Run a stage in a new process unless it is done, or too little time is left; end it and its children in time."""
    file = out / f"{name}.json"
    if read_state(file).get("state") == "done":
        return
    most, fewest = (DRY_RUN_SECONDS, 1) if config.dry_run else STAGES[name]
    names = list(STAGES)
    later = [other for other in config.only if names.index(other) > names.index(name)]
    pending = [other for other in later if read_state(out / f"{other}.json").get("state") != "done"]
    reserved = 0 if config.dry_run else sum(STAGES[other][1] for other in pending)
    seconds = min(most, max(fewest, end - time.time() - reserved))
    if seconds > end - time.time():
        console.print(f"{name}: {end - time.time():.0f} s are left, it needs {fewest}: call again")
        return
    start = time.time()
    command = [sys.executable, __file__, f"stage={name}", f"out={out}", f"carried={config.carried}"]
    command.append(f"dry_run={str(config.dry_run).lower()}")
    environment = os.environ | {"GPU_CHECK_DEADLINE": str(start + seconds)}
    with (out / f"{name}-stage.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            process.wait(seconds)
            cut_off = False
        except subprocess.TimeoutExpired:
            cut_off = True
        finally:
            with suppress(ProcessLookupError):  # its children too: they are in its group
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = read_state(file)
    state = "unfinished" if cut_off else found.get("state", "failed")
    if state == "running":  # it ended without a word
        state = "failed"
    more = {"error": found["error"]} if "error" in found and not cut_off else {}
    spent = round(found.get("seconds", 0) + time.time() - start, 1)
    write_state(file, state, found.get("results", {}), seconds=spent, **more)
    console.print(f"{name}: {state} after {time.time() - start:.0f} s {more.get('error', '')}")


def summary(out: Path) -> Table:
    """Return the results of all stages as a short table; the files have the rest."""
    table = Table(title="GPU check", title_justify="left")
    for column in ("stage", "state", "s", "results"):
        table.add_column(column, overflow="fold")
    for name in STAGES:
        found: dict[str, Any] = read_state(out / f"{name}.json")
        lines = short(found.get("results", {})) + ([found["error"]] if "error" in found else [])
        table.add_row(name, found.get("state", "not run"), str(found.get("seconds", "")), "\n".join(lines))
    return table


def short(results: dict[str, Any]) -> list[str]:
    """Return the results of a stage in lines: one for its plain numbers, and one for each of its parts."""
    plain = {key: value for key, value in results.items() if not isinstance(value, dict | list)}
    lines = [", ".join(f"{key} {value}" for key, value in plain.items())] if plain else []
    for key, value in results.items():
        if isinstance(value, dict) and key not in DETAILS:
            lines.append(f"{key}: " + ", ".join(f"{name} {inner}" for name, inner in value.items()))
        elif isinstance(value, list):
            lines += [str(item) for item in value]
    return lines


if __name__ == "__main__":
    _entry.run(main)
