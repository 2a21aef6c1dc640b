"""Replaying a run's norms: the very decisions of the run, from JSON lines and from CSV, and clear refusals."""

import csv
import json
import math
import random
import subprocess
import sys

import pytest
import torch

from tests.conftest import CHECKOUT
from zclip import ZClip
from zclip.replay import main, read_columns, replay


@pytest.fixture
def trace() -> list[float]:
    draw = random.Random(0)
    norms = [math.exp(draw.gauss(0, 0.1)) * (6 if t % 50 == 49 else 1) for t in range(200)]
    norms[60] = math.nan
    return norms


@pytest.fixture
def jsonl(trace, tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": t + 1, "loss": 3.0, "grad_norm": None if math.isnan(n) else n} for t, n in enumerate(trace)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_replay_decides_as_the_run_did(trace, jsonl):
    zclip = ZClip(z_thresh=2.0)
    kept = []
    for norm in trace:
        zclip.observe(torch.tensor(norm, dtype=torch.float64))
        kept.append(zclip.read_telemetry()["clipped_norm"])
    steps, norms, losses = read_columns(jsonl, "grad_norm", "loss")
    assert steps == list(range(1, 201))
    result = replay(ZClip(z_thresh=2.0), norms, losses, "z_thresh=2.0")
    assert result.kept == kept and kept[60] == 0
    assert sum(result.clipped) >= 3 and result.in_a_row >= 1


def test_the_command_prints_a_row_for_each_setting_and_draws(jsonl, tmp_path):
    command = [sys.executable, "-m", "zclip", "replay", str(jsonl), "clip=zclip", "z_thresh=2,2.5,3", "out=picture.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(CHECKOUT)})
    assert done.returncode == 0, done.stderr
    head, titles, *rows, last = done.stdout.splitlines()
    assert head.startswith("200 steps") and titles.split()[:2] == ["settings", "clipped"]
    assert [row.split()[0] for row in rows] == ["z_thresh=2", "z_thresh=2.5", "z_thresh=3"]
    assert all(row.split()[3] == "1" for row in rows), "the NaN is skipped"
    counts = [int(row.split()[1]) for row in rows]
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 3
    assert last == "picture: picture.png" and (tmp_path / "picture.png").read_bytes()[1:4] == b"PNG"


def test_a_wandb_export(trace, tmp_path, capsys):
    file = tmp_path / "export.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["Step", "my run - grad_norm", "my run - grad_norm__MIN"])
        for t, n in enumerate(trace):
            writer.writerows([[10 * t, "NaN" if math.isnan(n) else n, 0], [10 * t + 1, "", ""]])
    steps, norms, losses = read_columns(file, "grad_norm", None)
    assert losses is None and math.isnan(norms[60]) and norms[:60] == trace[:60] and len(norms) == len(trace)
    assert steps == [10 * t for t in range(len(trace))]
    for clip in (
        "fixed max_norm=0.5,1",
        "autoclip percentile=10",
        "skip window=16",
        "none",
        "zclip.ZClip clip_option=mean",
    ):
        name, *settings = clip.split()
        assert main(["replay", str(file), f"clip={name}", *settings, "out=none"]) == 0
    assert "max_norm=0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
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
def test_mistakes_are_one_sentence(arguments, said, jsonl, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["replay", str(jsonl), *arguments]) == 2
    out = capsys.readouterr()
    assert said in out.err and len(out.err.splitlines()) == 1 and not out.out
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_files_that_cannot_be_read(tmp_path, capsys):
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


def test_rows_without_a_norm_and_half_a_last_line_are_left_out(tmp_path):
    rows = [{"step": 5, "grad_norm": 1.0, "loss": 2.0}, {"step": 5, "val_loss": 3.0}, {"step": 6, "grad_norm": None}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 7, "grad_n')
    steps, norms, losses = read_columns(file, "grad_norm", None)
    assert steps == [5, 6] and norms[0] == 1.0 and math.isnan(norms[1]) and losses is None
    with pytest.raises(ValueError, match="loss=loss is missing in 1 of the 2 rows"):
        read_columns(file, "grad_norm", "loss")


def test_odd_rows(tmp_path):
    (tmp_path / "a.csv").write_text("step,grad_norm\none,1\ntwo,inf\nthree,nan\nfour")
    steps, norms, _ = read_columns(tmp_path / "a.csv", "grad_norm", None)
    assert steps == [1, 2, 3] and norms[0] == 1 and math.isnan(norms[1]) and math.isnan(norms[2])
    (tmp_path / "b.jsonl").write_text('{"note": "a\u2028b", "grad_norm": 1}\n', encoding="utf-8")
    assert read_columns(tmp_path / "b.jsonl", "grad_norm", None).norms == [1]
