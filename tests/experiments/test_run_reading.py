"""Reading a run: loss spikes worked out by hand, the summary, the tables and the plot."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from experiments.run.definitions import Spike, loss_spikes
from experiments.run.plot import draw_run, plot_run
from experiments.run.read import read_run
from experiments.run.summary import STEP_PHASES, comparison, summarise, table

# Alternating 1.0 and 1.2: median 1.1, median absolute deviation 0.1, so 5 sigma is 1.1 + 0.7413.
STEADY = [1.0, 1.2] * 25


@pytest.mark.parametrize(
    ("loss", "spikes"),
    [
        (STEADY * 3, []),
        ([*STEADY, 1.84, *STEADY], []),
        ([*STEADY, 1.85, *STEADY], [Spike(50, 1)]),
        ([*STEADY, 3.0, 3.0, 2.0, *STEADY, 2.0], [Spike(50, 3), Spike(103, 1)]),
        ([*STEADY, 9.0, 1.0, 9.0], [Spike(50, 1), Spike(52, 1)]),
        ([*STEADY, *[5.0] * 200], [Spike(50, 200)]),
        ([*STEADY, float("nan"), float("inf"), 1.0], [Spike(50, 2)]),
        ([1.0, float("nan"), 1.0], [Spike(1, 1)]),
        ([9.0, *STEADY], []),
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
        "clipped": clipped, "z": z, "tokens_per_second": 100.0,
    }  # fmt: skip


def test_summary(tmp_path):
    run = write_run(tmp_path / "run", [row(i + 1, float(i), None, float(i % 4 == 0)) for i in range(100)])
    summary = summarise(run)
    assert summary["steps"] == 100 and summary["tokens"] == 1000
    assert summary["train_loss"] == pytest.approx(np.mean(range(90, 100)))
    assert summary["clipped_share"] == 0.25
    run.config["data"] = {"corruption": {"steps": [91, 100], "kind": "repeat"}}
    assert summarise(run)["train_loss"] == pytest.approx(np.mean([88, 89, *range(91, 99)]))
    assert summary["tokens_per_second"] == 100
    assert summary["clipped_by_z"] is None and summary["mfu"] is None and summary["peak_memory_gib"] is None
    timed = write_run(tmp_path / "timed", [row(1, 1.0, 0.0) | {"mfu": 0.4, "data_seconds": 0.5, "peak_memory_gib": 2}])
    assert summarise(timed)["mfu"] == 0.4 and summarise(timed)["step_seconds"]["data"] == 0.5
    steps = [row(i + 1, 1.0, 0.0) | {f"{part}_seconds": 0.25 for part in STEP_PHASES} | {"mfu": 0.1} for i in range(9)]
    compiled = write_run(tmp_path / "compiled", [s | {"tokens_per_second": 1.0, "mfu": 0.01} for s in steps])
    assert summarise(compiled)["tokens_per_second"] == 10 and summarise(compiled)["mfu"] == pytest.approx(0.1)
    spiky = write_run(tmp_path / "spiky", [row(i + 1, 1.0, 0.0) | {"spike": float(i < 7)} for i in range(100)])
    assert summarise(spiky)["clipped_by_z"] == 7


def test_tables_show_the_numbers():
    result = {
        "test_loss": 5.2756, "train_loss": 5.5, "unigram_entropy": 6.5232, "test_tokens": 128000, "spikes": 3,
        "steps": 300, "spike_definition": "a definition", "clipped_share": 0.04, "clipped_by_z": 2,
        "tokens_per_second": 7272.0, "parameters": 3_344_064,
    }  # fmt: skip
    for shown in (
        table(result, "t"),
        comparison(
            [({"clip": "one", "x": "same"}, result), ({"clip": "two", "x": "same"}, result | {"test_loss": None})]
        ),
    ):
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(shown)
        text = console.export_text()
        for number in ("5.276", "3", "4.0%"):
            assert number in text
    assert "two" in text and "not finite" in text and "same" not in text
    console = Console(width=200, record=True, file=io.StringIO())
    spent = {"data": 0.1, "forward_backward": 1.5, "clip": 0.1, "optimizer": 0.3}
    console.print(table(result | {"mfu": 0.415, "step_seconds": spent, "peak_memory_gib": 3.21}, "t"))
    text = console.export_text()
    for shown in ("41.5% MFU", "2.000 s", "data 5.0%, forward and backward 75.0%, clipping 5.0%", "3.2 GiB"):
        assert shown in text


def test_many_varied_settings_fit_a_narrow_terminal():
    result = {"test_loss": 4.5, "train_loss": 4.6, "spikes": 0, "clipped_share": 0.1}
    jobs = [({"clip": "zclip", "a": "1", "same": "0"}, result), ({"b": "2", "c": "3", "same": "0"}, result)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison(jobs))
    text = console.export_text()
    assert "clip=zclip a=1 " in text and "b=2 c=3 " in text and "same" not in text and "test loss" in text
    console.print(comparison([job for job in jobs if "clip" in job[0]] + [({"clip": "fixed"}, result)]))
    assert "=" not in console.export_text()


def test_plot_shows_the_columns(tmp_path):
    rows = [row(i + 1, 5.0 - 0.01 * i, None if i < 20 else 4.0 * (i == 50), float(i == 50)) for i in range(80)]
    rows = [r | {"grad_norm": 2.0 + i, "clipped_norm": 1.0 + i} for i, r in enumerate(rows)]
    loss, norm, z = draw_run(write_run(tmp_path / "run", rows, {"test_loss": 4.2, "unigram_entropy": 6.0})).axes
    assert norm.get_yscale() == "log"
    assert all(ax.xaxis.get_gridlines()[0].get_visible() for ax in (loss, norm, z)), "there is a grid"
    assert loss.lines[0].get_ydata().tolist() == [r["loss"] for r in rows]
    assert [line.get_ydata().tolist() for line in norm.lines[:2]] == [
        [r["grad_norm"] for r in rows], [r["clipped_norm"] for r in rows]
    ]  # fmt: skip
    labels = [text.get_text() for ax in (loss, norm, z) for text in ax.get_legend().get_texts()]
    for label in (
        "test loss 4.20",
        "before clipping",
        "after clipping",
        "threshold 2.5",
        "clipped by z-score: 1 step",
    ):
        assert label in labels
    assert any(set(line.get_ydata()) == {2.5} for line in z.lines)


@pytest.mark.parametrize("kind", ["plain", "diverged", "without z", "one step", "zero norms"])
def test_every_kind_of_run_can_be_plotted(tmp_path, kind):
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
    plot = plot_run(run)
    assert plot == tmp_path / "run" / "plots" / "run.png"
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    if kind == "diverged":
        assert summarise(run)["train_loss"] is None
        assert summarise(run)["spikes"] == 1
        assert summarise(run)["skipped"] == 40
        assert summarise(run)["clipped_share"] == 0


def test_best_run_of_a_sweep_is_bold():
    result = {"train_loss": 4.6, "spikes": 0, "clipped_share": 0.1}
    shown = comparison([({"clip": name}, result | {"test_loss": loss}) for name, loss in (("a", 4.5), ("b", 4.4))])
    assert [row.style for row in shown.rows] == [None, "bold"]
