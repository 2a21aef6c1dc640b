"""The benchmark of training runs to its end, and reports errors in one sentence. Its numbers decide nothing here."""

import re

import pytest

from tests.helpers import script


def test_our_contenders_are_timed(tmp_path):
    settings = ("peers=none", "rounds=2", "steps=5", "compile=false", "batch=2")
    done = script("bench_train.py", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"│ (train.py, ZClip|our model, bare loop) +│ +([\d,]+) │ +([\d.]+) \(.*?\) │ +(\d+)% │", done.stdout
    )
    assert [row[0] for row in rows] == ["train.py, ZClip", "our model, bare loop"]
    assert rows[0][2] == "1.00" and all(int(row[1].replace(",", "")) > 0 for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("step=5", "step=5 is not possible: there is no key step (the nearest is steps)"),
        ("steps=7", "steps=7 is not allowed: it must be a multiple of 5"),
        ("rounds=many", "rounds=many is not allowed: it must be an integer from 1"),
        ("only=ours,theirs", "only=ours,theirs is not allowed: it must be some of ours, bare, transformers, litgpt"),
        ("model=2b", "model=2b is not known: it must be one of"),
        ("length=4000", "data.sequence_length=4000 is longer than the model's context"),
    ],
)
def test_error_is_one_sentence_and_writes_nothing(setting, message, tmp_path):
    done = script("bench_train.py", setting, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"bench_train.py: error: {message}"), done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())
