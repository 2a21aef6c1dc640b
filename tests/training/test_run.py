"""Real runs: they learn, leave a complete run folder, and survive a kill at any moment."""

import io
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models

from common.errors import ConfigError, UserError
from data import TokenDataset, corpus_from, prepare, unigram_entropy
from data.tokenizer import END_OF_TEXT, wrap_tokenizer
from experiments.run.plot import draw_run
from experiments.run.read import corrupted_steps, read_run
from experiments.run.summary import comparison, table
from models import Llama
from tests.helpers import (
    SLOW,
    copy_run,
    final_state,
    kill_after,
    only_run,
    read_jsonl,
    same,
    start,
    train,
    wait_for_steps,
)
from tests.process_pool import run
from training.checkpoint.format import load_model_state
from training.config.compose import read_config
from training.monitor.step_timer import STEP_PHASES
from training.run_dir import RunDir


def test_short_run_beats_unigram_entropy_and_leaves_a_complete_folder(tiny, tmp_path):
    settings = (*tiny, "trainer.max_steps=100", "lr=1e-2")
    done = train(*settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = only_run(tmp_path)
    result = json.loads((path / "result.json").read_text())
    assert result["test_loss"] < result["unigram_entropy"] - 0.1
    assert result["steps"] == 100
    for shown in (
        "test loss",
        "test perplexity",
        "unigram entropy",
        "bits per byte",
        "loss spikes",
        "steps clipped",
        str(path.name),
    ):
        assert shown in done.stdout
    assert "[dim]" not in done.stdout

    assert {p.name for p in path.iterdir() if not p.name.startswith(".")} == {
        "config.yaml", "environment.json", "tokenizer", "metrics.jsonl", "checkpoints", "result.json", "plots"
    }  # fmt: skip
    run = read_run(path)
    assert run.metrics["step"].tolist() == list(range(1, 101))
    assert run.metrics["loss"][0] == pytest.approx(6.24, abs=0.05)
    assert (run.metrics["clipped_norm"] <= run.metrics["grad_norm"]).all()
    assert (path / "plots" / "run.png").stat().st_size > 20_000
    times = run.result["step_seconds"]
    assert min(times.values()) > 0 and max(times, key=times.get) == "forward_backward"
    steps = 1 / (run.metrics["tokens_per_second"] / run.metrics["tokens"][0])
    assert sum(run.metrics[f"{phase}_seconds"].sum() for phase in STEP_PHASES) <= steps.sum() * 1.001
    assert 0.1 < run.result["peak_memory_gib"] < 4 and run.result["mfu"] is None
    (start,) = json.loads((path / "environment.json").read_text())["starts"]
    assert start["versions"]["torch"].startswith("2.") and start["command"][0] == "train.py"

    state = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    again = train(*settings, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "finished already" in again.stdout and "test loss" in again.stdout
    assert state == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


@pytest.mark.parametrize("clip", ["zclip", pytest.param("autoclip", marks=pytest.mark.slow)])
def test_killed_run_resumes_to_identical_result(clip, tiny, tmp_path):
    """The run is killed twice, and accumulates gradients over two micro-batches."""
    settings = tuple(s for s in tiny if clip == "zclip" or not s.startswith("clip."))
    settings = (
        *settings, f"clip={clip}", "trainer.micro_batch_size=4", "trainer.checkpoint_every=7", "trainer.log_every=2"
    )  # fmt: skip
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    for folder in (uninterrupted, killed):
        folder.mkdir()
    done = train(*settings, cwd=uninterrupted)
    assert done.returncode == 0, done.stderr
    for steps in (random.randint(8, 14), random.randint(20, 36)):
        kill_after(steps, *settings, cwd=killed)
    done = train(*settings, cwd=killed)
    assert done.returncode == 0, done.stderr
    assert "continuing" in done.stdout

    checkpoint, rows, test_loss = final_state(uninterrupted)
    other_checkpoint, other_rows, other_test_loss = final_state(killed)
    assert [row["step"] for row in other_rows] == list(range(1, 41))
    assert other_rows == rows
    assert other_test_loss == test_loss
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
        assert same(checkpoint[part], other_checkpoint[part]), part
    assert checkpoint["loops"]["fit_loop"]["state_dict"] == other_checkpoint["loops"]["fit_loop"]["state_dict"]
    clipper = checkpoint["callbacks"]["TimedClippingCallback"]
    assert int(clipper["strategies"][0]["state"]["count"]) == 40


@pytest.mark.slow
def test_streamed_run_equals_prepared_run_and_resumes_when_killed(tiny, tmp_path):
    """With one block, streaming equals preparing. With many blocks, a run killed twice ends as one that was not."""
    settings = (*tiny, "trainer.checkpoint_every=7", "trainer.log_every=2")
    stream = (*settings, "data.mode=stream")
    blocks = (*stream, "data.shuffle_tokens=3000", "trainer.micro_batch_size=4")
    runs = {"prepared": settings, "stream": stream, "uninterrupted": blocks, "killed": blocks}
    for name in runs:
        (tmp_path / name).mkdir()
    for steps in (random.randint(8, 14), random.randint(20, 36)):
        kill_after(steps, *blocks, cwd=tmp_path / "killed")
    for name, overrides in runs.items():
        done = train(*overrides, cwd=tmp_path / name)
        assert done.returncode == 0, done.stderr
    ends = {name: final_state(tmp_path / name) for name in runs}
    for one, other in (("prepared", "stream"), ("uninterrupted", "killed")):
        assert ends[one][1:] == ends[other][1:]
        for part in ("state_dict", "optimizer_states", "callbacks"):
            assert same(ends[one][0][part], ends[other][0][part]), part
    assert ends["uninterrupted"][1] != ends["stream"][1]
    assert ends["uninterrupted"][0]["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["stream"]["block"] > 3


def test_stream_of_text_that_is_edited_stops_and_resumes_once_it_is_restored(tiny, corpus, tmp_path):
    words = " ".join(file.read_text() for file in sorted(corpus.glob("*.txt"))).split()
    text = "\n".join(json.dumps({"text": " ".join(words[i : i + 50])}) for i in range(0, 4000, 50))
    file = tmp_path / "text.jsonl"
    file.write_text(text)
    settings = (*tiny, f"data.path={file}", "data.mode=stream", "data.shuffle_tokens=3000", "trainer.max_steps=60")
    settings += ("trainer.checkpoint_every=10",)
    job = start(*settings, cwd=tmp_path)
    wait_for_steps(job, tmp_path, 12)
    written = file.stat()
    file.write_text(text[:-9] + "x" * 9)  # of the same size and time
    os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
    assert job.wait() == 2
    _, error = job.output()
    sentence = r"error: data\.sources\.text\.path=\S+ has changed since it was opened: .* \(after step (\d+)\)"
    match = re.search(sentence, error)
    assert match and int(match[1]) >= 12 and "Traceback" not in error, error
    done = train(*settings, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "text.jsonl: JSON parse error" in done.stderr
    file.write_text(text)
    done = train(*settings, cwd=tmp_path)
    assert done.returncode == 0 and re.search(r"after step \d+0 of 60", done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize(
    "moments",
    [
        "config mid-save rewriting-metrics line after-save evaluation",
        SLOW(
            "config environment line-before-checkpoint mid-save rewriting-metrics line after-save evaluation evaluation"
        ),
    ],
)
def test_run_killed_at_each_critical_moment_ends_identically(moments, finished_run, tiny, tmp_path):
    """Fault injection kills one run again and again, see fault_injection.py."""
    settings = (*tiny, "trainer.checkpoint_every=8", "trainer.keep_last=9", "trainer.log_every=2")
    for moment in moments.split():
        done = run("tests/training/fault_injection.py", moment, *settings, cwd=tmp_path)
        assert done.returncode == -signal.SIGKILL, f"{moment}: {done.stdout}{done.stderr}"
    done = train(*settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    checkpoint, rows, test_loss = final_state(finished_run.parents[2])
    other_checkpoint, other_rows, other_test_loss = final_state(tmp_path)
    assert other_rows == rows and other_test_loss == test_loss
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
        assert same(checkpoint[part], other_checkpoint[part]), part
    names = [{p.name for p in path.rglob("*")} for path in (finished_run, only_run(tmp_path))]
    assert names[0] == names[1], "no temporary file is left"


def test_damaged_checkpoint_is_skipped(finished_run, tiny, tmp_path):
    path = copy_run(finished_run, tmp_path)
    loss = json.loads((path / "result.json").read_text())["test_loss"]
    (path / "result.json").unlink()
    newest = path / "checkpoints" / "step-00000040.ckpt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    done = train(*tiny, "trainer.checkpoint_every=8", "trainer.keep_last=9", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "is damaged" in done.stdout and "after step 32" in done.stdout, done.stdout
    assert json.loads((path / "result.json").read_text())["test_loss"] == loss


def test_damaged_checkpoint_does_not_displace_newer_ones(finished_run, tiny, tmp_path):
    path = copy_run(finished_run, tmp_path)
    (path / "result.json").unlink()
    for damaged in sorted((path / "checkpoints").iterdir())[1:]:
        damaged.write_bytes(damaged.read_bytes()[:-1000])
    settings = (*tiny, "trainer.keep_last=1")
    job = start(*settings, "trainer.checkpoint_every=4", cwd=tmp_path)
    while job.poll() is None and not (path / "checkpoints" / "step-00000016.ckpt").exists():
        time.sleep(0.002)
    job.kill()
    job.wait()
    done = train(*settings, cwd=tmp_path)
    assert done.returncode == 0 and "is damaged" in done.stdout and "continuing" in done.stdout, done.stderr


def test_run_with_only_damaged_checkpoints_is_left_unchanged(finished_run, tiny, run_in_process, tmp_path):
    path = copy_run(finished_run, tmp_path)
    (path / "result.json").unlink()
    for damaged in (path / "checkpoints").iterdir():
        damaged.write_bytes(damaged.read_bytes()[:-1000])
    before = (path / "metrics.jsonl").read_bytes()
    done = train(*tiny, cwd=tmp_path)
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "has no checkpoint that is undamaged: restore one of" in done.stderr
    assert (path / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(path / "checkpoints")
    _, output = run_in_process(*tiny)
    assert output.startswith("training ") and (path / "metrics.jsonl").read_bytes().count(b"\n") == 40, output


@pytest.mark.parametrize("lines", [0, 25])
def test_lost_metrics_change_no_result(lines, finished_run, tiny, run_in_process, tmp_path):
    """Nothing is left to train, so that the whole file, or its end, comes from the checkpoint."""
    path = copy_run(finished_run, tmp_path)
    before = json.loads((path / "result.json").read_text())
    (path / "result.json").unlink()
    rows = read_jsonl(path / "metrics.jsonl")
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:lines]) + '{"step": 26, "lo')
    result, output = run_in_process(*tiny)
    assert f"{40 - lines} of 40 lines of runs/main/{path.name}/metrics.jsonl are lost: they are written again" in output
    measured = ("tokens_per_second", "step_seconds", "saving_seconds", "peak_memory_gib")
    assert {key: value for key, value in before.items() if key not in measured}.items() <= result.items()
    assert (result["tokens_per_second"] is None) == (lines == 0)
    assert [row["loss"] for row in read_jsonl(path / "metrics.jsonl")] == [row["loss"] for row in rows]
    assert RunDir(path).read_result() == result
    assert table(result, "result").row_count and (path / "plots" / "run.png").exists()


@pytest.fixture
def small_text(corpus, tmp_path) -> Path:
    """A folder with two documents."""
    folder = tmp_path / "text"
    folder.mkdir()
    for file in sorted(corpus.iterdir())[:2]:
        shutil.copy(file, folder)
    return folder


def test_resume_rejects_changed_text(tiny, small_text, run_in_process, tmp_path):
    settings = (*tiny, f"data.path={small_text}", "trainer.max_steps=4")
    run_in_process(*settings)
    (only_run(tmp_path) / "result.json").unlink()
    (small_text / "more.txt").write_text("more text")
    with pytest.raises(UserError, match=r"^the text has changed \(data\.path=\S+, "):
        run_in_process(*settings)


@pytest.mark.parametrize("max_tokens", [None, 2000])
def test_test_loss_is_the_mean_over_held_out_tokens(max_tokens, finished_run, tiny, cache, run_in_process, tmp_path):
    path = finished_run
    if max_tokens is not None:
        run_in_process(*tiny, f"data.max_val_tokens={max_tokens}", "trainer.max_steps=8")
        path = only_run(tmp_path)
    result = json.loads((path / "result.json").read_text())
    config = read_config(path / "config.yaml")
    tokens = prepare(corpus_from(config.data), cache, 64)
    sequences = TokenDataset(tokens.test, 64)
    count = len(sequences) if max_tokens is None else max_tokens // 64
    model = Llama(config.model.llama)
    model.load_state_dict(load_model_state(max((path / "checkpoints").iterdir())))
    with torch.inference_mode():
        batch = sequences.batch(np.arange(count)).long()
        losses = [model(row[None, :-1], row[None, 1:])[1].item() for row in batch]
    assert result["test_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result["test_tokens"] == count * 64
    assert result["unigram_entropy"] == pytest.approx(unigram_entropy(batch[:, 1:].flatten().numpy()))


def test_gradient_accumulation_changes_only_rounding(finished_run, tiny, run_in_process, tmp_path):
    run_in_process(*tiny, "trainer.micro_batch_size=2")
    losses = [read_run(path).metrics["loss"] for path in (finished_run, only_run(tmp_path))]
    assert abs(losses[0] - losses[1]).max() < 1e-3


def test_finished_run_reports_changed_text(tiny, small_text, run_in_process, tmp_path):
    settings = (*tiny, f"data.path={small_text}", "trainer.max_steps=2")
    run_in_process(*settings)
    warning = "the text or tokenizer differs from this run's"
    done = train(*settings, cwd=tmp_path)
    assert "finished already" in done.stdout and warning not in done.stdout, done.stdout + done.stderr
    sorted(small_text.iterdir())[0].write_text("other words " * 100)
    done = train(*settings, cwd=tmp_path)
    assert "finished already" in done.stdout and warning in done.stdout, done.stdout + done.stderr
    shutil.rmtree(small_text)
    run = only_run(tmp_path).relative_to(tmp_path)
    for command in (settings, (*settings, "paths.cache=none"), ("-m", *settings, "paths.cache=none")):
        done = train(*command, cwd=tmp_path)
        assert done.returncode == 0 and "finished already" in done.stdout, done.stdout + done.stderr
    done = train(f"resume={run}", "paths.cache=none", cwd=tmp_path)
    assert done.returncode == 0 and "finished already" in done.stdout, done.stdout + done.stderr
    (tmp_path / run / "result.json").unlink()
    done = train(f"resume={run}", "paths.cache=none", cwd=tmp_path)
    assert done.returncode == 2 and "does not exist" in done.stderr, done.stderr


@pytest.mark.parametrize("lines", [None, b"", b"[]\n"])
def test_finished_run_without_metrics_is_shown_without_its_picture(
    lines, finished_run, tiny, program, checked, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = copy_run(finished_run, tmp_path)
    shutil.rmtree(path / "plots")
    (path / "metrics.jsonl").unlink()
    if lines is not None:
        (path / "metrics.jsonl").write_bytes(lines)
    config, run_dir = checked(*tiny, "trainer.checkpoint_every=8", "trainer.keep_last=9")
    program.report_finished(config, run_dir, Console(file=(output := io.StringIO()), soft_wrap=True))
    assert re.search(r"run\.png cannot be drawn \(.*metrics\.jsonl", output.getvalue()), output.getvalue()


def test_edited_tokenizer_in_the_folder_is_made_that_of_the_tokens_again(finished_run, tiny, cache, checked, tmp_path):
    path = copy_run(finished_run, tmp_path)
    config, run_dir = checked(*tiny, f"paths.runs={tmp_path / 'runs'}")
    tokens = prepare(corpus_from(config.data), cache, config.data.sequence_length)
    file = path / "tokenizer" / "tokenizer.json"
    before = file.read_text()
    file.write_text(before.replace('"of"', '"fo"') + "\n")
    assert run_dir.path == path
    with run_dir.acquire(config, tokens):
        assert file.read_text() == before


def test_checkpoints_that_cannot_be_read_are_not_taken_for_none(finished_run, tmp_path, monkeypatch):
    path = copy_run(finished_run, tmp_path)

    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(PermissionError, match="checkpoints"):
        RunDir(path).checkpoint_steps()


def test_second_process_cannot_train_the_same_run(tiny, run_in_process, tmp_path):
    settings = (*tiny, "trainer.max_steps=100000", "trainer.log_every=1")
    process = start(*settings, cwd=tmp_path)
    try:
        while not list(tmp_path.glob("runs/main/*/metrics.jsonl")):
            assert process.poll() is None, process.output()
            time.sleep(0.05)
        with pytest.raises(UserError, match=r"^another process is training"):
            run_in_process(*settings)
    finally:
        process.kill()
        process.wait()


def test_sweep_trains_each_combination_once(tiny, tmp_path):
    settings = (*(s for s in tiny if not s.startswith("clip.")), "trainer.max_steps=3")
    sweep = ("-m", "clip=none,zclip", "lr=1e-3,3e-3", *settings)
    done = train(*sweep, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = sorted((tmp_path / "runs" / "main").glob("micro-*"))
    assert len(runs) == 4 and all((run / "result.json").exists() for run in runs)
    again = train(*sweep, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished already") == 4
    summary = again.stdout[again.stdout.index("sweep\n" if "sweep\n" in again.stdout else "sweep ") :]
    for cell in ("clip", "none", "zclip", "lr", "0.001", "0.003", "loss"):
        assert cell in summary


def test_diverging_run_ends_with_a_result(diverged_run):
    result = json.loads((diverged_run / "result.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert result["test_loss"] is None or result["test_loss"] > result["unigram_entropy"]
    out = io.StringIO()
    Console(file=out, width=100).print(table(result, title="result"))
    assert result["skipped"] > 30 and "norm not finite" in out.getvalue()
    rows = read_jsonl(diverged_run / "metrics.jsonl")
    assert len(rows) == 40 and rows[-1]["grad_norm"] is None and rows[-1]["nonfinite"] == result["skipped"]


def test_wandb_is_imported_only_when_chosen_and_each_job_of_a_sweep_has_its_own_run(tiny, tmp_path):
    program, settings = "tests/training/imported_modules.py", (*tiny, "trainer.max_steps=2")
    done = run(program, *settings, "name=jsonl", cwd=tmp_path)
    assert done.returncode == 0 and "wandb is imported: False" in done.stdout, done.stdout + done.stderr
    shutil.rmtree(only_run(tmp_path))
    scored = ("trainer.eval_every=2", "eval.tasks=[last_word]", "eval.limit=3", "logger=wandb")
    done = run(program, "-m", "seed=0,1", *scored, *settings, cwd=tmp_path, env={"WANDB_MODE": "offline"})
    assert done.returncode == 0 and "wandb is imported: True" in done.stdout, done.stdout + done.stderr
    runs = list((tmp_path / "runs" / "main").glob("micro-*"))
    assert len(runs) == 2
    for path in runs:
        (file,) = path.glob("wandb/offline-run-*/run-*.wandb")
        assert path.name in file.name
        for name in (b"test_loss", b"last_word/loss", b"last_word/loss_stderr", b"last_word/acc_stderr"):
            assert re.search(name + rb"\W", file.read_bytes()), name


def test_corrupted_batches_are_injected_and_reported(finished_run, tiny, tmp_path):
    corruption = ("data.corruption.steps=[20,30]", "data.corruption.kind=random")
    done = train(*tiny, *corruption, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"corrupted batches\s+│ 2 random", done.stdout)
    rows = read_jsonl(only_run(tmp_path) / "metrics.jsonl")
    loss = [row["loss"] for row in rows]
    assert all(loss[step - 1] > loss[step - 2] + 0.3 for step in (20, 30)), "random tokens are not learned"
    results = [
        ({"data.corruption.steps": steps}, json.loads((path / "result.json").read_text()))
        for steps, path in (("[]", finished_run), ("[20,30]", only_run(tmp_path)))
    ]
    out = io.StringIO()
    Console(file=out, width=200).print(comparison(results))
    assert "2 random" in out.getvalue() and "none" in out.getvalue(), out.getvalue()


def test_drawn_batches_are_those_that_readers_name(tiny, run_in_process, tmp_path):
    """The readers know the run by its folder alone. Bursts of random tokens are those steps whose loss rises."""
    drawn = ("data.corruption.random_steps=6", "data.corruption.burst_length=2", "data.corruption.random_first_step=12")
    run_in_process(*tiny, *drawn, "data.corruption.kind=random", "seed=3")
    run = read_run(only_run(tmp_path))
    steps = corrupted_steps(run)
    rises = [step for step in range(12, 41) if run.metrics["loss"][step - 1] > run.metrics["loss"][step - 2] + 0.3]
    assert len(steps) == 6 and rises == steps[::2], "each burst begins with a rise"
    assert run.result["corrupted_batches"] == 6 and run.result["corruption_kind"] == "random"
    marked = [line for line in draw_run(run).axes[0].lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in marked] == steps


def test_tokenizer_without_foreign_letters_is_reported_before_the_run(tiny, run_in_process, tmp_path):
    letters = {chr(i): i - 32 for i in range(32, 127)} | {END_OF_TEXT: 95}
    (tmp_path / "tokenizer").mkdir()
    wrap_tokenizer(Tokenizer(models.BPE(letters, [])), end=95).save(tmp_path / "tokenizer")
    overrides = ("data.tokenizer=tokenizer", "data.corruption.steps=[2]", "data.corruption.kind=foreign_script")
    problem = "is not possible: the tokenizer has no tokens for letters of other scripts"
    with pytest.raises(ConfigError, match=rf"^data\.corruption\.kind=foreign_script {problem}$"):
        run_in_process(*tiny, *overrides)
    assert not (tmp_path / "runs").exists()
