"""Against the published package itself: same arguments, norms, thresholds, statistics and gradients.

It is fetched with pip when the test runs; where that cannot be, the test is skipped and `test_traces.py`, which holds
float64 transcriptions of the formulas, stands alone.
"""

import importlib.util
import inspect
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

from tests.zclip.test_traces import norms
from zclip import ZClip

VERSION = "1.0.0"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1",
             "--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"zclip=={VERSION}"]  # fmt: skip
    done = subprocess.run(fetch, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"zclip {VERSION} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    spec = importlib.util.spec_from_file_location("published_zclip", folder / "zclip" / "zclip.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ZClip


def test_arguments(published):
    theirs = inspect.signature(published.__init__).parameters
    ours = inspect.signature(ZClip.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs), "positional calls mean the same"
    changed = {name for name in theirs if theirs[name].default != ours[name].default}
    assert changed == {"max_grad_norm"}


SETTINGS = [
    ({}, 10_000),
    ({"clip_option": "mean"}, 10_000),
    ({"mode": "percentile"}, 10_000),
    ({"clip_factor": 0.6, "alpha": 0.9, "recovery_window": None}, 10_000),
    ({"skip_update_on_spike": True}, 2_000),
    ({"max_grad_norm": 1.2}, 2_000),
    ({"max_grad_norm": 1.2, "mode": "percentile", "warmup_steps": 3, "z_thresh": 2.0}, 2_000),
]


@pytest.mark.parametrize(("settings", "steps"), SETTINGS, ids=[str(settings) for settings, _ in SETTINGS])
def test_trace(published, settings, steps):
    common = {"max_grad_norm": None, **settings}
    ours = ZClip(**common)
    common.pop("recovery_window", None)
    theirs = published(**common)
    torch.manual_seed(0)
    models = nn.Linear(5, 4), nn.Linear(5, 4)
    direction = [torch.randn_like(p) for p in models[0].parameters()]
    length = torch.cat([d.flatten() for d in direction]).norm()
    clipped = 0  # seed 1 has no lock-in; in seed 5 the published "mean" gets stuck
    for x in norms(seed=1, steps=steps):
        for model in models:
            for p, d in zip(model.parameters(), direction, strict=True):
                p.grad = d * (x / length)
        norm, wanted = ours.step(models[0]), theirs.step(models[1])
        assert float(norm) == pytest.approx(wanted, rel=1e-6)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=0)
        if theirs.initialized:
            assert float(ours.state["mean"]) == pytest.approx(theirs.mean, rel=1e-5)
            assert float(ours.state["var"]) == pytest.approx(theirs.var, rel=1e-5)
        clipped += bool(ours.telemetry["clipped"])
    assert clipped > steps / 200
