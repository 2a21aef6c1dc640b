"""Sweeps whose runs begin after others of the same sweep: which of them run, and what is said of those that do not."""

import json
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
from tests.helpers import RESULT
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
