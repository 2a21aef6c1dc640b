"""Replay of a run's norms: the decisions of the run, from JSON lines and CSV, and one-sentence errors."""

import csv
import json
import math
import random
import subprocess
import sys

import pytest
import torch

from tests.helpers import CHECKOUT
from zclip import ZClip
from zclip.replay import main, replay
from zclip.trace import read_trace


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["z_thresh=0"], "z_thresh=0 is not allowed"),
        (["z_tresh=2"], "unexpected keyword argument 'z_tresh'"),
        (["clip=zclop"], "clip=zclop is not known: it must be one of zclip, fixed"),
        (["clip=zclip.AdaGC"], "clip=zclip.AdaGC cannot be replayed"),
        (["clip=zclip.ClippingStrategy"], "cannot be replayed"),
        (["column=norm"], "column=norm is not in"),
        (["column=step", "z_thresh"], "z_thresh is not KEY=VALUE; the file comes first"),
        (["loss=nope"], "loss=nope is not in"),
        (["z_thresh=2", "z_thresh=3,4"], "z_thresh=3,4 is the second value of z_thresh"),
        (["z_thresh=" + ",".join(map(str, range(1, 60)))], "these are 59 combinations of settings: at most 50"),
        (["clip=nosuchmodule.A"], "clip=nosuchmodule.A cannot be imported (ModuleNotFoundError: No module named"),
        (["on_nonfinite='raise'"], "the gradient norm is nan"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, message, jsonl, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["replay", str(jsonl), *arguments]) == 2
    out = capsys.readouterr()
    assert message in out.err and len(out.err.splitlines()) == 1 and not out.out
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_unreadable_files_are_one_sentence(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"grad_norm": 1}\n{"grad\n')
    (tmp_path / "number.jsonl").write_text("5\n")
    (tmp_path / "huge.jsonl").write_text('{"grad_norm": 1' + "0" * 400 + "}\n")
    (tmp_path / "negative.csv").write_text("grad_norm\n-1\n")
    (tmp_path / "field.csv").write_text("grad_norm\n" + "1" * 200_000 + "\n")
    (tmp_path / "list.jsonl").write_text('{"grad_norm": [1]}\n')
    (tmp_path / "words.csv").write_text("grad_norm\nlarge\n")
    for name in (*(p.name for p in tmp_path.iterdir()), "missing.csv"):
        assert main(["replay", str(tmp_path / name)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    (tmp_path / "bom.csv").write_text("grad_norm\n1\n", encoding="utf-8-sig")
    assert main(["replay", str(tmp_path / "bom.csv"), "out=none"]) == 0
    assert main([]) == 2 and main(["--help"]) == 0 and main(["replay", "-h"]) == 0


def test_rows_without_a_norm_and_an_incomplete_last_line_are_skipped(tmp_path):
    rows = [{"step": 5, "grad_norm": 1.0, "loss": 2.0}, {"step": 5, "val_loss": 3.0}, {"step": 6, "grad_norm": None}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 7, "grad_n')
    steps, norms, losses = read_trace(file, "grad_norm", None)
    assert steps == [5, 6] and norms[0] == 1.0 and math.isnan(norms[1]) and losses is None
    with pytest.raises(ValueError, match="loss=loss is missing in 1 of the 2 rows"):
        read_trace(file, "grad_norm", "loss")


def test_missing_step_numbers_and_unicode_separators(tmp_path):
    (tmp_path / "a.csv").write_text("step,grad_norm\none,1\ntwo,inf\nthree,nan\nfour")
    steps, norms, _ = read_trace(tmp_path / "a.csv", "grad_norm", None)
    assert steps == [1, 2, 3] and norms[0] == 1 and math.isnan(norms[1]) and math.isnan(norms[2])
    (tmp_path / "b.jsonl").write_text('{"note": "a\u2028b", "grad_norm": 1}\n', encoding="utf-8")
    assert read_trace(tmp_path / "b.jsonl", "grad_norm", None).norms == [1]
