"""Training with Accelerate equals a plain loop, with accumulation and wrapped optimizers."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.helpers import same
from tests.zclip.reference_loop import STEPS, assert_same_weights, batch, build_model, train_plain
from zclip import ZClip
from zclip.updates import UpdateClip


@pytest.fixture
def accelerator():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    yield accelerator
    accelerator.free_memory()


def train(accelerator: Accelerator, model: nn.Module, optimizer, zclip: ZClip, steps: range, attached: bool) -> None:
    """Train on two micro-batches a step."""
    for t in steps:
        for micro_batch in batch(t).chunk(2):
            with accelerator.accumulate(model):
                accelerator.backward(model(micro_batch).square().mean())
                if accelerator.sync_gradients and not attached:
                    zclip.step(model, optimizer=optimizer)
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_training_and_resuming_match_the_plain_loop(accelerator, attached, fused, tmp_path):
    expected = build_model()
    expected_zclip = train_plain(expected, torch.optim.AdamW(expected.parameters(), lr=0.01))
    model, zclip = build_model(), ZClip(warmup_steps=5, z_thresh=2.0)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused))
    accelerator.register_for_checkpointing(zclip)
    if attached:
        zclip.attach(optimizer, model)
    train(accelerator, model, optimizer, zclip, range(15), attached)
    accelerator.save_state(tmp_path)
    train(accelerator, model, optimizer, zclip, range(15, STEPS), attached)
    assert_same_weights(model, expected)
    torch.testing.assert_close(zclip.state["mean"], expected_zclip.state["mean"])
    assert zclip.state["count"] == STEPS

    uninterrupted = [p.detach().clone() for p in model.parameters()]
    accelerator.load_state(tmp_path)
    assert zclip.state["count"] == 15
    train(accelerator, model, optimizer, zclip, range(15, STEPS), attached)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), uninterrupted, strict=True))


def test_wrapped_fused_optimizer_applies_the_decision(accelerator):
    model = build_model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), fused=True))
    accelerator.backward(model(batch(0)).square().mean())
    before = [p.detach().clone() for p in model.parameters()]
    next(model.parameters()).grad[0, 0] = float("nan")
    ZClip().step(model, optimizer=optimizer)
    assert next(model.parameters()).grad[0, 0].isnan(), "the gradients are unchanged"
    accelerator.gradient_state._set_sync_gradients(True)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_rule_over_updates_sees_each_step_once_and_is_saved(accelerator, tmp_path):
    weights, rules = {}, {}
    for name in ("plain", "accelerate"):
        model, rule, zclip = build_model(), UpdateClip(sigmas=0.5, window=8), ZClip(warmup_steps=5, z_thresh=2.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if name == "plain":
            rule.attach(optimizer)
            train_plain(model, optimizer)
        else:
            prepared, wrapped = accelerator.prepare(model, optimizer)
            accelerator.register_for_checkpointing(rule)
            rule.attach(wrapped)
            train(accelerator, prepared, wrapped, zclip, range(STEPS), attached=False)
        weights[name], rules[name] = model, rule
    assert int(rules["accelerate"].state["count"]) == STEPS
    assert rules["plain"].read_telemetry() == pytest.approx(rules["accelerate"].read_telemetry(), rel=1e-4)
    assert_same_weights(weights["accelerate"], weights["plain"], rtol=1e-4, atol=1e-6)
    accelerator.save_state(tmp_path / "state")
    before = rules["accelerate"].state_dict()
    rules["accelerate"].observe(5.0)
    accelerator.load_state(tmp_path / "state")
    assert same(rules["accelerate"].state_dict(), before)
