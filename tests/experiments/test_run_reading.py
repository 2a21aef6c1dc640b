"""Definitions on series worked out by hand, and the picture of a run."""

import json

import numpy as np
import pytest

from experiments.definitions import Spike, loss_spikes
from experiments.plots import plot_run
from experiments.runs import read_run
from experiments.summary import summarise

# Alternating 1.0 and 1.2: median 1.1, median absolute deviation 0.1, so 5 sigma is 1.1 + 0.7413.
CALM = [1.0, 1.2] * 25


@pytest.mark.parametrize(
    ("loss", "spikes"),
    [
        (CALM * 3, []),
        ([*CALM, 1.84, *CALM], []),
        ([*CALM, 1.85, *CALM], [Spike(50, 1)]),
        ([*CALM, 3.0, 3.0, 2.0, *CALM, 2.0], [Spike(50, 3), Spike(103, 1)]),
        ([*CALM, 9.0, 1.0, 9.0], [Spike(50, 1), Spike(52, 1)]),
        ([*CALM, *[5.0] * 200], [Spike(50, 200)]),
        ([*CALM, float("nan"), float("inf"), 1.0], [Spike(50, 2)]),
        ([1.0, float("nan"), 1.0], [Spike(1, 1)]),
        ([9.0, *CALM], []),
        (list(np.linspace(9, 2, 300)), []),
        ([], []),
    ],
)
def test_loss_spikes(loss, spikes):
    assert loss_spikes(np.array(loss)) == spikes


def write_run(folder, rows, result=None):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("clip: {name: zclip, z_thresh: 2.5}\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    return read_run(folder)


def row(step, loss, z, clipped=0.0):
    return {
        "step": step, "tokens": 10 * step, "loss": loss, "grad_norm": 2.0, "clipped_norm": 1.0,
        "coefficient": 0.5, "clipped": clipped, "z": z, "tokens_per_second": 100.0,
    }  # fmt: skip


def test_summary(tmp_path):
    run = write_run(tmp_path / "run", [row(i + 1, float(i), None, float(i % 4 == 0)) for i in range(100)])
    summary = summarise(run)
    assert summary["steps"] == 100 and summary["tokens"] == 1000
    assert summary["train_loss"] == pytest.approx(np.mean(range(90, 100)))
    assert summary["clipped_share"] == 0.25
    assert summary["tokens_per_second"] == 100


@pytest.mark.parametrize("kind", ["plain", "diverged", "without z", "one step", "zero norms"])
def test_every_run_has_a_picture(tmp_path, kind):
    rows = [row(i + 1, 5.0 - 0.01 * i, None if i < 20 else 20.0 * (i == 50), float(i == 50)) for i in range(80)]
    if kind == "diverged":
        for r in rows[40:]:
            r.update(loss=None, grad_norm=None, clipped_norm=0.0, z=None)
    elif kind == "without z":
        rows = [{key: value for key, value in r.items() if key != "z"} for r in rows]
    elif kind == "one step":
        rows = rows[:1]
    elif kind == "zero norms":
        rows = [r | {"grad_norm": 0.0, "clipped_norm": 0.0} for r in rows]
    run = write_run(tmp_path / "run", rows, {"test_loss": None if kind == "diverged" else 4.0, "unigram_entropy": 6.0})
    picture = plot_run(run)
    assert picture == tmp_path / "run" / "plots" / "run.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    if kind == "diverged":
        assert summarise(run)["train_loss"] is None
        assert summarise(run)["spikes"] == 1
