"""Under Accelerate training is that of a plain loop, accumulation and wrapped optimizers included."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.zclip.reference_loop import STEPS, assert_same, batch, build, plain
from zclip import ZClip


@pytest.fixture
def accelerator():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    yield accelerator
    accelerator.free_memory()


def train(accelerator: Accelerator, model: nn.Module, optimizer, zclip: ZClip, steps: range) -> list[float]:
    """Train on two micro-batches a step; return the norms."""
    norms = []
    for t in steps:
        for half in batch(t).chunk(2):
            with accelerator.accumulate(model):
                accelerator.backward(model(half).square().mean())
                if accelerator.sync_gradients:
                    norms.append(float(zclip.step(model, optimizer=optimizer)))
                optimizer.step()
                optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("fused", [False, True])
def test_training_and_resuming(accelerator, fused, tmp_path):
    wanted = build()
    clipper = plain(wanted, torch.optim.AdamW(wanted.parameters(), lr=0.01))
    model, zclip = build(), ZClip(warmup_steps=5, z_thresh=2.0)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused))
    accelerator.register_for_checkpointing(zclip)
    train(accelerator, model, optimizer, zclip, range(15))
    accelerator.save_state(tmp_path)
    train(accelerator, model, optimizer, zclip, range(15, STEPS))
    assert_same(model, wanted)
    torch.testing.assert_close(zclip.state["mean"], clipper.state["mean"])
    assert zclip.state["count"] == STEPS

    first = [p.detach().clone() for p in model.parameters()]
    accelerator.load_state(tmp_path)
    assert zclip.state["count"] == 15
    train(accelerator, model, optimizer, zclip, range(15, STEPS))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), first, strict=True))


def test_a_wrapped_fused_optimizer_gets_the_decision(accelerator):
    model = build()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), fused=True))
    accelerator.backward(model(batch(0)).square().mean())
    before = [p.detach().clone() for p in model.parameters()]
    next(model.parameters()).grad[0, 0] = float("nan")
    ZClip().step(model, optimizer=optimizer)
    assert next(model.parameters()).grad[0, 0].isnan(), "the gradients are not touched"
    accelerator.gradient_state._set_sync_gradients(True)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
