"""Hydra plugins of declared sets of runs: `python train.py -m experiment=table3 scale=micro seed=0,1,2`.

`experiments/suites.py` has the suites: the runs of each of the paper's tables and figures, and those of each lab. Hydra
sees one option of the group `experiment` for each, so that overrides, lists such as `experiment=[table2,figure4]`,
`--help`, shell completion and error messages treat them like files. Each option selects `SuiteSweeper`, whose jobs are
the runs of the suites times the sweep over all other overrides. A job itself has the file that its suite extends, such
as `experiment=paper`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from common.errors import UserError
from experiments.suites import SUITES
from training.launch.sweep import Job, compose_job, config_search_overrides, print_plans


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
        """Return the overrides of each job, in one batch."""
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
        runs = dict.fromkeys(run for suite in suites for run in suite.runs)
        others = [override for override in overrides if override.get_key_element() != "experiment"]
        (combinations,) = BasicSweeper.split_arguments(others, None)
        return [[[f"experiment={suites[0].base}", *run, *more] for more in combinations for run in runs]]

    def sweep(self, arguments: list[str]) -> Any:
        """Run the jobs, or with `plan=true` print what they need."""
        assert self.config is not None and self.hydra_context is not None
        if not self.config.plan:
            return super().sweep(arguments)
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        self.overrides = self.split_arguments(parser.parse_overrides(arguments), None)
        return print_plans(self._jobs(), config_search_overrides(self.config.hydra))

    def get_job_batch(self) -> Sequence[Sequence[str]]:
        """Return the overrides of the jobs."""
        return [job.overrides for job in self._jobs()]

    def _jobs(self) -> list[Job]:
        """Return the jobs of the next batch, without duplicates of the same run."""
        assert self.hydra_context is not None and self.config is not None
        loader = self.hydra_context.config_loader
        jobs = [compose_job(loader, self.config, overrides) for overrides in super().get_job_batch()]
        return list({job.run_dir.path: job for job in reversed(jobs)}.values())[::-1]
