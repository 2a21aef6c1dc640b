"""Evaluations during training: their results on any number of processes, and that they do not change training."""

import json
import math
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data import TokenDataset, load_tokenizer, open_tokens
from data.tokenizer import train_tokenizer
from tests.data.arrays import token_array
from tests.helpers import FSDP, TINY, read_jsonl, start, train, wait_for_steps
from training.validation.loss import ValidationSet, bits_per_byte


@pytest.fixture(scope="module")
def settings(corpus: Path, cache: Path) -> tuple[str, ...]:
    every = ("trainer.val_every=10", "trainer.val_tokens=3000", "trainer.checkpoint_every=10", "trainer.log_every=1")
    return (f"data.path={corpus}", f"paths.cache={cache}", *TINY, *every)


def test_evaluations_are_the_same_on_any_number_of_processes_and_leave_training_unchanged(settings, sets, tmp_path):
    tasks = ("trainer.eval_every=20", "eval.tasks=[winogrande]", "eval.limit=40", f"eval.data_dir={sets}")
    tasks += ("model.max_position_embeddings=128",)
    ends = []
    plain_settings = ("trainer.val_every=null", tasks[-1])
    for name, overrides in (("plain", plain_settings), ("one", tasks), ("two", (*tasks, *FSDP))):
        done = train(*settings, *overrides, f"name={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        ends.append(tmp_path / "runs" / "main" / name)
    plain, one, two = ends
    assert [row["loss"] for row in read_jsonl(plain / "metrics.jsonl")] == [
        row["loss"] for row in read_jsonl(one / "metrics.jsonl")
    ]
    losses = [read_jsonl(end / "val_metrics.jsonl") for end in (one, two)]
    assert [row["step"] for row in losses[0]] == [row["step"] for row in losses[1]] == [10, 20, 30]
    for row, other in zip(*losses, strict=True):
        assert row["val_tokens"] == other["val_tokens"] == 3000 // 64 * 64
        assert row["val_loss"] == pytest.approx(other["val_loss"], abs=1e-5)
        assert row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"]))
    assert losses[0][0]["val_loss"] > losses[0][2]["val_loss"]
    scores = [json.loads((end / "task_scores.json").read_text())["scores"] for end in (one, two)]
    assert [score["step"] for score in scores[0]] == [20, 40], "also after the last step"
    for score, other in zip(*scores, strict=True):
        assert (score["task"], score["items"]) == ("winogrande", 40)
        assert abs(score["acc"] - other["acc"]) <= 1 / 40, "they differ by rounding"
    results = [json.loads((end / "result.json").read_text()) for end in ends]
    assert results[0]["test_loss"] == results[1]["test_loss"] == pytest.approx(results[2]["test_loss"], abs=1e-5)
    assert not (plain / "val_metrics.jsonl").exists()
    assert read_jsonl(one / "metrics.jsonl")[10]["evaluation_seconds"] > 0


def test_killed_run_has_each_evaluation_once(settings, tmp_path):
    for name in ("uninterrupted", "killed"):
        (tmp_path / name).mkdir()
    settings = (*settings, "name=x")
    assert train(*settings, cwd=tmp_path / "uninterrupted").returncode == 0
    for steps in (10, 20, 25):
        job = start(*settings, cwd=tmp_path / "killed")
        wait_for_steps(job, tmp_path / "killed", steps)
        job.kill()
        job.wait()
    path = tmp_path / "killed" / "runs" / "main" / "x" / "val_metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 30, "test_lo')
    done = train(*settings, cwd=tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    assert read_jsonl(path) == read_jsonl(tmp_path / "uninterrupted" / "runs" / "main" / "x" / "val_metrics.jsonl")


def test_signal_during_task_evaluation_saves_and_resumes(settings, sets, tmp_path):
    overrides = (*settings, "trainer.val_every=null", "trainer.eval_every=20", "eval.tasks=[hellaswag]", "name=x")
    overrides += (
        "eval.limit=700",
        f"eval.data_dir={sets}",
        "trainer.checkpoint_every=40",
        "model.max_position_embeddings=128",
    )
    job = start(*overrides, cwd=tmp_path)
    folder = tmp_path / "runs" / "main" / "x"
    while (
        not list(folder.glob(".task_scores-20-*"))
        or b"\n[" not in next(folder.glob(".task_scores-20-*")).read_bytes()[:200]
    ):
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    job.terminate()
    output = job.communicate(timeout=100)
    assert job.returncode == 128 + signal.SIGTERM, output
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000020.ckpt"], output
    (folder / "task_scores.json").write_text("{")
    done = train(*overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "task_scores.json is damaged (" in done.stdout and "It is renamed to damaged-" in done.stdout
    scores = json.loads((folder / "task_scores.json").read_text())["scores"]
    assert [(score["step"], score["dtype"], score["items"]) for score in scores] == [
        (20, "float32", 700), (40, "float32", 700),
    ]  # fmt: skip
    for name in ("task_scores.json", "result.json"):
        (folder / name).unlink()
    assert train(*overrides, cwd=tmp_path).returncode == 0, "as if it was killed in the last evaluation"
    again = json.loads((folder / "task_scores.json").read_text())["scores"]
    assert [(score["step"], score["acc"]) for score in again] == [(40, scores[1]["acc"])]
    assert not list(folder.glob(".task_scores-*.jsonl"))


def test_bytes_are_those_of_the_text_in_any_script(tmp_path):
    text = "Ώδε ἡ Ῥόδος. 吾輩は猫である。名前はまだ無い。 🙂 Широка страна моя родная. " * 9
    texts = [text[start:] for start in range(30)]
    tokenizer = train_tokenizer(["plain english text"] * 9, 300)
    ids = [id for one in texts for id in tokenizer.encode([one])[0].tolist()]
    assert tokenizer.end in ids
    sequences = TokenDataset(token_array(tmp_path, np.array(ids, dtype=np.uint16)), 16)
    held_out = ValidationSet(sequences, 4, None, Console(quiet=True))
    predicted = ids[1 : held_out.tokens + 1]
    text = tokenizer.tokenizer.decode(predicted, skip_special_tokens=True)
    assert held_out.bytes(tokenizer) == pytest.approx(len(text.encode()), abs=3), "except the last character"


def test_processes_share_all_sequences_and_bytes_are_those_of_the_text(settings, tmp_path, cache):
    done = train(*settings, "trainer.max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("runs/main/*")
    result = json.loads((path / "result.json").read_text())
    folder = cache / json.loads((path / "environment.json").read_text())["starts"][0]["data_folder"]
    tokens, tokenizer = open_tokens(folder), load_tokenizer(str(folder))
    sequences = TokenDataset(tokens.test, 64)
    quiet = Console(quiet=True)
    for processes in (1, 2, 3):
        shares = [ValidationSet(sequences, 4, 40 * 64, quiet, rank, processes) for rank in range(processes)]
        assert len({len(share) for share in shares}) == 1
        assert sum(tokens for share in shares for _, tokens in share) == 40 * 64
    text = tokenizer.tokenizer.decode(tokens.test.read(1, result["test_tokens"] + 1).tolist(), skip_special_tokens=True)
    size = ValidationSet(sequences, 4, None, quiet).bytes(tokenizer)
    assert size == pytest.approx(len(text.encode()), abs=3), "except the last character"
    assert result["test_bits_per_byte"] == bits_per_byte(result["test_loss"], result["test_tokens"], size)
    assert bits_per_byte(math.log(2) * 8, 100, 100) == pytest.approx(8.0) and isinstance(size, int)
    assert np.isfinite(result["test_bits_per_byte"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("trainer.val_every=0",), "trainer.val_every=0 is not allowed: it must be an integer from 1, or null"),
        (
            ("eval.tasks=winogrande",),
            "eval.tasks=winogrande is not allowed: it must be a list of tasks, as [hellaswag]",
        ),
        (
            ("trainer.eval_every=5", "eval.tasks=[nothing]"),
            "eval.tasks=nothing is not known: it must be a task of lm-",
        ),
    ],
)
def test_mistakes_are_reported_before_training(overrides, message, settings, tmp_path):
    done = train(*settings, *overrides, cwd=tmp_path)
    assert done.returncode == 2 and f"error: {message}" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("runs/main/*/metrics.jsonl"))
