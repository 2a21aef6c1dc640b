"""What is clipped is what the optimizer steps with: every gradient, also that of a parameter frozen after backward."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.helpers import same
from tests.zclip.every_strategy import CLASSES
from zclip import (
    AdaGC,
    ClippingCallback,
    ClippingStrategy,
    FixedNorm,
)

EACH = pytest.mark.parametrize("make", CLASSES)


def model_with_gradients(frozen: bool, scale: float = 5.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    for p in model.parameters():
        p.grad = scale * torch.randn_like(p)
    model[0].weight.requires_grad_(not frozen)
    return model


def after_steps(make, frozen: bool, **optimizer) -> tuple[dict, dict, list[torch.Tensor]]:
    """Weights, telemetry and gradients after three steps, in which a parameter is trained, or frozen after backward."""
    strategy = make()
    for t in range(3):
        model = model_with_gradients(frozen, 1.0 + t)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0, **optimizer)
        strategy.step(model, optimizer=sgd if optimizer else None)
        sgd.step()
    return model.state_dict(), strategy.read_telemetry(), [p.grad for p in model.parameters()]


@EACH
@pytest.mark.parametrize("optimizer", [{}, {"fused": False}, {"fused": True}], ids=["alone", "plain", "fused"])
def test_gradient_of_a_parameter_frozen_after_backward_is_clipped(make, optimizer):
    trained, frozen = after_steps(make, frozen=False, **optimizer), after_steps(make, frozen=True, **optimizer)
    assert same(trained[0], frozen[0]), "the weights"
    assert str(trained[1]) == str(frozen[1]), "the telemetry"
    assert same(trained[2], frozen[2]), "the gradients"


def test_frozen_gradients_are_clipped_as_torch_clips_them():
    ours, theirs = model_with_gradients(True), model_with_gradients(True)
    norm = FixedNorm(0.1).step(ours)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-8)


@EACH
def test_module_whose_only_gradients_are_of_frozen_parameters_is_clipped(make):
    model = nn.Linear(3, 2)
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
        p.requires_grad_(False)
    strategy = make(on_nonfinite="zero")
    assert float(strategy.step(model)) == pytest.approx(100 * 8**0.5)
    model.bias.grad.fill_(torch.nan)
    strategy.step(model)
    assert not model.bias.grad.any() and not model.weight.grad.any()


@EACH
def test_frozen_weights_without_gradients_and_quantized_ones_are_left_alone(make):
    """They change neither decisions nor gradients of the others, whatever they are."""
    strategy, other = make(), make()
    for t in range(3):
        model, expected = model_with_gradients(False, 1.0 + t), model_with_gradients(False, 1.0 + t)
        model.base = nn.Linear(3, 3).requires_grad_(False)
        model.base.weight.data.fill_(torch.nan)
        model.quantized = nn.Parameter(torch.ones(4, dtype=torch.uint8), requires_grad=False)
        model.wave = nn.Parameter(torch.ones(4, dtype=torch.complex64), requires_grad=False)
        model.meta = nn.Parameter(torch.ones(4, device="meta"), requires_grad=False)
        torch.testing.assert_close(strategy.step(model), other.step(expected))
        for p, q in zip(expected.parameters(), (*model[0].parameters(), *model[1].parameters()), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    assert all(p.grad is None for p in model.base.parameters())


def test_optimizer_that_steps_with_a_frozen_gradient_of_another_module_is_not_fused():
    """Its gradients are scaled in place: those that were not given must stay as they are."""
    model, other = model_with_gradients(False), model_with_gradients(True)
    other[0].bias.grad = other[1].weight.grad = other[1].bias.grad = None
    for p in other.parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=1.0, fused=True)
    before = copy.deepcopy(other[0].weight.detach()), other[0].weight.grad.clone()
    FixedNorm(1e-3).step(model, optimizer=optimizer)
    optimizer.step()
    torch.testing.assert_close(other[0].weight.detach(), before[0] - before[1])
    assert sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5 == pytest.approx(1e-3, rel=1e-2)


class FreezesAfterBackward(pl.LightningModule):
    """Freezes a parameter after backward; its optimizer steps with the gradient that is left."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model_with_gradients(False)

    def training_step(self, x, index):
        return self.net(x).square().mean() * 1e4

    def on_after_backward(self):
        self.net[0].weight.requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("strategy", [FixedNorm(1e-3), AdaGC(lambda_abs=1e-3)], ids=["fixed", "adagc"])
def test_lightning_clips_what_its_optimizer_steps_with(strategy: ClippingStrategy, tmp_path):
    module = FreezesAfterBackward()
    before = [p.detach().clone() for p in module.parameters()]
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, callbacks=[ClippingCallback(strategy)], logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader([torch.ones(2, 4)], batch_size=None))
    moved = [(p.detach() - q).square().sum() for p, q in zip(module.parameters(), before, strict=True)]
    assert float(sum(moved)) ** 0.5 == pytest.approx(1e-3, rel=1e-2) and moved[0] > 0
