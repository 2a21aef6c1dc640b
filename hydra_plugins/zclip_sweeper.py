"""Hydra plugins of declared sets of runs: `python train.py -m experiment=table3 scale=micro seed=0,1,2`.

`experiments/suites.py` has the suites: the runs of each of the paper's tables and figures, and those of each lab. Hydra
sees one option of the group `experiment` for each, so that overrides, lists such as `experiment=[table2,figure4]`,
`--help`, shell completion and error messages treat them like files. Each option selects `SuiteSweeper`, whose jobs are
the runs of the suites times the sweep over all other overrides. A job itself has the file that its suite extends, such
as `experiment=paper`. Runs that begin after others of the suite come in a second batch, if those are finished then.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from common.errors import RunError, UserError
from experiments.suites import SUITES, Suite
from training.checkpoint.fork import fork_folder
from training.config.compose import fork_settings
from training.launch.sweep import Job, compose_job, config_search_overrides, print_plans
from training.run_dir import RunDir


class _SuiteConfigs(ConfigSource):
    """Config source with one option of the group `experiment` for each suite, made on demand."""

    @staticmethod
    def scheme() -> str:
        return "suites"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path.strip("/") in ("", "experiment")

    def is_config(self, config_path: str) -> bool:
        group, _, name = config_path.strip("/").removesuffix(".yaml").rpartition("/")
        return group == "experiment" and name in SUITES

    def load_config(self, config_path: str) -> ConfigResult:
        name = Path(config_path).stem
        defaults = [SUITES[name].base, {"override /hydra/sweeper": "suite"}]
        config = OmegaConf.create({"defaults": defaults, "paper": {"suite": name}})
        return ConfigResult(self.provider, f"{self.scheme()}://", config, {"package": "_global_"})

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path.strip("/") == "experiment":
            return [] if results_filter == ObjectType.GROUP else sorted(SUITES)
        return ["experiment"] if config_path.strip("/") == "" and results_filter != ObjectType.CONFIG else []


class _SuiteSearchPath(SearchPathPlugin):
    """Adds the suites to the search path of programs whose configurations have the file that they extend."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        folders = [Path(entry.path.removeprefix("file://")) for entry in search_path.get_path() if entry.path]
        if any((folder / "experiment" / "paper.yaml").is_file() for folder in folders):
            search_path.append("zclip", f"{_SuiteConfigs.scheme()}://")


class SuiteSweeper(BasicSweeper):
    """Sweeps over the runs of the suites that `experiment=` names; equal runs are run once."""

    @staticmethod
    def split_arguments(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """Return the overrides of each job that begins at its first step, in one batch."""
        suites, combinations = _suites_and_combinations(overrides)
        runs = dict.fromkeys(run for suite in suites for run in suite.runs)
        return [[_job(suites, run, more) for more in combinations for run in runs]]

    @staticmethod
    def compose_batches(loader: Any, config: Any, overrides: list[Override]) -> list[list[Job]]:
        """Return the jobs, without duplicates of the same run: first those from which the others begin.

        These get the name of the run from which they begin, and their length.
        """
        suites, combinations = _suites_and_combinations(overrides)
        runs = dict.fromkeys(run for suite in suites for run in suite.runs)
        forked = dict.fromkeys(run for suite in suites for run in suite.forked)
        first = {(run, tuple(more)): _job(suites, run, more) for more in combinations for run in runs}
        jobs = {key: compose_job(loader, config, job) for key, job in first.items()}
        others = []
        for more in combinations:
            for run, fork in forked:
                settings = fork_settings(jobs[fork.overrides, tuple(more)].config, fork.times)
                job = [*_job(suites, run, more), *(f"{key}={value}" for key, value in settings.items())]
                others.append(compose_job(loader, config, job))
        return [_without_duplicates(batch) for batch in ([*jobs.values()], others) if batch]

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Run the jobs, or with `plan=true` print what they need.

        Of the runs that begin after others, those run whose other run is finished, even if some of the others failed.

        Raises:
            RunError: runs have not finished, or were skipped because the run from which they begin is not finished.
            Exception: the first fault of the program in a job, when all other jobs have run.
        """
        assert self.config is not None and self.hydra_context is not None and self.launcher is not None
        loader = self.hydra_context.config_loader
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
        batches = self.compose_batches(loader, self.config, parsed)
        if self.config.plan:
            jobs, options = [job for batch in batches for job in batch], getattr(self.launcher, "options", ())
            print_plans(jobs, config_search_overrides(self.config.hydra), options)
            return []
        if self.config.print_run_dir:  # nothing is trained: there is nothing to wait for
            batches = [[job for batch in batches for job in batch]]
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        launched = 0
        returns: list[Sequence[JobReturn]] = []
        unfinished: list[str] = []
        faults: list[Exception] = []
        for number, batch in enumerate(batches):
            ready, skipped = _split_by_base(batch) if number else (batch, {})
            if ready:
                try:
                    returns.append(self.launcher.launch([job.overrides for job in ready], initial_job_idx=launched))
                except RunError as error:
                    unfinished.append(str(error))
                launched += len(ready)
            if skipped:
                unfinished.append(_skip_sentence(skipped, len(batch)))
        for done in (done for batch_returns in returns for done in batch_returns):
            try:
                done.return_value  # noqa: B018 - Hydra raises what the job has raised
            except Exception as error:
                faults.append(error)
        if faults:
            print("\n".join(unfinished), file=sys.stderr)
            raise faults[0]
        if unfinished:
            raise RunError("; ".join(unfinished))
        return returns


def _split_by_base(jobs: Sequence[Job]) -> tuple[list[Job], dict[str, list[Job]]]:
    """Return the jobs that can run, and by the name of the run from which they begin those that must wait for it.

    A job that is finished itself needs no other run: the launcher only shows it.
    """
    ready: list[Job] = []
    waiting: dict[str, list[Job]] = {}
    for job in jobs:
        base = fork_folder(job.config, job.run_dir)
        assert base is not None, "only the first batch has runs that begin at their first step"
        if job.run_dir.result_file.exists() or _is_finished(RunDir(base)):
            ready.append(job)
        else:
            waiting.setdefault(base.name, []).append(job)
    return ready, waiting


def _is_finished(run_dir: RunDir) -> bool:
    """Whether a run has a result that can be read."""
    with suppress(UserError):
        return run_dir.read_result() is not None
    return False


def _skip_sentence(skipped: Mapping[str, Sequence[Job]], most: int) -> str:
    """Return which of so many runs were skipped, by the names of the runs from which they begin."""
    groups = [f"{', '.join(job.title for job in jobs)} (after {base})" for base, jobs in skipped.items()]
    count, runs = sum(map(len, skipped.values())), ", ".join(groups)
    again = "run the same command again to run them"
    return f"{count} of {most} runs were skipped, as the runs after which they begin have not finished: {runs}; {again}"


def _suites_and_combinations(overrides: list[Override]) -> tuple[list[Suite], list[list[str]]]:
    """Return the suites that `experiment=` names, and the sweep over the other overrides.

    Raises:
        UserError: they do not go together, or need another setting.
    """
    by_key = {override.get_key_element(): override for override in overrides}
    if "experiment" not in by_key:
        raise UserError("hydra/sweeper=suite is not possible without experiment=, which sets it: it names suites")
    value = by_key["experiment"].get_value_element_as_str()
    names = value.strip("[]").split(",")
    if unknown := [name for name in names if name not in SUITES]:
        raise UserError(
            f"experiment={value} is not possible: {unknown[0]} is none of the suites {', '.join(sorted(SUITES))}"
        )
    suites = [SUITES[name] for name in names]
    bases = {suite.base for suite in suites}
    if len(bases) > 1:
        raise UserError(f"experiment={value} is not possible: {' and '.join(names)} do not share their settings")
    suite_keys = {key for name in SUITES if SUITES[name].base in bases for key in SUITES[name].keys}
    for key in (key.lstrip("+~") for key in by_key):
        if key in suite_keys or key == "lr":
            steps = "; give the steps as paper.corruption_steps" if key == "data.corruption.steps" else ""
            keys = ", ".join(sorted(suite_keys))
            raise UserError(f"{key} cannot be set with experiment={value}: the suites set {keys}{steps}")
    scale = by_key["scale"].get_value_element_as_str() if "scale" in by_key else None
    if suites[0].needs_scale and scale in (None, "main"):
        problem = "scale is not set" if scale is None else "scale=main is not possible"
        scales = "scale=micro, scale=proxy_short, scale=proxy or scale=paper"
        raise UserError(f"{problem}: experiment={value} is run at {scales}")
    others = [override for override in overrides if override.get_key_element() != "experiment"]
    (combinations,) = BasicSweeper.split_arguments(others, None)
    return suites, combinations


def _job(suites: Sequence[Suite], run: Sequence[str], more: Sequence[str]) -> list[str]:
    return [f"experiment={suites[0].base}", *run, *more]


def _without_duplicates(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs without those of the same run, of which the first place stays."""
    return list({job.run_dir.path: job for job in reversed(jobs)}.values())[::-1]
