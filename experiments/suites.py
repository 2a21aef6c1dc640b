"""The sets of runs that `experiment=` names: those of the paper's tables and figures, and those of the labs.

`hydra_plugins/zclip_sweeper.py` trains a set. The scripts that read its runs find them by the same overrides.
"""

from collections.abc import Sequence
from typing import NamedTuple

from experiments.labs.declaration import LABS
from experiments.paper import tables_and_figures


class Suite(NamedTuple):
    """A set of runs.

    Attributes:
        base: file in configs/experiment/ with the settings that its runs share.
        runs: further overrides of each run.
        needs_scale: whether `scale=` says how large the runs are.
    """

    base: str
    runs: Sequence[tuple[str, ...]]
    needs_scale: bool = False

    @property
    def keys(self) -> set[str]:
        """The keys that the runs set."""
        return {override.partition("=")[0] for run in self.runs for override in run}


SUITES: dict[str, Suite] = {
    name: Suite("paper", [tuple(spec.overrides) for spec in specs], needs_scale=True)
    for name, specs in tables_and_figures.SUITES.items()
}
SUITES |= {f"{name}_lab": Suite(name, [arm.overrides for arm in lab.runs]) for name, lab in LABS.items()}
