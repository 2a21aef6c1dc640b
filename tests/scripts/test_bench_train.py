"""The benchmark of training runs to its end, and reports errors in one sentence. Its numbers decide nothing here."""

import json
import re

import numpy as np
import pytest
from hydra import compose

from tests.helpers import SLOW, compose_config, script
from tests.scripts.loading import load_script


@pytest.mark.slow
def test_our_contenders_are_timed(tmp_path):
    settings = ("peers=none", "rounds=2", "steps=5", "compile=false", "batch=2")
    done = script("bench_train.py", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"│ (train.py, ZClip|our model, bare loop) +│ +([\d,]+) │ +([\d.]+) \(.*?\) │ +(\d+)% │", done.stdout
    )
    assert [row[0] for row in rows] == ["train.py, ZClip", "our model, bare loop"], done.stdout
    assert rows[0][2] == "1.00" and all(int(row[1].replace(",", "")) > 0 for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


@pytest.mark.slow
def test_contender_is_timed_in_its_own_process(corpus, cache, tmp_path, monkeypatch, capfd):
    """On the text of the tests; the whole text takes ten seconds to prepare."""
    bench_train = load_script("bench_train")
    small = (f"data.path={corpus}", f"paths.cache={cache}")
    monkeypatch.setattr(bench_train, "compose", lambda name, overrides: compose(name, [*overrides, *small]))
    monkeypatch.chdir(tmp_path)
    sizes = {"model": "nano", "batch": 1, "length": 16, "steps": 5, "rounds": 2, "compile": False}
    bench_train.main(sizes | {"only": "bare", "peers": "none"})
    out, err = capfd.readouterr()
    assert re.search(r"│ our model, bare loop │ +[\d,]+ │ +1.00 \(1.00 to 1.00\) │ +\d+% │ +0.\d │ +\d.\d\d │", out), (
        out + err
    )
    assert "0.6M parameters, 1 x 16 tokens" in out and "matrix product: " in out
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("contender", ["ours", "bare", "transformers"])
def test_worker_reports_its_warm_up_and_ends_with_its_input(contender, tiny, tmp_path):
    overrides = [*tiny, "trainer.log_every=1", "name=worker"]
    config = compose_config(*overrides)
    spec = {
        "steps": 2, "batch": 8, "length": 64, "device": "cpu", "lr": 1e-3, "log_every": 1, "folder": str(tmp_path),
        "model": config.model.shape, "parameters": config.model.parameters, "overrides": overrides, "compile": False,
    }  # fmt: skip
    np.save(tmp_path / "batches.npy", np.arange(2 * 8 * 65, dtype=np.int32).reshape(2, 8, 65) % 512)
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    done = script("bench_worker.py", contender, str(tmp_path / "spec.json"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (report,) = map(json.loads, done.stdout.splitlines())
    assert report["seconds"] > 0 and 5.5 < report["loss"] < 7 and report["memory"] > 2**27, report


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        SLOW("step=5", "step=5 is not possible: there is no key step (the nearest is steps)"),
        SLOW("steps=7", "steps=7 is not allowed: it must be a multiple of 5"),
        SLOW("rounds=many", "rounds=many is not allowed: it must be an integer from 1"),
        SLOW("only=ours,theirs", "only=ours,theirs is not allowed: it must be some of ours, bare,"),
        SLOW("model=2b", "model=2b is not known: it must be one of"),
        ("length=4000", "data.sequence_length=4000 is longer than the model's context"),
    ],
)
def test_error_is_one_sentence_and_writes_nothing(setting, message, tmp_path):
    done = script("bench_train.py", setting, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"bench_train.py: error: {message}"), done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())
