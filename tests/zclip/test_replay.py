"""Replay of a run's norms: the decisions of the run, from JSON lines and CSV, and one-sentence errors."""

import csv
import json
import math
import os
import random
import re
import struct
import subprocess
import sys

import pytest
import torch

import zclip.replay
from tests.helpers import CHECKOUT
from zclip import FixedNorm, SkipStep, ZClip
from zclip.integrations.plot import plot
from zclip.replay import OF_TENSORS, main, replay
from zclip.trace import ReplayResult, read_trace


@pytest.fixture
def norm_trace() -> list[float]:
    draw = random.Random(0)
    norms = [math.exp(draw.gauss(0, 0.1)) * (6 if t % 50 == 49 else 1) for t in range(200)]
    norms[60] = math.nan
    return norms


@pytest.fixture
def jsonl(norm_trace, tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": t + 1, "loss": 3.0, "grad_norm": None if math.isnan(n) else n} for t, n in enumerate(norm_trace)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_replay_makes_the_decisions_of_the_run(norm_trace, jsonl):
    zclip = ZClip(z_thresh=2.0)
    clipped_norms = []
    for norm in norm_trace:
        zclip.observe(torch.tensor(norm, dtype=torch.float64))
        clipped_norms.append(zclip.read_telemetry()["clipped_norm"])
    steps, norms, losses = read_trace(jsonl, "grad_norm", "loss")
    assert steps == list(range(1, 201))
    result = replay(ZClip(z_thresh=2.0), norms, losses, "z_thresh=2.0")
    assert result.clipped_norms == clipped_norms and clipped_norms[60] == 0
    assert sum(result.clipped) >= 3 and result.max_consecutive_clips >= 1
    assert replay(FixedNorm(1.0), [2.0, 3.0, 0.5, 2.0], None, "").max_consecutive_clips == 2


def test_command_prints_a_row_for_each_setting_and_plots(jsonl, tmp_path):
    command = [sys.executable, "-m", "zclip", "replay", str(jsonl), "clip=zclip", "z_thresh=2,2.5,3", "out=norms.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(CHECKOUT)})
    assert done.returncode == 0, done.stderr
    summary, header, *rows, last = done.stdout.splitlines()
    assert summary.startswith("200 steps") and header.split()[:2] == ["settings", "clipped"]
    assert [row.split()[0] for row in rows] == ["z_thresh=2", "z_thresh=2.5", "z_thresh=3"]
    assert all(row.split()[3] == "1" for row in rows), "the NaN is skipped"
    counts = [int(row.split()[1]) for row in rows]
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 3
    assert last == "plot: norms.png" and (tmp_path / "norms.png").read_bytes()[1:4] == b"PNG"


def test_wandb_export_with_every_strategy(norm_trace, tmp_path, capsys):
    file = tmp_path / "export.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["Step", "my run - grad_norm", "my run - grad_norm__MIN"])
        for t, n in enumerate(norm_trace):
            writer.writerows([[10 * t, "NaN" if math.isnan(n) else n, 0], [10 * t + 1, "", ""]])
    steps, norms, losses = read_trace(file, "grad_norm", None)
    assert losses is None and math.isnan(norms[60]) and norms[:60] == norm_trace[:60] and len(norms) == len(norm_trace)
    assert steps == [10 * t for t in range(len(norm_trace))]
    for clip in (
        "fixed max_norm=0.5,1",
        "autoclip percentile=10",
        "skip_step window=16",
        "none",
        "zclip.ZClip clip_option=mean",
    ):
        name, *settings = clip.split()
        assert main(["replay", str(file), f"clip={name}", *settings, "out=none"]) == 0
    assert "max_norm=0.5" in capsys.readouterr().out


STRATEGIES = (
    "it must be one of zclip, log_z_score, lagged_z_score, fixed, autoclip, global_adagc, skip_step, none, "
    "or module.Class"
)
GLOBAL_NORM = "it must be a ClippingStrategy over the global norm, because a file has no other norms"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("z_thresh=0", "z_thresh=0 is not allowed: it must be a number above 0"),
        ("z_tresh=2", "clip=zclip does not take these settings: ZClip() got an unexpected keyword argument 'z_tresh'"),
        ("clip=zclop", f"clip=zclop is not known: {STRATEGIES}"),
        ("clip=zclop=2", f"clip=zclop=2 is not known: {STRATEGIES}"),
        *((f"clip={name}", f"clip={name} cannot be replayed: {GLOBAL_NORM}") for name in OF_TENSORS),
        ("clip=zclip.AdaGC", f"clip=zclip.AdaGC cannot be replayed: {GLOBAL_NORM}"),
        ("clip=zclip.ClippingStrategy", f"clip=zclip.ClippingStrategy cannot be replayed: {GLOBAL_NORM}"),
        ("scope='*.weight'", "scope=*.weight cannot be replayed: a file has the norm of all parameters only"),
        ("clip=zclip.Decision", f"clip=zclip.Decision cannot be replayed: {GLOBAL_NORM}"),
        ("clip=zclip.replay.MAX_COMBINATIONS", f"clip=zclip.replay.MAX_COMBINATIONS cannot be replayed: {GLOBAL_NORM}"),
        ("column=norm", "column=norm is not in FILE: it has step, loss, grad_norm"),
        ("column=step z_thresh", "z_thresh is not KEY=VALUE; the file comes first"),
        ("z_thresh=", "z_thresh= is not KEY=VALUE; the file comes first"),
        ("loss=nope", "loss=nope is not in FILE: it has step, loss, grad_norm"),
        (
            "z_thresh=2 z_thresh=3,4",
            "z_thresh=3,4 is the second value of z_thresh: give several as z_thresh=VALUE,VALUE",
        ),
        (
            f"eps={','.join(map(str, range(1, 27)))} alpha=0,0.5",
            "these are 52 combinations of settings: at most 50 are replayed at once",
        ),
        (
            "clip=nosuchmodule.A",
            "clip=nosuchmodule.A cannot be imported (ModuleNotFoundError: No module named 'nosuchmodule'): "
            f"{STRATEGIES}",
        ),
        ("on_nonfinite='raise'", "the gradient norm is nan"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, message, jsonl, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["replay", str(jsonl), *arguments.split()]) == 2
    out = capsys.readouterr()
    assert out.err == f"zclip replay: error: {message}\n".replace("FILE", str(jsonl)) and not out.out
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_fifty_combinations_are_replayed(tmp_path, capsys):
    file = tmp_path / "one.csv"
    file.write_text("grad_norm\n1\n")
    eps = ",".join(map(str, range(1, 26)))
    assert main(["replay", str(file), f"eps={eps}", "alpha=0,0.5", "out=none"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[:2] for row in rows[:3]] == [["eps=1", "alpha=0"], ["eps=1", "alpha=0.5"], ["eps=2", "alpha=0"]]
    assert len(rows) == 50


VALUE = "column=grad_norm of FILE holds a value that is not a number: "


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.jsonl", "", "column=grad_norm is not in FILE: it has no columns"),
        ("other.csv", "step,loss\n1,2\n", "column=grad_norm is not in FILE: it has step, loss"),
        ("two.csv", "a - grad_norm,b - grad_norm\n1,2\n",
         "column=grad_norm is not in FILE: it has a - grad_norm, b - grad_norm"),
        ("word.csv", "my grad_norm\n1\n", "column=grad_norm is not in FILE: it has my grad_norm"),
        ("blank.csv", "step,grad_norm\n1,\n", "FILE has no steps"),
        ("broken.jsonl", '{"grad_norm": 1}\n{"grad\n', "FILE cannot be read: line 2 is not JSON (Unterminated string"),
        ("only.jsonl", '{"grad', "FILE cannot be read: line 1 is not JSON (Unterminated string"),
        ("between.json", '{"grad_norm": 1}\n{"grad\n\n{"grad_norm": 1}', "FILE cannot be read: line 2 is not JSON ("),
        ("number.jsonl", "\n5\n", 'FILE cannot be read: line 2 is not an object, such as {"grad_norm": 1.5}'),
        ("huge.jsonl", '{"grad_norm": 1' + "0" * 400 + "}\n",
         "column=grad_norm of FILE holds a value that is not a number: int too large to convert to float"),
        ("negative.csv", "grad_norm\n3\n-1\n-2\n", "column=grad_norm of FILE holds -2: a norm is not below 0"),
        ("small.csv", "grad_norm\n-0.5\n", "column=grad_norm of FILE holds -0.5: a norm is not below 0"),
        ("field.csv", "grad_norm\n" + "1" * 200_000 + "\n", "FILE cannot be read: field larger than field limit"),
        ("list.jsonl", '{"grad_norm": [1]}\n', f"{VALUE}it is a list"),
        ("flag.jsonl", '{"grad_norm": true}\n', f"{VALUE}it is a bool"),
        ("text.jsonl", '{"grad_norm": "1.5"}\n', f"{VALUE}could not convert the text '1.5'"),
        ("under.csv", "grad_norm\n1_0\n", f"{VALUE}could not"),
        ("arabic.csv", "grad_norm\n\u0661\n", f"{VALUE}could not"),
        ("deep.jsonl", "[" * 100_000, "FILE cannot be read: line 1 is nested too deeply"),
        ("object.jsonl", '{"grad_norm":' * 100_000 + "\n", "FILE cannot be read: line 1 is nested too deeply"),
        ("long.jsonl", "1" * 10_000_000, "FILE cannot be read: line 1 is not JSON (Exceeds the limit"),
        ("surrogate.jsonl", '{"\\ud800\\n": 1}\n', "column=grad_norm is not in FILE: it has \\ud800\\n"),
        ("norm.jsonl", '{"grad_norm": "\\ud800\\n"}\n', VALUE),
        ("nul.jsonl", "\0" * 50, "FILE cannot be read: line 1 is not JSON ("),
        ("nul.csv", "grad_norm\n\0\n", f"{VALUE}could not"),
        ("binary.csv", b"\x93NUMPY\xff\xfe", "FILE cannot be read: 'utf-8' codec can't decode byte 0x93 in position 0"),
        ("utf16.csv", "grad_norm\n1\n".encode("utf-16"), "FILE cannot be read: 'utf-8' codec can't decode byte 0xff"),
        ("twice.csv", "grad_norm,step,grad_norm\n1,2,3\n", "FILE cannot be read: it has several columns grad_norm"),
        ("loss-twice.csv", "loss,grad_norm,loss\n1,2,3\n", "FILE cannot be read: it has several columns loss"),
        ("many.csv", ",".join(map(str, range(10_000))), "column=grad_norm is not in FILE: it has 0, 1, 2, 3, 4"),
        ("quote.csv", 'grad_norm,note\n1,"open\n2,\n', "FILE cannot be read: unexpected end of data"),
        ("words.csv", "grad_norm\nlarge\n", f"{VALUE}could not"),
        ("loss.csv", "grad_norm,loss\n1,high\n", "column=loss of FILE holds a value that is not a number: could not"),
        ("missing.csv", None, "FILE cannot be read: [Errno 2] No such file or directory"),
    ],
)  # fmt: skip
def test_unreadable_files_are_one_sentence(name, text, message, tmp_path, capsys):
    file = tmp_path / name
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["replay", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"zclip replay: error: {message}".replace("FILE", str(file)))
    assert error.count("\n") == 1 and error.endswith("\n") and len(error) < 1000


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    for name, problem in (
        ("fifo.jsonl", "it is not a regular file"), ("folder.csv", "it is a folder"), ("loop.csv", "[Errno 40]"),
        ("x" * 300, "[Errno 36] File name too long"), ("a\0b", "embedded null "), ("a/b", "[Errno 2] No such file"),
    ):  # fmt: skip
        assert main(["replay", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        reason = error.partition("cannot be read: ")[2].removeprefix("stat: ")  # which Python 3.13 adds
        assert reason.startswith(problem) and error.count("\n") == 1
    assert main(["replay", "/dev/zero"]) == 2 and "it is not a regular file" in capsys.readouterr().err


def test_larger_files_than_it_can_hold_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("zclip.trace.MAX_BYTES", 20)
    (tmp_path / "a.csv").write_text("grad_norm\n" + "1\n" * 5)
    assert read_trace(tmp_path / "a.csv", "grad_norm", None).norms == [1.0] * 5
    (tmp_path / "a.csv").write_text("grad_norm\n" + "1\n" * 6)
    assert main(["replay", str(tmp_path / "a.csv")]) == 2
    assert capsys.readouterr().err.endswith("a.csv cannot be read: it has more than 20 bytes\n")


def test_nonfinite_words_are_norms_that_were_not_finite(tmp_path):
    file = tmp_path / "words.jsonl"
    file.write_text('{"grad_norm": "NaN"}\n{"grad_norm": "-Infinity"}\n{"grad_norm": 1e400}\n{"grad_norm": NaN}\n')
    assert all(map(math.isnan, read_trace(file, "grad_norm", None).norms))


def test_extreme_norms_are_replayed_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, norms in enumerate((["1e308"] * 30, ["0"], ["nan"], ["5e-324", "1e308", "inf"])):
        (tmp_path / "extreme.csv").write_text("step,grad_norm\n" + "".join(f"1e{300 * i},{n}\n" for n in norms))
        assert main(["replay", "extreme.csv", "clip=zclip", "warmup_steps=1"]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count("plot: replay.png") == 4


def test_module_itself_is_the_command_too(tmp_path):
    name = os.fsdecode(b"caf\xe9-\xc3\xa9.csv")  # the first is no UTF-8, the second is no ASCII
    (tmp_path / name).write_text("grad_norm\n1\n3\n")
    command = [sys.executable, "-m", "zclip.replay", name, "clip=fixed", "max_norm=2", "out=none"]
    env = {"PYTHONPATH": str(CHECKOUT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[2].split() == ["fixed", "1", "50.0%", "0", "1", "2"]


def test_zero_is_a_norm_and_a_byte_order_mark_is_none(tmp_path, capsys):
    file = tmp_path / "bom.csv"
    file.write_text("grad_norm\n1\n0\n", encoding="utf-8-sig")
    assert main(["replay", str(file), "out=none"]) == 0
    assert read_trace(file, "grad_norm", None) == ([1.0, 2.0], [1.0, 0.0], None)
    assert capsys.readouterr().out.startswith(f"2 steps of {file}, ZClip(alpha=0.97, z_thresh=2.5, ")


def test_help_goes_to_stdout_and_is_shown_on_stderr_without_a_command(capsys):
    for arguments in (["--help"], ["replay", "-h"], ["replay", "file", "--help"]):
        assert main(arguments) == 0
        assert capsys.readouterr() == (zclip.replay.__doc__, "")
    for arguments in ([], ["replay"], ["reply", "file"]):
        assert main(arguments) == 2
        assert capsys.readouterr() == ("", zclip.replay.__doc__)


def test_table_counts_clipped_and_skipped_steps(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    norms = [1.0, 8.0, None, 4.0, 1.5, 4.0, 0.0]
    rows = [json.dumps({"step": i, "grad_norm": norm}) + "\n" for i, norm in enumerate(norms)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    assert main(["replay", "metrics.jsonl", "clip=fixed", "max_norm=2,0.5,10", "out=none"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "7 steps of metrics.jsonl, FixedNorm()",
        "settings      clipped   share  skipped  max in a row  max norm after",
        "max_norm=2          3   42.9%        1             1               2",
        "max_norm=0.5        5   71.4%        1             3             0.5",
        "max_norm=10         0    0.0%        1             0               8",
    ]
    assert main(["replay", "metrics.jsonl", "clip=none"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "7 steps of metrics.jsonl, NoClipping()",
        "settings  clipped   share  skipped  max in a row  max norm after",
        "none            0    0.0%        1             0               8",
        "plot: replay.png",
    ]
    width, height = struct.unpack(">2I", (tmp_path / "replay.png").read_bytes()[16:24])
    assert (width, height) == (1080, 360), "9 by 3 inches at 120 dots per inch"
    assert main(["replay", "metrics.jsonl", "recovery_window=null", "skip_update_on_spike=true,false", "out=none"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].endswith("clip_factor=1.0, recovery_window=None)")
    assert [row.split()[0] for row in table[2:]] == ["skip_update_on_spike=True", "skip_update_on_spike=False"]
    assert main(["replay", "metrics.jsonl", "out=replay.nope"]) == 2
    assert capsys.readouterr().err.startswith(
        "zclip replay: error: out=replay.nope cannot be written: Format 'nope' is not supported"
    )


def test_plot_shows_norms_before_and_after_with_marks(tmp_path):
    norms = [1.0, 2.0, 40.0, math.nan, 5.0]
    results = [
        ReplayResult("z_thresh=2", norms, [1.0, 0.5, 4.0, 0.0, 0.0], 1),
        ReplayResult("z_thresh=3", norms, [1.0, 2.0, 40.0, 1.0, 5.0], 0),
    ]
    plot(results, [10, 20, 30, 40, 50], tmp_path / "plot.svg")
    svg = (tmp_path / "plot.svg").read_text()
    assert 'width="648pt" height="374.4pt"' in svg, "9 by 5.2 inches"
    texts = re.findall(r"<!-- (.*?) -->", svg)
    assert [text for text in texts if not text[0].isdigit()] == [
        "z_thresh=2: 60.0% of the steps clipped, 2 skipped", "before", "after",
        "step", "z_thresh=3: 0.0% of the steps clipped", "gradient norm",
    ]  # fmt: skip
    assert {"1", "2", "4", "6", "10", "20", "40"} <= set(texts) and "3" not in texts and "5" not in texts
    lines = re.findall(r'<path d="([^"]*)" clip-path[^>]*style="fill: none; stroke: (#\w+); stroke-width: 0.8;', svg)
    points = [(color, len(path.split("\n")) - 1) for path, color in lines if color in ("#c2410c", "#1d4ed8")]
    assert points == [("#c2410c", 4), ("#1d4ed8", 3), ("#c2410c", 4), ("#1d4ed8", 5)]
    marks = re.findall(r'<use [^>]* x="([\d.]+)" y="([\d.]+)" style="fill: #c2410c; stroke: #c2410c"', svg)
    assert len(marks) == 2, "the clipped steps; skipped ones have no mark"
    assert all(f"L {x} {y}" in lines[0][0] for x, y in marks), "at the norm before clipping"
    assert lines[1][0].split()[:3] == lines[0][0].split()[:3], "both lines start at the first step"
    assert texts.count("15") == 1 and texts.count("0.6") == 2, "the panels share both axes"
    assert "M 0 1.5" in svg, "a mark has a radius of 1.5 points"


def test_table_is_printed_without_matplotlib(tmp_path, capsys, monkeypatch):
    (tmp_path / "metrics.csv").write_text("grad_norm\n1\n")
    monkeypatch.setitem(sys.modules, "zclip.integrations.plot", None)  # importing it raises
    assert main(["replay", str(tmp_path / "metrics.csv")]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "zclip           0    0.0%        0             0               1",
        "no plot: matplotlib is not installed",
    ]


def test_rows_without_a_norm_and_an_incomplete_last_line_are_skipped(tmp_path):
    rows = [{"step": 5, "grad_norm": 1.0, "loss": 2.0}, {"step": 5, "val_loss": 3.0}, {"step": 6, "grad_norm": None}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 7, "grad_n')
    steps, norms, losses = read_trace(file, "grad_norm", None)
    assert steps == [5, 6] and norms[0] == 1.0 and math.isnan(norms[1]) and losses is None
    with pytest.raises(ValueError) as error:
        read_trace(file, "grad_norm", "loss")
    assert str(error.value) == f"loss=loss is missing in 1 of the 2 rows of {file} that have a norm"


def test_losses_are_read_from_the_named_column_and_used(tmp_path, capsys):
    file = tmp_path / "losses.csv"
    file.write_text("_step,LOSS,a - loss ,grad_norm\n7,1,2,3\n8,inf,NaN,4\n,,,\n9,5,,6\n")
    assert read_trace(file, "grad_norm", None) == ([7, 8, 9], [3, 4, 6], None)
    file.write_text("Global_Step,LOSS,a - loss ,grad_norm\n7,1,2,3\n8,inf,4,4\n9,5,0,6\n")
    assert read_trace(file, "grad_norm", None) == ([7, 8, 9], [3, 4, 6], [2, 4, 0])
    steps, norms, losses = read_trace(file, "grad_norm", "LOSS")
    assert (steps, norms) == ([7, 8, 9], [3, 4, 6]) and losses[::2] == [1, 5] and math.isnan(losses[1])
    strategy = SkipStep(window=8)
    assert replay(strategy, norms, losses, "label").label == "label"
    assert strategy.max_consecutive_nonfinite is None
    assert strategy.state["losses"].tolist() == [1, 5, 0, 0, 0, 0, 0, 0]
    file.write_text("loss,grad_norm\n" + "1,1\n2,1\n3,1\n" * 3 + "9,1\n")
    assert main(["replay", str(file), "clip=skip_step", "window=8", "out=none"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[3] == "1", "the last loss is an outlier"
    without = SkipStep(window=8)
    replay(without, norms, None, "")
    assert without.state["loss_count"] == 0 and without.state["norm_count"] == 3


def test_missing_step_numbers_and_unicode_separators(tmp_path):
    (tmp_path / "a.csv").write_text("step,grad_norm\none,1\ntwo,inf\nthree,nan\nfour")
    steps, norms, _ = read_trace(tmp_path / "a.csv", "grad_norm", None)
    assert steps == [1, 2, 3] and norms[0] == 1 and math.isnan(norms[1]) and math.isnan(norms[2])
    (tmp_path / "c.json").write_text('{"grad_norm": 1}\n\n{"grad_norm": 2}')
    assert read_trace(tmp_path / "c.json", "grad_norm", None) == ([1, 2], [1, 2], None)
    (tmp_path / "d.jsonl").write_text('{"grad_norm": 1}\n{"grad')
    assert read_trace(tmp_path / "d.jsonl", "grad_norm", None).norms == [1]
    (tmp_path / "b.jsonl").write_text('{"note": "a\u2028b", "grad_norm": 1}\n', encoding="utf-8")
    assert read_trace(tmp_path / "b.jsonl", "grad_norm", None).norms == [1]
