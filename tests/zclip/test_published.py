"""Comparison with the published package: same arguments, norms, thresholds, statistics and gradients.

The test downloads the package with pip, and is skipped if that fails. `test_traces.py`, which compares with float64
transcriptions of the formulas, always runs.
"""

import importlib.util
import inspect
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import SLOW, Once
from tests.zclip.norm_traces import spiky_norms
from zclip import ZClip

VERSION = "1.0.0"


def download(folder: Path) -> None:
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1",
             "--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"zclip=={VERSION}"]  # fmt: skip
    done = subprocess.run(fetch, capture_output=True, text=True, timeout=120)
    if done.returncode:
        (folder / "error").write_text(str(done.stderr.strip().splitlines()[-1:]))
    else:
        (wheel,) = folder.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(folder)


@pytest.fixture(scope="session")
def published(once: Once):
    """The published class."""
    folder = once("published", download)
    if (folder / "error").exists():
        pytest.skip(f"zclip {VERSION} cannot be downloaded: {(folder / 'error').read_text()}")
    spec = importlib.util.spec_from_file_location("published_zclip", folder / "zclip" / "zclip.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ZClip


def test_arguments_match_except_for_the_default_of_max_grad_norm(published):
    published_args = inspect.signature(published.__init__).parameters
    our_args = inspect.signature(ZClip.__init__).parameters
    assert list(our_args)[: len(published_args)] == list(published_args), "positional calls mean the same"
    changed = {name for name in published_args if published_args[name].default != our_args[name].default}
    assert changed == {"max_grad_norm"}


SETTINGS = [
    {},
    {"clip_option": "mean"},
    {"mode": "percentile"},
    {"clip_factor": 0.6, "alpha": 0.9, "recovery_window": None},
    {"skip_update_on_spike": True},
    {"max_grad_norm": 1.2},
    {"max_grad_norm": 1.2, "mode": "percentile", "warmup_steps": 3, "z_thresh": 2.0},
]
STEPS = 300


@pytest.mark.parametrize(
    ("settings", "steps"),
    [(settings, STEPS) for settings in SETTINGS] + [SLOW(settings, 10_000) for settings in SETTINGS[:4]],
    ids=str,
)
def test_traces_match(published, settings, steps):
    """300 steps decide: they hold the warm-up, some six spikes, and nine time constants of the statistics."""
    arguments = {"max_grad_norm": None, **settings}
    ours = ZClip(**arguments)
    arguments.pop("recovery_window", None)
    reference = published(**arguments)
    torch.manual_seed(0)
    models = nn.Linear(5, 4), nn.Linear(5, 4)
    direction = [torch.randn_like(p) for p in models[0].parameters()]
    length = torch.cat([d.flatten() for d in direction]).norm()
    clipped = 0
    for x in spiky_norms(seed=1, steps=steps):  # a seed without lock-in of the published rule
        for model in models:
            for p, d in zip(model.parameters(), direction, strict=True):
                p.grad = d * (x / length)
        norm, expected = ours.step(models[0]), reference.step(models[1])
        assert float(norm) == pytest.approx(expected, rel=1e-6)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=0)
        if reference.initialized:
            assert float(ours.state["mean"]) == pytest.approx(reference.mean, rel=1e-5)
            assert float(ours.state["var"]) == pytest.approx(reference.var, rel=1e-5)
        clipped += bool(ours.telemetry["clipped"])
    assert clipped > steps / 200
