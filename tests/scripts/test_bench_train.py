"""The benchmark of training runs to its end, and reports errors in one sentence. Its numbers decide nothing here."""

import copy
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from common.errors import UserError
from common.settings import parse
from tests.helpers import SLOW, TINY, compose_config, script
from tests.scripts.loading import load_script


@pytest.mark.slow
def test_our_contenders_are_timed_in_processes_of_their_own(corpus, cache, tmp_path, monkeypatch, capfd):
    """On the text of the tests; the whole text takes ten seconds to prepare."""
    bench_train = load_script("bench_train")
    small = (f"data.path={corpus}", f"paths.cache={cache}")
    monkeypatch.setattr(bench_train, "specification", partial(bench_train.specification, extra=small))
    monkeypatch.chdir(tmp_path)
    bench_train.main(
        {"model": "nano", "batch": 1, "length": 16, "steps": 5, "rounds": 2, "compile": False, "peers": "none"}
    )
    out, err = capfd.readouterr()
    row = r"│ (train.py, ZClip|our model, bare loop) +│ +([\d,]+) │ +([\d.]+) \(.*?\) │ +\d+% │ +0.\d │ +\d.\d\d │"
    rows = re.findall(row, out)
    assert [row[0] for row in rows] == ["train.py, ZClip", "our model, bare loop"], out + err
    assert rows[0][2] == "1.00" and all(int(row[1].replace(",", "")) > 0 for row in rows)
    assert "0.6M parameters, 1 x 16 tokens" in out and "matrix product: " in out
    assert not [*tmp_path.iterdir()]


#: A program in place of the worker: it notes its turns, and fails if it has no times for a round.
WORKER = """
import json, sys
name, spec = sys.argv[1], json.load(open(sys.argv[2]))
times = spec["times"][name]
if not times:
    sys.exit("some line\\nModuleNotFoundError: No module named 'litgpt'")
print(json.dumps({"seconds": 9}), flush=True)
for _ in sys.stdin:
    with open(spec["folder"] + "/turns", "a") as turns:
        print(name, file=turns)
    if not times:
        sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate\\nand more")
    print(json.dumps({"seconds": times.pop(0), "loss": 2.5, "memory": 3 << 29}), flush=True)
"""


def test_contenders_take_turns_and_failures_are_shown(tmp_path, monkeypatch):
    bench_train = load_script("bench_train")
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(bench_train, "WORKER", tmp_path / "worker.py")
    rates = iter([1e6, 2e6, 3e6])
    monkeypatch.setattr(bench_train, "matmul_rate", lambda: next(rates))
    times = {"ours": [4, 2, 2], "bare": [1, 4, 1], "transformers": [5], "litgpt": []}
    spec = {
        "folder": str(tmp_path),
        "times": times,
        "overrides": ["lr=1"],
        "parameters": 2e6,
        "flops": 500,
        "peak": 1e4,
    }
    contenders = [bench_train.Contender(name, False, sys.executable, spec) for name in times]
    rate = bench_train.run_rounds(contenders, 3)
    assert rate == 2e6 and all(contender.process is None for contender in contenders)
    turns = (tmp_path / "turns").read_text().split()
    assert turns == ["ours", "bare", "transformers", "bare", "transformers", "ours", "ours", "bare"]
    written = json.loads((tmp_path / "bare.json").read_text())
    assert written["overrides"] == ["lr=1", "name=bare"] and written["compile"] is False
    config, out = parse(bench_train.BenchTrainConfig, {"steps": 5, "batch": 4, "length": 100}), io.StringIO()
    bench_train.print_results(config, spec, contenders, rate, Console(file=out, width=160))
    rows = [re.split(r" *│ *", line)[1:-1] for line in out.getvalue().splitlines() if line.startswith("│")]
    assert rows == [
        ["train.py, ZClip", "1,000", "1.00 (1.00 to 1.00)", "25%", "10.0%", "1.5", "2.50"],
        ["our model, bare loop", "2,000", "0.50 (0.25 to 2.00)", "50%", "20.0%", "1.5", "2.50"],
        ["transformers, bare loop", "out of memory", "", "", "", "", ""],
        ["litgpt, its loop", "ModuleNotFoundError: No module named 'litgpt'", "", "", "", "", ""],
    ], out.getvalue()
    assert "2.0M parameters, 4 x 100 tokens" in out.getvalue() and "eager " in out.getvalue()


@pytest.fixture
def worker(monkeypatch) -> Iterator[ModuleType]:
    """The worker as a module: it reads that two more rounds are wanted, and ends with SystemExit."""
    standard_output = os.dup(1)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n"))
    monkeypatch.setattr("os._exit", sys.exit)
    try:
        yield load_script("bench_worker")
    finally:  # the reports go to the standard output, and what is printed to the standard error
        os.dup2(standard_output, 1)
        os.close(standard_output)


def reports_of(capfd: pytest.CaptureFixture[str]) -> list[dict[str, float]]:
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def test_worker_reports_the_loss_at_the_end_of_each_round(worker, monkeypatch, capfd):
    rounds = worker.Rounds({"steps": 3, "device": "cpu"})
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: 2.5 * rounds.steps_done))
    with pytest.raises(SystemExit):
        for step in itertools.count(1):
            rounds.step_done(torch.tensor(float(step)))
    reports = reports_of(capfd)
    assert [(report["loss"], report["seconds"]) for report in reports] == [(3, 7.5), (6, 7.5), (9, 7.5)]
    assert all(report["memory"] > 2**24 for report in reports)


def test_plain_loop_predicts_the_next_token_of_each_batch_in_turn(worker, tmp_path, capfd):
    """Its losses are those of AdamW, step by step."""
    np.save(tmp_path / "batches.npy", np.random.default_rng(0).integers(0, 8, (2, 3, 5)).astype(np.int32))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(8, 8), torch.nn.Linear(8, 8))
    reference = copy.deepcopy(model)

    def loss_of(net: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(net(tokens).flatten(0, 1), targets.flatten())

    with pytest.raises(SystemExit):
        worker.plain_loop(
            model, partial(loss_of, model), {"steps": 1, "device": "cpu", "lr": 0.1, "folder": str(tmp_path)}
        )
    optimizer, losses = torch.optim.AdamW(reference.parameters(), lr=0.1), []
    for batch in np.load(tmp_path / "batches.npy")[[0, 1, 0]].astype(np.int64):
        loss = loss_of(reference, torch.from_numpy(batch[:, :-1]), torch.from_numpy(batch[:, 1:]))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [report["loss"] for report in reports_of(capfd)] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("contender", ["bare", "transformers"])
def test_contenders_have_the_same_loss(contender, worker, monkeypatch):
    loops: list[tuple] = []
    monkeypatch.setattr(worker, "plain_loop", lambda *arguments: loops.append(arguments))
    config = compose_config(*TINY).model
    getattr(worker, contender)({"model": config.shape, "parameters": config.parameters, "compile": False})
    ((model, loss_of, _),) = loops
    batch = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(0))
    tokens, targets = batch[:, :-1], batch[:, 1:].contiguous()
    output = model(tokens)
    logits = output if contender == "bare" else output.logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss_of(tokens, targets), expected)


def test_models_of_the_peers_have_as_many_parameters():
    check_size = load_script("bench_worker").check_size
    check_size(torch.nn.Linear(2, 3), {"parameters": 9})
    with pytest.raises(ValueError, match=r"^this model has 9 parameters, ours 1,000$"):
        check_size(torch.nn.Linear(2, 3), {"parameters": 1000})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 7}, "steps=7 is not allowed: it must be a multiple of 5"),
        (
            {"only": "ours,theirs"},
            "only=ours,theirs is not allowed: it must be some of ours, bare, transformers, litgpt",
        ),
        ({"only": "litgpt", "peers": "none"}, "only=litgpt is not possible with peers=none: they are peers"),
        ({"rounds": 0}, "rounds=0 is not allowed: it must be an integer from 1"),
    ],
)
def test_settings_that_cannot_be_measured_are_named(values, message):
    with pytest.raises(UserError) as error:
        parse(load_script("bench_train").BenchTrainConfig, values)
    assert str(error.value).startswith(message)


def test_peers_can_be_omitted():
    config = load_script("bench_train").BenchTrainConfig
    assert parse(config, {"peers": "none"}).contenders == ["ours", "bare"]
    assert parse(config, {"only": "litgpt,ours", "peers": "python"}).contenders == ["litgpt", "ours"]


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
