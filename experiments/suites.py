"""The sets of runs that `experiment=` names: those of the paper's tables and figures, and those of the labs.

`hydra_plugins/zclip_sweeper.py` trains a set. The scripts that read its runs find them by the same overrides.
"""

from collections.abc import Sequence
from typing import NamedTuple

from experiments.labs.declaration import LABS, Fork, Lab
from experiments.paper import tables_and_figures


class Suite(NamedTuple):
    """A set of runs.

    Attributes:
        base: file in configs/experiment/ with the settings that its runs share.
        runs: further overrides of each run.
        needs_scale: whether `scale=` says how large the runs are.
        forked: further overrides of each run that begins after another one, and where it does.
    """

    base: str
    runs: Sequence[tuple[str, ...]]
    needs_scale: bool = False
    forked: Sequence[tuple[tuple[str, ...], Fork]] = ()

    @property
    def keys(self) -> set[str]:
        """The keys that the runs set."""
        keys = {
            override.partition("=")[0] for run in (*self.runs, *(run for run, _ in self.forked)) for override in run
        }
        return keys | ({"fork_from"} if self.forked else set())


def _suite_of(lab: Lab) -> Suite:
    forked = [(arm.overrides, arm.fork) for arm in lab.runs if arm.fork is not None]
    return Suite(lab.name, [arm.overrides for arm in lab.runs if arm.fork is None], forked=forked)


SUITES: dict[str, Suite] = {
    name: Suite("paper", [tuple(spec.overrides) for spec in specs], needs_scale=True)
    for name, specs in tables_and_figures.SUITES.items()
}
SUITES |= {f"{name}_lab": _suite_of(lab) for name, lab in LABS.items()}
