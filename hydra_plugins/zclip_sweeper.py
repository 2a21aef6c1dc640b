"""Hydra sweeper of the paper's experiments: `python train.py -m experiment=table3 scale=micro seed=0,1,2`.

Its jobs are those of a sweep over the overrides given, times the runs that the experiment, or a list of several, is
declared to be made of.
"""

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from experiments.paper.suites import sets


class SuiteSweeper(BasicSweeper):
    """Runs the sets that `experiment=` names; runs that are the same by their settings once."""

    @staticmethod
    def split_arguments(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """Return the overrides of each job, in one batch.

        Raises:
            UserError: an override is of what the experiment sets itself, or names no set of runs, or no scale.
        """
        given = {override.get_key_element(): override for override in overrides}
        if "experiment" not in given:
            _refuse("hydra/sweeper=suite is not possible without experiment=, which sets it: it names a set of runs")
        name = given["experiment"].get_value_element_as_str()
        known = sets()
        names = name.strip("[]").split(",")
        if strangers := [each for each in names if each not in known]:
            _refuse(f"experiment={name} is not possible: {strangers[0]} is none of the sets {', '.join(sorted(known))}")
        settings = list(dict.fromkeys(setting for each in names for setting in known[each]))
        own = {override.partition("=")[0] for setting in known["all"] for override in setting.overrides}
        for key in (given_key.lstrip("+~") for given_key in given):
            if key in own or (key == "lr" and "paper.lr" in own):
                steps = "; give the steps as paper.corruption_steps" if key == "data.corruption.steps" else ""
                _refuse(
                    f"{key} is not yours to set with experiment={name}: the sets set {', '.join(sorted(own))}{steps}"
                )
        scale = given["scale"].get_value_element_as_str() if "scale" in given else None
        if scale in (None, "main"):
            said = "scale is not set" if scale is None else "scale=main is not possible"
            _refuse(f"{said}: experiment={name} is run at scale=micro, scale=proxy or scale=paper")
        (combinations,) = BasicSweeper.split_arguments(
            [override for override in overrides if override.get_key_element() != "experiment"], None
        )
        return [
            [
                ["experiment=paper", *setting.overrides, *combination]
                for combination in combinations or [[]]
                for setting in settings
            ]
        ]

    def sweep(self, arguments: list[str]) -> Any:
        """Do the jobs, or with plan=true say what they would take."""
        assert self.config is not None and self.hydra_context is not None
        if not self.config.plan:
            return super().sweep(arguments)
        from rich.console import Console

        from training.config.checks import check
        from training.launch.plan import sweep_table
        from training.launch.sweep import compose_job

        loader = self.hydra_context.config_loader
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
        self.overrides = self.split_arguments(parsed, None)
        jobs = [compose_job(loader, self.config, overrides) for overrides in self.get_job_batch()]
        for job in jobs:
            check(job.config)
        table, lines = sweep_table(jobs)
        console = Console(soft_wrap=True, highlight=False, markup=False)
        console.print(table, soft_wrap=False)
        console.print("\n".join(lines))
        return None

    def get_job_batch(self) -> Sequence[Sequence[str]]:
        """Return the jobs, those that are the same run once."""
        from training.launch.sweep import compose_job

        assert self.hydra_context is not None and self.config is not None
        loader = self.hydra_context.config_loader
        jobs = [compose_job(loader, self.config, overrides) for overrides in super().get_job_batch()]
        return list({job.run_dir.path: job.overrides for job in reversed(jobs)}.values())[::-1]


def _refuse(said: str) -> None:
    from common.errors import UserError

    raise UserError(said)
