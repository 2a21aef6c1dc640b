"""The Lightning callbacks train like a plain loop: one optimizer or two, fused or not, in bf16 and fp16, resumed."""

import os

import lightning.pytorch as pl
import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.utils.data import DataLoader

from tests.conftest import same
from tests.zclip.reference_loop import STEPS, assert_same, batch, build, free_port, plain
from zclip import ClippingCallback, SkipStep, ZClip, ZClipLightningCallback


class Automatic(pl.LightningModule):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.net = build()
        self.fused = fused

    def training_step(self, x, index):
        return self.net(x).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=self.fused)


class TwoOptimizers(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.other = build(), build()

    def training_step(self, x, index):
        for net, optimizer, factor in zip((self.net, self.other), self.optimizers(), (1.0, 3.0), strict=True):
            loss = factor * net(x).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [
            torch.optim.AdamW(self.net.parameters(), lr=0.01, fused=True),
            torch.optim.SGD(self.other.parameters(), lr=0.1),
        ]


def fit(module: pl.LightningModule, folder, callback=None, **settings):
    callback = callback or ZClipLightningCallback(warmup_steps=5, z_thresh=2.0)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[callback], logger=False, default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip
    trainer.fit(module, DataLoader([batch(t) for t in range(STEPS)], batch_size=None))
    return trainer, callback


@pytest.mark.parametrize("fused", [False, True])
def test_automatic_optimization(fused, tmp_path):
    module = Automatic(fused)
    _, callback = fit(module, tmp_path)
    model = build()
    zclip = plain(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    assert_same(module.net, model)
    torch.testing.assert_close(callback.zclip.state["mean"], zclip.state["mean"])


def test_two_optimizers_have_statistics_of_their_own(tmp_path):
    module = TwoOptimizers()
    _, callback = fit(module, tmp_path)
    models = build(), build()
    one = plain(models[0], torch.optim.AdamW(models[0].parameters(), lr=0.01))
    two = plain(models[1], torch.optim.SGD(models[1].parameters(), lr=0.1), factor=3.0)
    assert_same(module.net, models[0])
    assert_same(module.other, models[1])
    for strategy, wanted in zip(callback.strategies, (one, two), strict=True):
        assert int(strategy.state["count"]) == STEPS
        torch.testing.assert_close(strategy.state["mean"], wanted.state["mean"])
    assert not torch.allclose(callback.strategies[0].state["mean"], callback.strategies[1].state["mean"])


def test_statistics_travel_in_the_checkpoint(tmp_path):
    trainer, callback = fit(TwoOptimizers(), tmp_path)
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    other = ZClipLightningCallback(warmup_steps=5, z_thresh=2.0)
    state = torch.load(tmp_path / "all.ckpt", weights_only=False)["callbacks"]
    other.load_state_dict(state[callback.state_key])
    for one, two in zip(callback.strategies, other.strategies, strict=True):
        assert all(torch.equal(one.state[key], two.state[key]) for key in one.state)


def test_bf16_mixed_with_a_fused_optimizer_trains(tmp_path):
    module = Automatic(fused=True)
    before = torch.cat([p.detach().flatten() for p in module.parameters()])
    _, callback = fit(module, tmp_path, precision="bf16-mixed")
    after = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    assert int(callback.zclip.state["count"]) == STEPS


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_mixed(fused, tmp_path):
    """The scale starts too high: the first steps overflow, and are neither taken nor counted in the statistics."""
    module, scale = Automatic(fused), 2.0**21
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))
    _, callback = fit(module, tmp_path, plugins=[plugin])
    overflows = callback.zclip.read_telemetry()["nonfinite"]
    assert 1 <= overflows <= STEPS / 2 and callback.zclip.state["count"] == STEPS - overflows

    model, scaler, zclip = build(), torch.amp.GradScaler("cpu", init_scale=scale), ZClip(warmup_steps=5, z_thresh=2.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for t in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(batch(t)).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        zclip.step(model)
        scaler.step(optimizer)
        scaler.update()
    assert_same(module.net, model)
    assert plugin.scaler.get_scale() == scaler.get_scale() < scale
    torch.testing.assert_close(callback.zclip.state["mean"], zclip.state["mean"])


def test_skip_step_sees_the_loss_of_the_whole_batch(tmp_path):
    callback = ClippingCallback(SkipStep(window=8))
    losses = []

    class Recorded(Automatic):
        def training_step(self, x, index):
            loss = super().training_step(x, index)
            losses.append(loss.item())
            return loss

    fit(Recorded(fused=True), tmp_path, callback=callback, accumulate_grad_batches=2)
    means = torch.tensor(losses).view(-1, 2).mean(dim=1)
    torch.testing.assert_close(callback.strategy.state["losses"].float(), means[-8:].roll(len(means) % 8))


def test_a_training_step_that_returns_none_is_left_out(tmp_path):
    class Sometimes(Automatic):
        def training_step(self, x, index):
            return None if index % 3 == 1 else super().training_step(x, index)

    _, callback = fit(Sometimes(fused=True), tmp_path)
    assert int(callback.zclip.state["count"]) == STEPS * 2 // 3


def test_a_trainer_that_clips_as_well_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"gradient_clip_val=1\.0 is not allowed"):
        fit(Automatic(fused=False), tmp_path, gradient_clip_val=1.0)


def test_two_callbacks_and_a_class_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"takes a strategy, such as ZClip\(\), not <class"):
        ClippingCallback(ZClip)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[ZClipLightningCallback(), ClippingCallback(ZClip())], default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match="two clipping callbacks clip for one Trainer"):
        trainer.fit(Automatic(fused=False), DataLoader([batch(0)], batch_size=None))


def test_deepspeed_is_refused(tmp_path):
    """Its strategy cannot be made without the package; a Trainer is given an empty one."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer._accelerator_connector.strategy = object.__new__(DeepSpeedStrategy)
    with pytest.raises(ValueError, match="strategy=deepspeed is not supported"):
        ZClipLightningCallback().on_fit_start(trainer, Automatic(fused=False))


def test_the_norm_is_that_of_the_optimizers_parameters(tmp_path):
    class Last(Automatic):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[2].parameters(), lr=0.0)

    module, seen = Last(fused=False), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *args):
            seen.append(callback.zclip.read_telemetry()["grad_norm"])

    callback = ZClipLightningCallback()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[callback, Watch()], logger=False, default_root_dir=tmp_path,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([batch(0)] * 6, batch_size=None))
    assert seen == pytest.approx([seen[0]] * 6, rel=1e-5), "gradients that nobody zeroes are not counted"


@pytest.mark.parametrize("fused", [False, True])
def test_a_training_step_that_returns_none_in_fp16(fused, tmp_path):
    class Sometimes(Automatic):
        def training_step(self, x, index):
            return None if index % 3 == 1 else super().training_step(x, index)

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    _, callback = fit(Sometimes(fused), tmp_path, plugins=[plugin])
    assert int(callback.zclip.state["count"]) == STEPS * 2 // 3


def test_gradients_that_are_not_there_are_an_error(tmp_path):
    class Moved(Automatic):
        def on_after_backward(self):
            for p in self.parameters():
                p.grad = None

    with pytest.raises(ValueError, match="no parameter has a gradient"):
        fit(Moved(fused=False), tmp_path)


def test_every_optimizer_gets_a_copy_of_the_strategy_as_it_was_given(tmp_path):
    class Mine(ZClip):
        def __init__(self, **settings):
            super().__init__(**settings)

    strategy = Mine(warmup_steps=5, max_grad_norm=0.1, max_consecutive_nonfinite=7)
    _, callback = fit(TwoOptimizers(), tmp_path, callback=ClippingCallback(strategy))
    for each in callback.strategies:
        assert (each.warmup_steps, each.max_grad_norm, each.max_consecutive_nonfinite) == (5, 0.1, 7)
        assert int(each.state["count"]) == STEPS


def test_a_loss_that_may_be_another_optimizers_is_not_looked_at(tmp_path):
    _, callback = fit(TwoOptimizers(), tmp_path, callback=ClippingCallback(SkipStep(window=8)))
    assert [int(s.state["loss_count"]) for s in callback.strategies] == [0, 0]


def two_processes(rank: int, port: int, folder: str) -> None:
    os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ |= dict(WORLD_SIZE="2", OMP_NUM_THREADS="1")
    losses = []

    class Recorded(Automatic):
        def training_step(self, x, index):
            loss = super().training_step(x.chunk(2)[rank], index)
            losses.append(loss.item())
            return loss

    module, callback = Recorded(fused=True), ClippingCallback(SkipStep(window=STEPS))
    fit(module, folder, callback=callback, strategy="ddp", devices=2, use_distributed_sampler=False)
    torch.save((losses, callback.strategy.state, module.state_dict()), f"{folder}/{rank}.pt")


def test_all_ranks_see_the_mean_loss(tmp_path):
    mp.spawn(two_processes, args=(free_port(), str(tmp_path)), nprocs=2)
    (losses, state, weights), (others, other_state, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    means = (torch.tensor(losses) + torch.tensor(others)) / 2
    torch.testing.assert_close(state["losses"].float(), means)
    assert losses != others and same(state, other_state) and same(weights, other)


def test_the_raise_policy_names_parameters(tmp_path):
    class Bad(Automatic):
        def on_after_backward(self):
            self.net[2].bias.grad[0] = torch.nan

    with pytest.raises(FloatingPointError, match=r"gradients of net\.2\.bias of shape \(3,\)$"):
        fit(Bad(fused=False), tmp_path, callback=ZClipLightningCallback(on_nonfinite="raise"))


def test_an_optimizer_whose_turn_it_is_not_is_left_alone(tmp_path):
    class Alternating(TwoOptimizers):
        def training_step(self, x, index):
            first, second = self.optimizers()
            self.manual_backward((self.net if index % 2 else self.other)(x).square().mean())
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()

    _, callback = fit(Alternating(), tmp_path)
    assert [int(strategy.state["count"]) for strategy in callback.strategies] == [STEPS // 2, STEPS // 2]


def test_a_module_without_an_optimizer_is_left_alone(tmp_path):
    class Idle(Automatic):
        def configure_optimizers(self):
            return None

    fit(Idle(fused=False), tmp_path)
