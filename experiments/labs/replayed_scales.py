"""A control: the scales that a rule has chosen in one run, step by step, in another run."""

from pathlib import Path

import torch
from torch import Tensor

from common.errors import one_line
from experiments.run.archive import read_archive
from zclip.arguments import ArgumentError
from zclip.decision import State
from zclip.updates import UpdateDecision, UpdateRule


class ReplayedScales(UpdateRule):
    """Scale the rate as a recorded run did, whatever the norms of this run are.

    It tells whether a rule works because it acts when the norms rise, or only because it lowers the rate.

    Args:
        archive: file of `scripts/archive.py` with the recorded run, whose last scale holds after its end.

    Raises:
        ValueError: the file cannot be read, or has no scales of a rule.
    """

    nonnegative = ("count",)

    def __init__(self, archive: str) -> None:
        super().__init__()
        self.archive = archive
        try:
            scales = read_archive(Path(archive)).metrics.get("update_scale", [])
        except (OSError, ValueError) as error:
            raise ArgumentError("archive", archive, f"cannot be read ({one_line(error)})") from error
        if not scales or None in scales:
            raise ArgumentError("archive", archive, "has no scales of a rule over updates")
        self._scales = torch.tensor(scales)

    def initial_state(self, like: Tensor) -> State:
        """Return the number of steps taken."""
        return {"count": torch.zeros((), dtype=torch.int64, device=like.device)}

    def decide(self, norm: Tensor, state: State) -> UpdateDecision:
        """Return the scale of this step in the recorded run."""
        step = state["count"].clamp(max=len(self._scales) - 1)
        scale = self._scales.to(norm)[step]
        return UpdateDecision(scale, scale < 1, torch.full_like(norm, torch.inf), {"count": state["count"] + 1})
