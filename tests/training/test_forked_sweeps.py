"""Sweeps whose runs begin after others of the same sweep: which of them run, after failures and signals too."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

from common.errors import RunError
from experiments.labs.declaration import Fork
from experiments.suites import SUITES, Suite
from tests.helpers import CHECKOUT, RESULT, read_jsonl, start
from tests.process_pool import run
from training.launch.sweep import compose_job

#: A lab of two runs, one without clipping and one with ZClip, and of two runs that begin after each.
FORKED = Suite(
    "continued",
    [("clip=none",), ("clip=zclip",)],
    forked=[
        ((clip, *more), Fork((clip,)))
        for more in ((), ("optim.final_lr_fraction=0.1",))
        for clip in ("clip=none", "clip=zclip")
    ],
)


class RecordingLauncher(Launcher):
    """Records the batches that it gets, and writes results of all their runs but those of some strategies."""

    def __init__(self, loader: Any, config: Any, unfinished: tuple[str, ...], error: Exception | None = None) -> None:
        self.loader, self.config, self.unfinished, self.error = loader, config, unfinished, error
        self.batches: list[list[str]] = []

    def setup(self, **_: Any) -> None:
        """Nothing is needed."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert initial_job_idx == sum(map(len, self.batches))
        jobs = [compose_job(self.loader, self.config, overrides) for overrides in job_overrides]
        self.batches.append([job.title for job in jobs])
        failed = [job for job in jobs if job.config.clip.name in self.unfinished]
        for job in jobs:
            job.run_dir.path.mkdir(parents=True, exist_ok=True)
            if job not in failed:
                job.run_dir.result_file.write_text(json.dumps(RESULT))
        if failed and self.error is None:
            raise RunError(f"{len(failed)} of {len(jobs)} runs have not finished: {failed[0].title}")
        states = [JobStatus.FAILED if job in failed else JobStatus.COMPLETED for job in jobs]
        return [JobReturn(status=state, _return_value=self.error) for state in states]


@pytest.fixture
def forked_sweep(plugin, monkeypatch) -> Callable[..., Any]:
    """Return a function that sweeps over `FORKED`; it returns the launcher and, by strategy, the names of the runs."""
    monkeypatch.setitem(SUITES, "continued_lab", FORKED)
    settings = ["experiment=continued_lab", "trainer.max_steps=40"]

    def sweep(*launcher_arguments: Any) -> tuple[Any, RecordingLauncher, dict[str, list[list[str]]]]:
        sweeper = plugin("sweeper", *settings)
        loader = sweeper.hydra_context.config_loader
        sweeper.launcher = RecordingLauncher(loader, sweeper.config, *launcher_arguments)
        batches = sweeper.compose_batches(loader, sweeper.config, OverridesParser.create().parse_overrides(settings))
        names = {
            clip: [[job.title for job in batch if job.config.clip.name == clip] for batch in batches]
            for clip in ("none", "zclip")
        }
        return lambda: sweeper.sweep(settings), sweeper.launcher, names

    return sweep


def test_plan_counts_the_steps_that_are_trained_and_submits_runs_after_others(plugin, monkeypatch, capsys, tmp_path):
    """Two runs of 40 steps, and four of 80 that begin after them, train 240 steps; SLURM starts these when it can."""
    monkeypatch.setitem(SUITES, "continued_lab", FORKED)
    settings = ["experiment=continued_lab", "trainer.max_steps=40", "plan=true", "hydra/launcher=slurm"]
    sweeper = plugin("sweeper", *settings, "hydra.launcher.partition=gpu")
    sweeper.setup(hydra_context=sweeper.hydra_context, task_function=lambda _: None, config=sweeper.config)
    bases, forks = sweeper.compose_batches(
        sweeper.hydra_context.config_loader, sweeper.config, OverridesParser.create().parse_overrides(settings)
    )
    planned, lines = plan_of(sweeper, settings, capsys)
    per_step = bases[0].config.trainer.global_batch_size * bases[0].config.data.sequence_length
    (total,) = re.findall(r"│ all +│ +│ +(\S+)B", planned)
    assert float(total) == pytest.approx(240 * per_step / 1e9, rel=1e-3)
    assert [int(steps) for steps in re.findall(r"│ +(\d+) │ +\S+B │", planned)] == [40] * 6
    assert "steps before a fork, and steps that are trained already, are not counted" in planned
    submitted = submitted_by(lines, tmp_path)
    titles = [job.title for job in bases]
    for number, job in enumerate(forks, 3):
        after = titles.index(job.config.fork_from.partition("@")[0]) + 1
        assert f"--dependency=afterok:{after} --kill-on-invalid-dep=yes" in submitted[number - 1]
    assert all("--dependency" not in call and "--parsable" in call for call in submitted[:2])
    assert all("--partition=gpu" in call for call in submitted) and len(submitted) == 6

    result = bases[0].run_dir.result_file
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps(RESULT))
    planned, lines = plan_of(sweeper, settings, capsys)
    assert sorted(int(steps) for steps in re.findall(r"│ +(\d+) │ +\S+B │", planned)) == [0, *[40] * 5]
    assert len(lines) == 5 and sum("--dependency" in line for line in lines) == 2, "the first is finished"


def plan_of(sweeper: Any, settings: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    """Return what the plan of a sweep prints, and of it the lines that submit runs."""
    assert sweeper.sweep(settings) == []
    planned = capsys.readouterr().out
    return planned, [line for line in planned.splitlines() if "sbatch " in line]


def submitted_by(lines: list[str], folder: Path) -> list[str]:
    """Return the arguments that sbatch gets if the lines are pasted into a shell."""
    sbatch = folder / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\necho "$*" >> calls\necho "$(($(wc -l < calls)));cluster"\n')
    sbatch.chmod(0o755)
    env = {**os.environ, "PATH": f"{sbatch.parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-eu"], input="\n".join(lines), text=True, check=True, env=env, cwd=folder)
    return (folder / "calls").read_text().splitlines()


def test_only_runs_that_begin_after_a_failed_run_are_skipped(forked_sweep):
    sweep, launcher, names = forked_sweep(("none",))
    (base,), forks = names["none"]
    with pytest.raises(RunError) as error:
        sweep()
    assert launcher.batches[1:] == [names["zclip"][1]], "the forks of the other run"
    assert str(error.value) == (
        f"1 of 2 runs have not finished: {base}; 2 of 4 runs were skipped, as the runs after which they begin have not "
        f"finished: {', '.join(forks)} (after {base}); run the same command again to run them"
    )
    sweep, launcher, _ = forked_sweep(())
    sweep()
    assert {*forks} < {*launcher.batches[1]}, "the same command runs them when it is finished"


def test_runs_that_begin_after_a_run_whose_result_is_damaged_are_skipped(forked_sweep):
    sweep, launcher, names = forked_sweep(("none", "zclip"), ValueError("broken"))
    for clip in names:
        result = Path("runs", "continued", names[clip][0][0], "result.json")
        result.parent.mkdir(parents=True)
        result.write_text("{}" if clip == "none" else json.dumps(RESULT))
    with pytest.raises(ValueError, match=r"^broken$"):
        sweep()
    assert launcher.batches[1:] == [names["zclip"][1]]


def test_fault_in_a_run_is_raised_after_the_others_have_run(forked_sweep, capsys):
    sweep, launcher, names = forked_sweep(("zclip",), ZeroDivisionError("a fault"))
    with pytest.raises(ZeroDivisionError, match=r"^a fault$"):
        sweep()
    assert launcher.batches[1:] == [names["none"][1]]
    assert f"{', '.join(names['zclip'][1])} (after {names['zclip'][0][0]}); run the same" in capsys.readouterr().err


def test_finished_run_is_shown_even_if_the_run_before_it_is_gone(forked_sweep):
    sweep, launcher, names = forked_sweep(("zclip",))
    kept, skipped = names["zclip"][1]
    folder = Path("runs", "continued", kept)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(RESULT))
    with pytest.raises(RunError, match=rf"1 of 4 runs were skipped, .* finished: {skipped} \(after"):
        sweep()
    assert kept in launcher.batches[1]


#: train.py, with a small lab in place of the large one: a run and two that begin after it, without clipping and with
#: another strategy.
PROGRAM = """
import sys
sys.path[0] = CHECKOUT
from experiments.labs.declaration import Fork
from experiments.suites import SUITES, Suite

bases = [("clip=none",), OTHER]
ways = [(), ("optim.final_lr_fraction=0.1",)]
forked = [((*base, *way), Fork(base)) for way in ways for base in bases]
SUITES["continued_lab"] = Suite("continued", bases, forked=forked)
file = CHECKOUT + "/train.py"
exec(compile(open(file).read(), file, "exec"))
"""


@pytest.fixture
def small_lab(cache: Path, tmp_path: Path) -> Callable[..., tuple[str, tuple[str, ...]]]:
    """Return a function that writes the program, with overrides of the other strategy; it returns both."""

    def write(*other: str) -> tuple[str, tuple[str, ...]]:
        program = tmp_path / "train.py"
        program.write_text(f"CHECKOUT, OTHER = {str(CHECKOUT)!r}, {other!r}\n{PROGRAM}")
        settings = ("-m", "experiment=continued_lab", "trainer.max_steps=20", "trainer.log_every=1")
        return str(program), (*settings, f"paths.cache={cache}")

    return write


def lines_of(run_folder: Path) -> int:
    """Return the number of lines of metrics.jsonl; 0 if there is none."""
    file = run_folder / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("steps", [20, 40])
def test_what_a_signal_left_runs_at_the_next_call(steps, small_lab, tmp_path):
    """The signal comes in a run from which others begin, and in one of these."""
    program, settings = small_lab("clip=zclip")
    job = start(*settings, cwd=tmp_path, program=program)
    while not any(steps - 10 <= lines_of(folder) < steps for folder in tmp_path.glob("runs/continued/pico-zclip-*")):
        assert job.poll() is None, job.communicate()
        time.sleep(0.002)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=300)
    assert job.returncode == 128 + signal.SIGTERM, out + err
    assert err.startswith("interrupted after step ") and err.endswith("; run the same command to resume\n"), err
    finished = len([*tmp_path.glob("runs/continued/*/result.json")])
    assert finished == (1 if steps == 20 else 3)
    done = run(program, *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("continuing runs/") == 1 and done.stdout.count("finished already") == finished
    rows = [read_jsonl(file) for file in tmp_path.glob("runs/continued/*/metrics.jsonl")]
    assert sorted(map(len, rows)) == [20, 20, 40, 40, 40, 40]
    assert all([row["step"] for row in each] == [*range(1, len(each) + 1)] for each in rows), "each once"


#: A clipper that fails.
FAILING = """
from zclip import ZClip


class Failing(ZClip):
    def step(self, *args, **kwargs):
        raise RuntimeError("step failed")
"""


@pytest.mark.slow
def test_runs_that_begin_after_others_run_although_one_of_these_fails(small_lab, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    program, settings = small_lab("clip=zclip", "clip._target_=failing.Failing")
    done = run(program, *settings, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "RuntimeError: step failed" in done.stderr, done.stderr
    assert "2 of 4 runs were skipped, as the runs after which they begin have not finished: pico-zclip-" in done.stderr
    assert len([*tmp_path.glob("runs/continued/pico-none-*/result.json")]) == 3
    assert len([*tmp_path.glob("runs/continued/pico-zclip-*")]) == 1
