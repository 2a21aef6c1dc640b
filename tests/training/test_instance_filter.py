"""Masked sequences do not contribute to the loss, in any mode of training, and a step without any other is skipped."""

import io
import json

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from data import Batch
from experiments.run.plot import draw_run
from experiments.run.read import read_run
from experiments.run.summary import table
from tests.helpers import SLOW, compose_config, only_run, read_jsonl, train, train_to_end
from training.checkpoint.fork import find_fork_source
from training.checkpoint.format import load_model_state
from training.checkpoint.state import find_problem
from training.module import PretrainingModule
from training.run_dir import RunDir

FILTER = "data.instance_filter.enabled=true"
#: A filter that masks ordinary text: rows that have a token twice in a row.
STRICT = (FILTER, "data.instance_filter.repetition_max_period=1", "data.instance_filter.repetition_max_count=2")


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_loss_and_gradient_are_those_of_the_mean_over_the_other_rows(micro, tiny):
    """The oracle is one batch of the rows that are not masked, with torch's own cross entropy."""
    config = compose_config(*tiny, "optim.z_loss=1e-2")
    module = PretrainingModule(config, fresh=True)
    module.configure_model()
    torch.manual_seed(0)
    rows = torch.randint(0, 512, (8, 65))
    mask = torch.tensor([True, False, True, True, False, False, True, True])
    logits = module.model(rows[mask, :-1]).flatten(0, 1)
    cross_entropy = F.cross_entropy(logits, rows[mask, 1:].flatten())
    (cross_entropy + 1e-2 * logits.logsumexp(-1).square().mean()).backward()
    expected = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    recorded = []
    for start in range(0, 8, micro):
        own = slice(start, start + micro)
        outputs = module.training_step(Batch(rows[own], None, mask[own], masked_rows=3), 0)
        (outputs["loss"] / (8 // micro)).backward()
        recorded.append(outputs["cross_entropy"])
    torch.testing.assert_close(torch.stack(recorded).mean(), cross_entropy.detach())
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_step_whose_rows_are_all_masked_changes_nothing(tiny, run_in_process, tmp_path):
    """Neither the weights nor what optimizer, clipper and update rule know. It may be the first step."""
    settings = ("trainer.max_steps=12", "trainer.checkpoint_every=1", "trainer.keep_last=12", "update=brake")
    corruption = ("data.corruption.steps=[1,10]", "data.corruption.kind=repeat")
    result, _ = run_in_process(*tiny, *settings, *corruption, FILTER)
    path = only_run(tmp_path)
    rows = read_jsonl(path / "metrics.jsonl")
    assert [row["masked_rows"] for row in rows] == [8 if row["step"] in (1, 10) else 0 for row in rows]
    for row in (rows[0], rows[9]):
        assert (row["grad_norm"], row["clipped_norm"], row["clipped"], row.get("z")) == (0, 0, 0, None)
        assert row.get("update_norm") is None and row["loss"] > 1, "the loss of the masked rows is recorded"
    before, after = (RunDir(path).checkpoint(step) for step in (9, 10))
    assert same(load_model_state(before), load_model_state(after))
    one, other = (torch.load(file, weights_only=True) for file in (before, after))
    assert same(*(checkpoint["optimizer_states"][0]["state"] for checkpoint in (one, other)))
    assert one["loops"]["fit_loop"] != other["loops"]["fit_loop"], "the step counts, as for the schedule"
    assert find_problem(after) is None
    callbacks = [name for name in one["callbacks"] if "Clipping" in name or "Update" in name]
    assert len(callbacks) == 2 and all(same(one["callbacks"][name], other["callbacks"][name]) for name in callbacks)
    assert not same(load_model_state(after), load_model_state(RunDir(path).checkpoint(11)))
    assert (result["masked_rows"], result["masked_steps"], result["skipped"]) == (16, 2, 0)
    out = io.StringIO()
    Console(file=out, width=150).print(table(json.loads((path / "result.json").read_text()), "t"))
    assert "sequences masked" in out.getvalue() and "16" in out.getvalue()
    assert "2 steps skipped, all rows masked" in out.getvalue() and len(draw_run(read_run(path)).axes) >= 4


def same(one, other) -> bool:
    """Whether two nested states hold the same numbers."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) or bool((one.isnan() & other.isnan()).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_run_without_masked_rows_is_the_same_with_the_filter(finished_run, tiny, run_in_process, tmp_path):
    result, _ = run_in_process(*tiny, FILTER)
    expected = json.loads((finished_run / "result.json").read_text())
    assert result["test_loss"] == expected["test_loss"] and result["masked_rows"] == 0
    assert expected["masked_rows"] is None, "there was no filter"
    plain = [row["loss"] for row in read_jsonl(finished_run / "metrics.jsonl")]
    assert [row["loss"] for row in read_jsonl(only_run(tmp_path) / "metrics.jsonl")] == plain


@pytest.mark.parametrize(
    "mode",
    [
        ("trainer.micro_batch_size=2",),
        ("trainer.strategy=ddp", "trainer.devices=2", "trainer.micro_batch_size=2", "data.mode=stream"),
        SLOW(("trainer.strategy=fsdp", "trainer.devices=2", "trainer.micro_batch_size=1")),
        SLOW(("trainer.strategy=fsdp", "trainer.devices=2", "trainer.micro_batch_size=2", "trainer.compile=true")),
    ],
    ids=["accumulated", "ddp-streamed", "fsdp-accumulated", "fsdp-compiled"],
)
def test_modes_mask_the_same_rows_and_have_the_same_losses(mode, tiny, once, tmp_path):
    settings = (*tiny, *STRICT, "trainer.max_steps=16", "lr=1e-3", "clip.max_grad_norm=null")
    one = read_jsonl(only_run(once("filtered", lambda folder: train_to_end(*settings, cwd=folder))) / "metrics.jsonl")
    assert any(0 < row["masked_rows"] < 8 for row in one)
    done = train(*settings, *mode, cwd=tmp_path, processes=2 if "trainer.devices=2" in mode else 1)
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(only_run(tmp_path) / "metrics.jsonl")
    assert [row["masked_rows"] for row in rows] == [row["masked_rows"] for row in one]
    for row, reference in zip(rows, one, strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-3)


def test_fork_may_have_another_filter(finished_run, tiny, tmp_path):
    """The sequences are the same ones."""
    config = compose_config(*tiny, FILTER, "name=new", f"fork_from={finished_run}@16")
    assert find_fork_source(config, RunDir(tmp_path / "new")).step == 16
