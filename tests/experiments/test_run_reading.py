"""Reading a run: loss spikes worked out by hand, the summary, the tables and the plot."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from experiments.run.definitions import Spike, loss_spikes
from experiments.run.plot import draw_run, plot_run
from experiments.run.read import read_run
from experiments.run.summary import STEP_PHASES, _update_rows, comparison, summarise, table

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


RESULT = {
    "steps": 80, "tokens": 800, "train_loss": 4.0, "test_loss": 4.0, "unigram_entropy": 6.0, "test_tokens": 100,
    "parameters": 1000, "data_fingerprint": "abcd", "spikes": 0, "spike_definition": "ours", "clipped_share": 0.1,
    "tokens_per_second": 100.0,
}  # fmt: skip


def write_run(folder, rows, result=None):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("clip: {name: zclip, z_thresh: 2.5}\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if result:
        (folder / "result.json").write_text(json.dumps(RESULT | result))
    return read_run(folder)


@pytest.mark.parametrize(
    "data",
    [
        "5", "null", "{corruption: x}", "{corruption: {steps: 3}}", "{corruption: {steps: [a]}}",
        "{corruption: {random_steps: 1000000}}", "{corruption: {random_steps: 3, burst_length: 0}}",
    ],
)  # fmt: skip
def test_corrupted_steps_that_are_none_are_an_error(data, tmp_path):
    write_run(tmp_path / "run", [row(1, 1.0, None)])
    (tmp_path / "run" / "config.yaml").write_text(f"data: {data}\n")
    with pytest.raises(ValueError, match=r"^config\.yaml: data"):
        read_run(tmp_path / "run")


def test_steps_that_cannot_be_drawn_are_an_error(tmp_path):
    write_run(tmp_path / "run", [row(1, 1.0, None)])
    (tmp_path / "run" / "config.yaml").write_text("trainer: {max_steps: 4}\ndata: {corruption: {random_steps: 3}}\n")
    with pytest.raises(ValueError, match=r"^config\.yaml: 3 steps in bursts of 1 cannot be drawn from 1 to 4"):
        read_run(tmp_path / "run")


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
    assert summary["saving_seconds"] is None and summary["corrupted_batches"] == 0
    timed = write_run(tmp_path / "timed", [row(1, 1.0, 0.0) | {"mfu": 0.4, "data_seconds": 0.5, "peak_memory_gib": 2}])
    assert summarise(timed)["mfu"] == 0.4 and summarise(timed)["step_seconds"]["data"] == 0.5
    steps = [row(i + 1, 1.0, 0.0) | {f"{part}_seconds": 0.25 for part in STEP_PHASES} | {"mfu": 0.1} for i in range(9)]
    compiled = write_run(tmp_path / "compiled", [s | {"tokens_per_second": 1.0, "mfu": 0.01} for s in steps])
    assert summarise(compiled)["tokens_per_second"] == 10 and summarise(compiled)["mfu"] == pytest.approx(0.1)
    untimed = write_run(tmp_path / "untimed", [*steps, row(10, 1.0, 0.0)])
    assert summarise(untimed)["tokens_per_second"] == 10, "that of the steps whose times are known"
    bounded = write_run(
        tmp_path / "bound", [row(i + 1, 1.0, 0.0) | {"clipped_by_max": float(i < 7)} for i in range(10)]
    )
    for bound, share in ((1.0, 0.7), (None, None)):
        bounded.config["clip"] = {"name": "zclip", "max_grad_norm": bound}
        assert summarise(bounded)["clipped_by_max_share"] == share
    spiky = write_run(tmp_path / "spiky", [row(i + 1, 1.0, 0.0) | {"spike": float(i < 7)} for i in range(100)])
    assert summarise(spiky)["clipped_by_z"] == 7


@pytest.mark.parametrize(
    ("fork_from", "step"),
    [("runs/main/a@20", 20), ("b@c@1200", 1200), (None, None), ("a@b", None), (f"a@{'1' * 5000}", None)],
)
def test_summary_of_a_fork_says_which_steps_are_those_of_another_run(fork_from, step, tmp_path):
    """The numbers are over all steps: those of the other run are in the metrics."""
    run = write_run(tmp_path / "run", [row(i + 1, 1.0, None, float(i < 20)) for i in range(40)])
    run.config["fork_from"] = fork_from
    summary = summarise(run)
    assert summary["fork_step"] == step and summary["clipped_share"] == 0.5
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(RESULT | summary, "t"))
    said = re.findall(r"fork +│ after step (\S+) +│ the steps up to there are another run's", console.export_text())
    assert said == ([] if step is None else [f"{step:,}"])


def test_summary_says_what_a_rule_over_updates_did(tmp_path):
    scales = [None, 1.0, 0.4, 0.3, 0.6, 0.45]
    rows = [row(i + 1, 1.0, 0.0) | {"update_scale": s, "update_clipped": float(s == 0.4)} for i, s in enumerate(scales)]
    summary = summarise(write_run(tmp_path / "run", rows))
    keys = ("update_clipped_share", "lowest_update_scale", "low_rate_steps", "low_rate_longest", "low_rate_from")
    assert [summary[key] for key in keys] == [pytest.approx(1 / 6), 0.3, 3, 2, 3]
    high = summarise(write_run(tmp_path / "high", rows[:2]))
    assert [high[key] for key in keys] == [0.0, 1.0, 0, None, None]
    without = summarise(write_run(tmp_path / "without", [row(1, 1.0, 0.0)]))
    assert [without[key] for key in keys] == [None] * 5
    for shown, words in (
        (
            summary,
            "16.7% of steps; the rate was below 0.5 of the schedule for 3 steps, the longest time from step 3 for 2, "
            "at the lowest 0.30",
        ),
        (high, "0.0% of steps; the rate was never below 0.5 of the schedule, at the lowest 1.00"),
        (without, ""),
    ):
        (text,) = [text for _, *text in _update_rows(shown)] or [[]]
        assert " ".join(text) == words


def test_summary_says_what_a_rule_over_tensors_or_elements_did(tmp_path):
    scales, shares = [None, 1.0, 0.4, 0.3, 1.0], [None, 0.0, 0.02, 0.001, 0.0]
    tensors = [{"update_rms": s and 1 / s, "lowest_update_scale": s, "update_clipped_tensors": 2.0} for s in scales]
    elements = [{"clipped_element_share": share} for share in shares]
    keys = ("update_clipped_share", "lowest_update_scale", "highest_clipped_element_share", "low_rate_steps")
    for name, columns, expected, words in (
        (
            "tensors",
            tensors,
            [0.4, 0.3, None, None],
            "40.0% of steps; the lowest factor on the rate of a tensor was 0.30",
        ),
        ("elements", elements, [0.4, None, 0.02, None], "40.0% of steps; at most 2.00% of the elements in one"),
    ):
        rows = [row(i + 1, 1.0, 0.0) | c | {"update_clipped": float(i in (2, 3))} for i, c in enumerate(columns)]
        run = write_run(tmp_path / name, rows)
        summary = summarise(run)
        assert [summary[key] for key in keys] == expected
        ((_, *text),) = _update_rows(summary)
        assert " ".join(text) == words
        labels = [ax.get_ylabel() for ax in draw_run(run).axes]
        assert (labels[3:] == ["RMS", "tensors"]) if name == "tensors" else (labels[3:] == ["clipped elements (%)"])


def test_summary_counts_corrupted_batches_and_no_spikes_of_them(tmp_path):
    rows = [row(step, 9.0 if step in (60, 70) else 1.0 + step % 2 / 10, None) for step in range(1, 81)]
    rows[3] |= {"saving_seconds": 2.0, "peak_memory_gib": 3.0}
    rows[9] |= {"saving_seconds": 1.5, "peak_memory_gib": 2.5}
    run = write_run(tmp_path / "run", rows)
    run.config["data"] = {"corruption": {"steps": [60], "kind": "repeat"}}
    summary = summarise(run)
    assert (summary["corrupted_batches"], summary["corruption_kind"], summary["spikes"]) == (1, "repeat", 1)
    assert (summary["saving_seconds"], summary["peak_memory_gib"]) == (3.5, 3.0)


def test_score_is_that_of_the_finished_run_without_examples(tmp_path):
    """The environment is that of the last start."""
    run = write_run(tmp_path / "run", [row(1, 1.0, 0.0)], {"steps": 40})
    key = {"task": "hellaswag", "num_fewshot": 0, "step": 40, "items": 100}
    others = [{**key, **other, "items": 900} for other in ({"step": 20}, {"num_fewshot": 5}, {"task": "x"})]
    run = run._replace(scores=[*others, key, {**key, "items": 50}], starts=[{"device": "one"}, {"device": "two"}])
    assert run.score("hellaswag") == key and run.score("winogrande") is None
    assert run.environment == {"device": "two"} and run._replace(starts=[]).environment == {}


def test_damaged_validation_lines_do_not_count(tmp_path):
    write_run(tmp_path / "run", [row(1, 1.0, 0.0)])
    lines = [
        '{"step": 8, "val_tokens": 10, "val_loss": 2.5}',
        "[1, 2]",
        '{"step": "8", "val_tokens": 1}',
        '{"step": 8, "v',
    ]
    (tmp_path / "run" / "val_metrics.jsonl").write_text("\n".join(lines))
    assert read_run(tmp_path / "run").val_metrics == [{"step": 8, "val_tokens": 10, "val_loss": 2.5}]


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
    for share, said in ((0.49, False), (0.83, True)):
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(table(result | {"clipped_by_max_share": share}, "t"))
        advice = r"83\.0% +│ of steps: the rule hardly acts; raise clip\.max_grad_norm, or set it null"
        assert bool(re.search(advice, console.export_text())) == said
    assert "bits per byte" not in text and "skipped" not in text and "corrupted" not in text
    console = Console(width=200, record=True, file=io.StringIO())
    spent = {"other": 0.0, "data": 0.1, "forward_backward": 1.5, "clip": 0.1, "optimizer": 0.3}
    corrupted = {"corrupted_batches": 6, "corruption_kind": "repeat"}
    more = {"mfu": 0.415, "step_seconds": spent, "peak_memory_gib": 3.21, "saving_seconds": 2.5}
    more |= {"test_bits_per_byte": 1.5, "skipped": 4, "test_loss": 900.0}
    console.print(table(result | more | corrupted, "t"))
    text = console.export_text()
    for shown in (
        "41.5% MFU", "2.000 s", "other 0.0%, data 5.0%, forward and backward 75.0%, clipping 5.0%", "3.2 GiB", "2.50 s",
        "1.500 bits per byte", "2 of them by z-score; 4 skipped, norm not finite", "corrupted batches", "6 repeat",
    ):  # fmt: skip
        assert shown in text, shown
    change = {"step": 40, "setting": "clip.max_grad_norm", "from": 1.5, "to": None}
    console.print(table(result | {"changes": [change]}, "t"))
    assert re.search(r"changed setting +│ clip\.max_grad_norm=null │ since step 40; it was 1\.5", console.export_text())
    console.print(comparison([({"clip": "one"}, result), ({"clip": "two"}, result | corrupted)]))
    text = console.export_text()
    assert re.search(r"corrupted .+\n.+ batches ", text) and "6 repeat" in text and "none" in text


def test_many_varied_settings_fit_a_narrow_terminal():
    result = {"test_loss": 4.5, "train_loss": 4.6, "spikes": 0, "clipped_share": 0.1}
    jobs = [({"clip": "zclip", "a": "1", "same": "0"}, result), ({"b": "2", "c": "3", "same": "0"}, result)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison(jobs))
    text = console.export_text()
    assert "clip=zclip a=1" in text and "b=2 c=3" in text and "same" not in text and "loss" in text
    console.print(comparison([job for job in jobs if "clip" in job[0]] + [({"clip": "fixed"}, result)]))
    assert "=" not in console.export_text()
    keys = ({"clip.recovery_window": "null"}, {"clip": "fixed", "seed": "0"}, {"clip": "zclip", "seed": "1"})
    console.print(comparison([(key, result | {"corrupted_batches": 9, "corruption_kind": "repeat"}) for key in keys]))
    assert re.search(r" recovery .+ corrupted .+\n.+ _window ", console.export_text())


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("settings", range(1, 7))
def test_no_number_of_a_sweep_is_cut_from_60_columns_on(settings, injected):
    """In settings of any number. A value that takes several lines is whole, too."""
    keys = ("clip", "optim.warmup_fraction", "trainer.max_steps", "seed", "clip.recovery_window", "lr")[:settings]
    result = {"test_loss": 14.321, "train_loss": 15.678, "spikes": 123, "clipped_share": 1.0}
    if injected:
        result |= {"corrupted_batches": 6, "corruption_kind": "repeated_ngrams"}
    jobs = [({key: f"{key[-4:]}{number}" for key in keys}, result) for number in (1, 2)]
    jobs.append((jobs[1][0], result | {"test_loss": None, "train_loss": None}))
    for width in (60, 65, 70, 80, 100, 200):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(comparison(jobs, width=width))
        text = console.export_text()
        assert "…" not in text and max(map(len, text.splitlines())) <= width, text
        for number, count in (("14.321", 2), ("15.678", 2), ("123", 3), ("100.0%", 3), ("not finite", 2)):
            assert text.count(number) == count, text
        columns = zip(*(re.split("[│┃]", line) for line in text.splitlines() if line[0] in "│┃"), strict=True)
        content = "".join("".join(column) for column in columns).replace(" ", "")
        for word in (*jobs[0][0].values(), *jobs[1][0].values(), *(["6repeated_ngrams"] if injected else [])):
            assert word in content, text


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


def test_plot_marks_spikes_corrupted_batches_and_validation(tmp_path):
    """Steps 60 and 61 are a spike, step 70 a corrupted batch; the first 20 steps and step 75 have no z-score."""
    losses = [9.0 if step in (60, 61, 70) else 1.0 + step % 2 / 5 for step in range(1, 81)]
    z_scores = [None if step <= 20 or step == 75 else 20.0 * (step == 50) for step in range(1, 81)]
    rows = [row(step, *both) for step, both in enumerate(zip(losses, z_scores, strict=True), 1)]
    run = write_run(tmp_path / "run", rows, {"test_loss": 4.2, "unigram_entropy": 6.0})
    run.config.update(data={"corruption": {"steps": [70], "kind": "repeat"}}, clip={"max_grad_norm": 1.5})
    change = {"setting": "clip.max_grad_norm", "from": 1.5, "to": 0.5}
    run = run._replace(starts=[{"step": 0}, {"step": 40, "changes": [change]}])
    run = run._replace(val_metrics=[{"step": 40, "val_loss": 1.5}, {"step": 60, "hellaswag/acc": 0.3}])
    loss, norm, z = draw_run(run).axes

    def points(ax, label):
        return next(line for line in ax.lines if line.get_label() == label).get_xydata().tolist()

    def spans(ax):
        return [(patch.get_label(), patch.get_x(), patch.get_width()) for patch in ax.patches]

    assert spans(loss) == [("loss spike", 59.5, 2.0)] and spans(z) == [("warm-up of the statistics", 1.0, 19.0)]
    assert points(loss, "injected corrupted batch: repeat") == [[70, 0], [70, 1]]
    assert points(loss, "validation loss") == [[40, 1.5]] and points(loss, "test loss 4.20") == [[80, 4.2]]
    assert [[40, 1.5], [80, 4.2]] in [line.get_xydata().tolist() for line in loss.lines]
    assert points(loss, "unigram entropy of the test text 6.00") == [[0, 6], [1, 6]]
    bound = [value for _, value in points(norm, "max_grad_norm 1.5, 0.5")]
    assert bound == [1.5] * 40 + [0.5] * 40 and z.get_yscale() == "symlog"
    del run.metrics["z"]
    assert draw_run(run).axes[-1].lines[0].get_ydata().tolist() == [0.5] * 80, "clip coefficients"


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


def test_metrics_without_the_norms_after_clipping_cannot_be_drawn(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("clip: {}\n")
    (path / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "loss": 2.0, "grad_norm": 1.0}\n')
    with pytest.raises(ValueError, match=r"^metrics\.jsonl has no clipped_norm$"):
        plot_run(read_run(path))
