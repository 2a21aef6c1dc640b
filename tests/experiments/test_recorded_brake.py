"""The recorded runs with a brake: the rule of today decides the same on their norms."""

import pytest
import torch

from experiments.run.archive import read_archive
from tests.helpers import CHECKOUT
from zclip.updates import UpdateBrake

RUNS = CHECKOUT / "experiments" / "results" / "runs"


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        "adam-lag/pico-none-brake-lr0.01-seed3-9f8ee8aa",
        "adam-lag/pico-none-brake-lr0.01-seed4-72c26e60",
        "adam-lag/pico-zclip-brake-lr0.01-seed4-104fbd01",  # 382 norms in a row are above its bound
        "adam-lag-wide/pico-wide-none-brake-lr0.01-seed1-091c5275",
    ],
)
def test_rule_decides_as_in_the_recorded_run(run):
    """Archives have five digits, or six."""
    metrics, rule = read_archive(RUNS / f"{run}.json.xz").metrics, UpdateBrake()
    norms = [torch.tensor(norm, dtype=torch.float64) for norm in metrics["update_norm"]]
    scales = [float(rule.observe(norm)) for norm in norms]
    assert len(scales) == 6000 and min(scales) < 0.6
    assert scales == pytest.approx(metrics["update_scale"], abs=5e-5)
