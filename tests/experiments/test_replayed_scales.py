"""The control that replays the scales of a recorded run."""

import json
import lzma

import pytest
import torch

from experiments.labs.replayed_scales import ReplayedScales
from tests.helpers import compose_config
from training.config.strategy import update_rule


def write(path, metrics):
    path.write_bytes(lzma.compress(json.dumps({"files": {}, "metrics": metrics}).encode()))
    return str(path)


def test_scales_are_those_of_the_recorded_run_and_the_last_one_holds(tmp_path):
    archive = write(tmp_path / "run.json.xz", {"update_scale": [1.0, 0.5, 0.25]})
    rule = ReplayedScales(archive)
    assert [float(rule.observe(torch.tensor(norm))) for norm in (3.0, 1.0, 9.0, 2.0)] == [1.0, 0.5, 0.25, 0.25]
    again = ReplayedScales(archive)
    again.load_state_dict(rule.state_dict())
    assert float(again.observe(torch.tensor(1.0))) == 0.25


def test_archive_without_scales_is_refused_by_its_key(tmp_path):
    archive = write(tmp_path / "run.json.xz", {"loss": [1.0]})
    target = "update._target_=experiments.labs.replayed_scales.ReplayedScales"
    for path, problem in ((archive, "has no scales of a rule over updates"), ("none.json.xz", "cannot be read")):
        config = compose_config("update=monitor", target, f"+update.archive={path}")
        with pytest.raises(Exception, match=rf"^update.archive=\S+ {problem}"):
            update_rule(config.update)
