"""Training with the Lightning callbacks equals a plain loop: one or two optimizers, fused or not, bf16, fp16."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader

import zclip
from tests import gloo_pool
from tests.helpers import same
from tests.zclip.reference_loop import STEPS, assert_same_weights, batch, build_model, train_plain
from zclip import ClippingCallback, SkipStep, ZClip, ZClipLightningCallback


class Automatic(pl.LightningModule):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.net = build_model()
        self.fused = fused

    def training_step(self, x, index):
        return self.net(x).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=self.fused)


class Attached(Automatic):
    """Attaches a strategy itself."""

    def __init__(self) -> None:
        super().__init__(fused=True)
        self.strategy, self.norms = ZClip(), []

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        self.strategy.attach(optimizer, self)
        return optimizer

    def on_train_batch_end(self, *_):
        self.norms.append(self.strategy.read_telemetry()["grad_norm"])


class TwoOptimizers(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.other = build_model(), build_model()

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


@pytest.mark.parametrize("clip_val", [None, 0.001])
def test_an_attached_strategy_sees_the_norms_that_lightning_leaves_and_is_not_saved(clip_val, tmp_path):
    module = Attached()
    trainer, _ = fit(module, tmp_path, pl.Callback(), gradient_clip_val=clip_val)
    assert len(module.norms) == STEPS
    if clip_val is None:
        assert min(module.norms) > 0.002
    else:
        assert module.norms == pytest.approx([clip_val] * STEPS, rel=1e-3)
    trainer.save_checkpoint(tmp_path / "checkpoint.ckpt")
    saved = torch.load(tmp_path / "checkpoint.ckpt", weights_only=False)
    assert "param_groups" in repr(saved) and "z_thresh" not in repr(saved)


@pytest.mark.parametrize("fused", [False, True])
def test_automatic_optimization_matches_the_plain_loop(fused, tmp_path):
    module = Automatic(fused)
    _, callback = fit(module, tmp_path, ZClipLightningCallback(0.97, 2.0, warmup_steps=5))
    model = build_model()
    expected = train_plain(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    assert_same_weights(module.net, model)
    torch.testing.assert_close(callback.zclip.state["mean"], expected.state["mean"])


@pytest.mark.parametrize("scope", ["group:SGD", "other.*", ["group:*", "!group:AdamW"]])
def test_optimizer_that_is_not_in_the_scope_is_not_clipped(scope, tmp_path):
    module = TwoOptimizers()
    _, callback = fit(module, tmp_path, ZClipLightningCallback(warmup_steps=5, z_thresh=2.0, scope=scope))
    assert callback.strategies[0].telemetry == {} and callback.strategies[1].state["count"] == STEPS
    model = build_model()
    train_plain(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_factor=3.0)
    assert_same_weights(module.other, model)
    with pytest.raises(ValueError, match=r"^scope=group:Muon has none of the 4 parameters, .*; groups are AdamW$"):
        fit(TwoOptimizers(), tmp_path, ZClipLightningCallback(scope="group:Muon"))


def test_each_optimizer_is_clipped_in_the_scope_of_its_own_strategy(tmp_path):
    callback = ZClipLightningCallback(warmup_steps=5, z_thresh=2.0, scope="group:AdamW")
    callback._create_strategies(2)
    callback.strategies[1].scope = "group:SGD"
    fit(TwoOptimizers(), tmp_path, callback)
    assert [int(strategy.state["count"]) for strategy in callback.strategies] == [STEPS, STEPS]


def test_two_optimizers_have_separate_statistics(tmp_path):
    module = TwoOptimizers()
    _, callback = fit(module, tmp_path)
    models = build_model(), build_model()
    first = train_plain(models[0], torch.optim.AdamW(models[0].parameters(), lr=0.01))
    second = train_plain(models[1], torch.optim.SGD(models[1].parameters(), lr=0.1), loss_factor=3.0)
    assert_same_weights(module.net, models[0])
    assert_same_weights(module.other, models[1])
    for strategy, expected in zip(callback.strategies, (first, second), strict=True):
        assert int(strategy.state["count"]) == STEPS
        torch.testing.assert_close(strategy.state["mean"], expected.state["mean"])
    assert not torch.allclose(callback.strategies[0].state["mean"], callback.strategies[1].state["mean"])


def test_statistics_are_saved_in_the_checkpoint(tmp_path):
    trainer, callback = fit(TwoOptimizers(), tmp_path)
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    restored = ZClipLightningCallback(warmup_steps=5, z_thresh=2.0)
    state = torch.load(tmp_path / "all.ckpt", weights_only=False)["callbacks"]
    restored.load_state_dict(state[callback.state_key])
    for one, other in zip(callback.strategies, restored.strategies, strict=True):
        assert all(torch.equal(one.state[key], other.state[key]) for key in one.state)


def test_run_resumes_with_other_arguments_where_the_callback_allows_it(tmp_path):
    trainer, callback = fit(TwoOptimizers(), tmp_path)
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    loader = DataLoader([batch(0)], batch_size=None)

    def resume(override: bool) -> ZClipLightningCallback:
        resumed = ZClipLightningCallback(warmup_steps=5, z_thresh=3.0, override=override)
        again = pl.Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[resumed], logger=False, default_root_dir=tmp_path
        )
        again.fit(TwoOptimizers(), loader, ckpt_path=tmp_path / "all.ckpt", weights_only=False)
        return resumed

    with pytest.raises(ValueError, match=r"z_thresh=2\.0"):
        resume(override=False)
    for one, other in zip(callback.strategies, resume(override=True).strategies, strict=True):
        assert all(torch.equal(one.state[key], other.state[key]) for key in one.state)
        assert other.changes == [{"setting": "z_thresh", "from": 2.0, "to": 3.0}]


def test_callback_whose_strategy_was_changed_loads_its_own_state():
    callback = ZClipLightningCallback()
    callback.strategy.change(z_thresh=3.0)
    callback.load_state_dict(callback.state_dict())
    assert callback.strategy.changes == [{"setting": "z_thresh", "from": 2.5, "to": 3.0}]


def test_bf16_mixed_with_a_fused_optimizer_trains(tmp_path):
    module = Automatic(fused=True)
    before = torch.cat([p.detach().flatten() for p in module.parameters()])
    _, callback = fit(module, tmp_path, precision="bf16-mixed")
    after = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    assert int(callback.zclip.state["count"]) == STEPS


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_mixed_matches_a_plain_loop_with_a_scaler(fused, tmp_path):
    """The scale starts too high: the first steps overflow, are skipped and do not enter the statistics."""
    module, scale = Automatic(fused), 2.0**21
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))
    _, callback = fit(module, tmp_path, plugins=[plugin])
    overflows = callback.zclip.read_telemetry()["nonfinite"]
    assert 1 <= overflows <= STEPS / 2 and callback.zclip.state["count"] == STEPS - overflows

    model, scaler, zclip = (
        build_model(),
        torch.amp.GradScaler("cpu", init_scale=scale),
        ZClip(warmup_steps=5, z_thresh=2.0),
    )
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
    assert_same_weights(module.net, model)
    assert plugin.scaler.get_scale() == scaler.get_scale() < scale
    torch.testing.assert_close(callback.zclip.state["mean"], zclip.state["mean"])


def test_skip_step_uses_the_mean_loss_of_the_micro_batches(tmp_path):
    callback = ClippingCallback(SkipStep(window=8))
    losses = []

    class RecordLosses(Automatic):
        def training_step(self, x, index):
            loss = super().training_step(x, index)
            losses.append(loss.item())
            return loss

    fit(RecordLosses(fused=True), tmp_path, callback=callback, accumulate_grad_batches=2)
    means = torch.tensor(losses).view(-1, 2).mean(dim=1)
    torch.testing.assert_close(callback.strategy.state["losses"].float(), means[-8:].roll(len(means) % 8))


def test_training_step_that_returns_none_is_ignored(tmp_path):
    class SometimesNone(Automatic):
        def training_step(self, x, index):
            return None if index % 3 == 0 else super().training_step(x, index)

    _, callback = fit(SometimesNone(fused=True), tmp_path)
    assert int(callback.zclip.state["count"]) == STEPS * 2 // 3


def test_trainer_with_gradient_clip_val_is_rejected(tmp_path):
    allowed = r"^gradient_clip_val=1\.0 is not allowed: leave it unset, ZClip clips the gradients$"
    with pytest.raises(ValueError, match=allowed):
        fit(Automatic(fused=False), tmp_path, gradient_clip_val=1.0)


def test_callbacks_are_found_in_the_package():
    assert zclip.ClippingCallback is ClippingCallback and issubclass(zclip.ZClipLightningCallback, ClippingCallback)


def test_second_callback_and_strategy_class_are_rejected(tmp_path):
    with pytest.raises(TypeError, match=r"takes a strategy, such as ZClip\(\), not <class"):
        ClippingCallback(ZClip)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[ZClipLightningCallback(), ClippingCallback(ZClip())], default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^two clipping callbacks clip for one Trainer: give it one$"):
        trainer.fit(Automatic(fused=False), DataLoader([batch(0)], batch_size=None))


def test_deepspeed_is_rejected(tmp_path):
    """DeepSpeedStrategy needs the package, so the Trainer gets an instance without __init__."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer._accelerator_connector.strategy = object.__new__(DeepSpeedStrategy)
    with pytest.raises(ValueError) as error:
        ZClipLightningCallback().on_fit_start(trainer, Automatic(fused=False))
    assert str(error.value) == (
        "strategy=deepspeed is not supported: its engine keeps gradients to itself; shard with ModelParallelStrategy "
        "(FSDP2) instead"
    )


def test_norm_is_taken_over_the_optimizers_parameters(tmp_path):
    class LastLayer(Automatic):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[2].parameters(), lr=0.0)

    module, norms = LastLayer(fused=False), []

    class RecordNorms(pl.Callback):
        def on_train_batch_end(self, *args):
            norms.append(callback.zclip.read_telemetry()["grad_norm"])

    callback = ZClipLightningCallback()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[callback, RecordNorms()], logger=False, default_root_dir=tmp_path,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([batch(0)] * 6, batch_size=None))
    assert norms == pytest.approx([norms[0]] * 6, rel=1e-5), "gradients outside the optimizer do not count"


@pytest.mark.parametrize("fused", [False, True])
def test_training_step_that_returns_none_is_ignored_in_fp16(fused, tmp_path):
    class SometimesNone(Automatic):
        def training_step(self, x, index):
            return None if index % 3 == 0 else super().training_step(x, index)

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    _, callback = fit(SometimesNone(fused), tmp_path, plugins=[plugin])
    assert int(callback.zclip.state["count"]) == STEPS * 2 // 3


def test_missing_gradients_are_an_error(tmp_path):
    class WithoutGradients(Automatic):
        def on_after_backward(self):
            for p in self.parameters():
                p.grad = None

    with pytest.raises(ValueError, match="no parameter has a gradient"):
        fit(WithoutGradients(fused=False), tmp_path)


def test_each_optimizer_gets_an_unused_copy_of_the_strategy(tmp_path):
    """The first optimizer's strategy goes on in a second training, in which there are more optimizers."""

    class CustomStrategy(ZClip):
        def __init__(self, **settings):
            super().__init__(**settings)

    class ThreeOptimizers(TwoOptimizers):
        def training_step(self, x, index):
            self.manual_backward(self.net(x).square().mean() + self.other(x).square().mean())
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net, self.other[0], self.other[2])]

    strategy = CustomStrategy(warmup_steps=5, max_grad_norm=0.1, max_consecutive_nonfinite=7)
    strategy.prepare(build_model())  # its statistics exist, and must be copied too
    callback = ClippingCallback(strategy)
    fit(Automatic(fused=False), tmp_path, callback)
    fit(ThreeOptimizers(), tmp_path, callback)
    for copy in callback.strategies:
        assert (copy.warmup_steps, copy.max_grad_norm, copy.max_consecutive_nonfinite) == (5, 0.1, 7)
    assert [int(strategy.state["count"]) for strategy in callback.strategies] == [2 * STEPS, STEPS, STEPS]


def test_manual_optimization_ignores_the_loss(tmp_path):
    _, callback = fit(TwoOptimizers(), tmp_path, callback=ClippingCallback(SkipStep(window=8)))
    assert [int(s.state["loss_count"]) for s in callback.strategies] == [0, 0]


def test_fp16_ignores_the_scaled_loss(tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    _, callback = fit(Automatic(fused=False), tmp_path, ClippingCallback(SkipStep(window=8)), plugins=[plugin])
    assert int(callback.strategy.state["loss_count"]) == 0


def train_rank(rank: int, world: int, folder: str) -> tuple[list[float], dict, dict]:
    """Return the losses of this rank, and the final states of the strategy and the module."""
    losses = []

    class RecordLosses(Automatic):
        def training_step(self, x, index):
            loss = super().training_step(x.chunk(world)[rank], index)
            losses.append(loss.item())
            return loss

    module, callback = RecordLosses(fused=True), ClippingCallback(SkipStep(window=STEPS))
    fit(module, folder, callback=callback, strategy="ddp", devices=world, use_distributed_sampler=False)
    return losses, callback.strategy.state, module.state_dict()


def test_all_ranks_use_the_mean_loss(tmp_path):
    results = gloo_pool.run(train_rank, 2, str(tmp_path))
    (losses, state, weights), (other_losses, other_state, other_weights) = results
    means = (torch.tensor(losses) + torch.tensor(other_losses)) / 2
    torch.testing.assert_close(state["losses"].float(), means)
    assert losses != other_losses and same(state, other_state) and same(weights, other_weights)


class ShardOnCPU(FSDPStrategy):
    """Lightning rejects `FSDPStrategy` itself without a GPU."""


class Sharded(Automatic):
    def configure_model(self):
        if not isinstance(self.net, FullyShardedDataParallel):
            self.net = FullyShardedDataParallel(self.net, device_id=torch.device("cpu"), use_orig_params=True)


class ManualLastLayer(Sharded):
    """Trains a layer of which rank 0 has no part, and so no gradients."""

    automatic_optimization = False

    def training_step(self, x, index):
        self.manual_backward(super().training_step(x, index))
        self.optimizers().step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[2].parameters(), lr=0.1)


def train_fsdp1_rank(rank: int, world: int, folder: str) -> list[dict]:
    """Return the final states of the strategies of both modules."""
    states = []
    for module in (Sharded(fused=False), ManualLastLayer(fused=False)):
        _, callback = fit(module, folder, strategy=ShardOnCPU(), devices=world, use_distributed_sampler=False)
        states.append(callback.zclip.state)
    return states


def test_fsdp1_norm_is_that_of_the_whole_model(tmp_path):
    """A rank without gradients takes part."""
    states, other_states = gloo_pool.run(train_fsdp1_rank, 2, str(tmp_path), timeout=30)
    model = build_model()
    expected = train_plain(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    torch.testing.assert_close(states[0]["mean"], expected.state["mean"])
    assert same(states, other_states) and states[1]["count"] == STEPS


def test_raise_policy_names_parameters(tmp_path):
    class NaNGradient(Automatic):
        def on_after_backward(self):
            self.net[2].bias.grad[0] = torch.nan

    with pytest.raises(FloatingPointError, match=r"gradients of net\.2\.bias of shape \(3,\)$"):
        fit(NaNGradient(fused=False), tmp_path, callback=ZClipLightningCallback(on_nonfinite="raise"))


@pytest.mark.parametrize("fused", [False, True])
def test_optimizer_skips_a_nonfinite_step(fused, tmp_path):
    class NaNGradient(Automatic):
        def on_after_backward(self):
            self.net[2].bias.grad[0] = torch.nan

    module = NaNGradient(fused)
    before = [p.detach().clone() for p in module.parameters()]
    fit(module, tmp_path, limit_train_batches=2)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True)), "no weight decay either"


def test_optimizer_without_gradients_is_ignored(tmp_path):
    class Alternating(TwoOptimizers):
        def training_step(self, x, index):
            first, second = self.optimizers()
            self.manual_backward((self.net if index % 2 else self.other)(x).square().mean())
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()

    _, callback = fit(Alternating(), tmp_path)
    assert [int(strategy.state["count"]) for strategy in callback.strategies] == [STEPS // 2, STEPS // 2]


def test_module_without_an_optimizer_is_ignored(tmp_path):
    class WithoutOptimizer(Automatic):
        def configure_optimizers(self):
            return None

    fit(WithoutOptimizer(fused=False), tmp_path)
