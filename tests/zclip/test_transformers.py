"""Training with Hugging Face's Trainer equals a plain loop and resumes exactly; wrong settings are errors."""

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests import gloo_pool
from tests.helpers import SLOW, same
from tests.zclip.reference_loop import STEPS, assert_same_weights, batch, build_model, train_plain
from zclip import AdaGC, AutoClip, FixedNorm, TrainerClippingCallback, ZClip


class Wrapped(nn.Module):
    """The model of the plain loop, which returns its loss as the Trainer expects."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build_model()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.net(x).square().mean()}


ROWS = [{"x": row} for step in range(STEPS) for row in batch(step)]


class InOrder(Trainer):
    """Reads the rows in order, so that the batches are those of the plain loop."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(folder, callback: TrainerClippingCallback | None, optimizer: str = "adamw_torch", **settings) -> Trainer:
    values = dict(
        output_dir=str(folder), per_device_train_batch_size=8, max_steps=STEPS, learning_rate=0.01, weight_decay=0.01,
        lr_scheduler_type="constant", optim=optimizer, max_grad_norm=0.0, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    args = TrainingArguments(**{**values, **settings})
    return InOrder(Wrapped(), args, train_dataset=ROWS, callbacks=[callback] if callback else [])


def zclip() -> ZClip:
    return ZClip(warmup_steps=5, z_thresh=2.0)


def reference() -> tuple[nn.Module, ZClip]:
    model = build_model()
    groups = [  # the Trainer decays weights, not biases
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return model, train_plain(model, torch.optim.AdamW(groups, lr=0.01))


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_matches_the_plain_loop(optimizer, accumulation, tmp_path):
    callback = TrainerClippingCallback(zclip())
    sizes = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    run = trainer(tmp_path, callback, optimizer, **sizes)
    run.train()
    model, expected_zclip = reference()
    assert_same_weights(run.model.net, model)
    torch.testing.assert_close(callback.strategy.state["mean"], expected_zclip.state["mean"])
    assert callback.strategy.state["count"] == STEPS


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_strategy_attached_to_the_optimizer_matches_the_plain_loop(optimizer, tmp_path):
    run, strategy = trainer(tmp_path, None, optimizer), zclip()
    strategy.attach(run.create_optimizer())
    run.train()
    model, expected_zclip = reference()
    assert_same_weights(run.model.net, model)
    torch.testing.assert_close(strategy.state["mean"], expected_zclip.state["mean"])


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(zclip, id="zclip"),
        SLOW(lambda: AdaGC(warmup_steps=3), id="adagc"),
        SLOW(AutoClip, id="autoclip"),
    ],
)
def test_resumed_run_ends_bitwise_equal(make, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 10}
    callback = TrainerClippingCallback(make())
    uninterrupted = trainer(tmp_path / "whole", callback, **settings)
    uninterrupted.train()
    resumed_callback = TrainerClippingCallback(make())
    resumed = trainer(tmp_path / "resumed", resumed_callback, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-10"))
    models = uninterrupted.model, resumed.model
    assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models), strict=True))
    state, resumed_state = callback.strategy.state, resumed_callback.strategy.state
    assert all(torch.equal(state[key], resumed_state[key]) for key in state)


def test_checkpoint_without_statistics_starts_new_ones(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 10}
    bare = trainer(tmp_path / "bare", TrainerClippingCallback(zclip()), max_steps=10, **settings)
    bare.remove_callback(TrainerClippingCallback)
    bare.train()
    callback = TrainerClippingCallback(zclip())
    trainer(tmp_path / "clipped", callback, **settings).train(str(tmp_path / "bare" / "checkpoint-10"))
    assert callback.strategy.state["count"] == STEPS - 10
    again = TrainerClippingCallback(zclip())
    trainer(tmp_path / "again", again, **settings).train(str(tmp_path / "clipped" / "checkpoint-20"))
    assert all(torch.equal(callback.strategy.state[key], again.strategy.state[key]) for key in again.strategy.state)


def test_checkpoint_of_another_strategy_is_rejected(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, TrainerClippingCallback(zclip()), max_steps=1, **settings).train()
    with pytest.raises(ValueError, match=r"state of ZClip .* cannot be loaded into FixedNorm"):
        trainer(tmp_path, TrainerClippingCallback(FixedNorm())).train(str(tmp_path / "checkpoint-1"))


def test_run_resumes_with_other_arguments_where_the_callback_allows_it(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 10}
    trainer(tmp_path / "old", TrainerClippingCallback(FixedNorm(0.5)), max_steps=10, **settings).train()
    checkpoint = str(tmp_path / "old" / "checkpoint-10")
    with pytest.raises(ValueError, match=r"max_norm=0\.5"):
        trainer(tmp_path / "new", TrainerClippingCallback(FixedNorm(0.25)), **settings).train(checkpoint)
    callback = TrainerClippingCallback(FixedNorm(0.25), override=True)
    trainer(tmp_path / "new", callback, **settings).train(checkpoint)
    assert callback.strategy.changes == [{"setting": "max_norm", "from": 0.5, "to": 0.25}]
    assert callback.strategy.read_telemetry()["clipped_norm"] <= 0.2501


def test_trainer_that_replaces_the_callback_is_rejected(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "restore_callback_states_from_checkpoint": True}
    trainer(tmp_path, TrainerClippingCallback(zclip()), max_steps=1, **settings).train()
    with pytest.raises(ValueError) as error:
        trainer(tmp_path, TrainerClippingCallback(zclip()), **settings).train(str(tmp_path / "checkpoint-1"))
    assert str(error.value) == (
        "restore_callback_states_from_checkpoint=True is not allowed: leave it out, the statistics are restored "
        "without it, into the strategy that you made"
    )
    with pytest.raises(TypeError, match=r"^TrainerClippingCallback takes a strategy, such as ZClip\(\), not <class"):
        TrainerClippingCallback(ZClip)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.001])
def test_an_attached_strategy_sees_the_norms_that_the_trainer_leaves_and_is_not_saved(max_grad_norm, tmp_path):
    strategy, norms = ZClip(), []

    class Collect(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            norms.append(strategy.read_telemetry()["grad_norm"])

    attached = trainer(tmp_path, None, max_grad_norm=max_grad_norm, save_strategy="steps", save_steps=STEPS)
    attached.add_callback(Collect())
    strategy.attach(attached.create_optimizer(), attached.model)
    attached.train()
    assert len(norms) == STEPS
    if max_grad_norm == 0:
        assert min(norms) > 0.002
    else:
        assert norms == pytest.approx([max_grad_norm] * STEPS, rel=1e-2)
    assert "z_thresh" not in (tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text()


def test_trainer_with_max_grad_norm_is_rejected(tmp_path):
    with pytest.raises(ValueError) as error:
        trainer(tmp_path, TrainerClippingCallback(zclip()), max_grad_norm=1.0).train()
    assert str(error.value) == (
        "max_grad_norm=1.0 is not allowed: give TrainingArguments max_grad_norm=0.0, ZClip clips the gradients"
    )


def test_deepspeed_is_rejected(tmp_path, monkeypatch):
    """DeepSpeed needs its package, so only the state says that it is used."""
    callback = TrainerClippingCallback(zclip())
    run = trainer(tmp_path, callback)
    for state in (AcceleratorState, PartialState):
        monkeypatch.setitem(state._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError) as error:
        callback.on_train_begin(run.args, run.state, run.control)
    assert str(error.value) == (
        "DeepSpeed is not supported: its engine reduces, clips and steps in one call, on gradients that the parameters "
        "do not hold; shard with FSDP2 instead"
    )


def test_optimizer_skips_a_nonfinite_step(tmp_path):
    run = trainer(tmp_path, TrainerClippingCallback(zclip()), max_steps=1)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.model.net[2].bias.register_hook(lambda gradient: gradient * torch.nan)
    run.train()
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True)), "no weight decay either"


def test_second_callback_is_rejected(tmp_path):
    run = trainer(tmp_path, TrainerClippingCallback(zclip()))
    run.add_callback(TrainerClippingCallback(zclip()))
    with pytest.raises(ValueError, match=r"^two TrainerClippingCallbacks clip for one Trainer: give it one$"):
        run.train()


def train_rank(rank: int, world: int, folder: str) -> tuple[dict, dict]:
    """Return the final states of the model and the strategy."""
    callback = TrainerClippingCallback(zclip())
    run = trainer(folder, callback, "adamw_torch_fused", per_device_train_batch_size=8 // world, ddp_backend="gloo")
    assert run.args.world_size == world
    run.train()
    return run.model.state_dict(), callback.strategy.state


def test_two_processes_match_the_plain_loop(tmp_path):
    (weights, state), (other, other_state) = gloo_pool.run(train_rank, 2, str(tmp_path))
    assert same(weights, other) and same(state, other_state)
    model, expected_zclip = reference()
    wrapped = Wrapped()
    wrapped.load_state_dict(weights)
    assert_same_weights(wrapped.net, model)
    torch.testing.assert_close(state["mean"], expected_zclip.state["mean"])
