"""What training/lightning_internals.py relies on in Lightning. A failure says what an upgrade has broken."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from tests.helpers import compose_config
from training.lightning_internals import (
    dump_checkpoint,
    forward_context,
    interrupts_as_raised,
    keep_our_signal_handlers,
    rescale_batch_counts,
    skip_sigterm_broadcast,
)
from training.run import build_trainer
from training.run_dir import RunDir
from training.runtime import signals
from training.runtime.signals import Interrupted

STEPS = 6


class TinyModule(pl.LightningModule):
    """A linear model; `hook` is called at the end of each micro-batch."""

    def __init__(self, hook=lambda module, batch_idx: None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.hook = hook

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.hook(self, batch_idx)

    def test_step(self, batch, batch_idx):
        self.hook(self, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class CountedBatches:
    """Micro-batches of the whole run, of which those before the position are not repeated."""

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.position = 0

    def __len__(self) -> int:
        return self.micro_batches

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.position < self.micro_batches:
            self.position += 1
            yield torch.ones(2, 4)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Rescale(pl.Callback):
    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        rescale_batch_counts(checkpoint, trainer.accumulate_grad_batches)


@pytest.fixture(autouse=True)
def restored_signals() -> Iterator[None]:
    """Lightning ignores Ctrl-C after an interrupt, and `Interrupted` changes what signals do."""
    handlers = {signum: signal.getsignal(signum) for signum in signals.SIGNALS}
    state = dict(vars(signals))
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    vars(signals).update(state)


def trainer_in(folder: Path, grad_accum_steps: int = 1, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        accumulate_grad_batches=grad_accum_steps,
        default_root_dir=folder,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def test_our_signal_handlers_stay_while_training(tmp_path):
    def ours(signum, frame):
        pass

    during: dict[signal.Signals, Any] = {}
    trainer = trainer_in(tmp_path)
    keep_our_signal_handlers(trainer)
    for signum in signals.SIGNALS:
        signal.signal(signum, ours)
    module = TinyModule(lambda module, _: during.update({s: signal.getsignal(s) for s in signals.SIGNALS}))
    trainer.fit(module, CountedBatches(STEPS))
    replaced = [signum.name for signum, handler in during.items() if handler is not ours]
    assert during and not replaced, (
        f"Lightning replaces our handlers of {replaced} while it trains: it does not install its own by "
        "trainer._signal_connector.register_signal_handlers any more"
    )


def test_lightning_installs_handlers_by_the_function_that_is_replaced(tmp_path):
    trainer, calls = trainer_in(tmp_path), []
    connector = getattr(trainer, "_signal_connector", None)
    assert hasattr(connector, "register_signal_handlers"), (
        "Lightning has no trainer._signal_connector.register_signal_handlers: find out how it installs its handlers, "
        "which must not replace ours"
    )
    connector.register_signal_handlers = lambda: calls.append("fit")
    trainer.fit(TinyModule(), CountedBatches(STEPS))
    assert calls, "Lightning does not call trainer._signal_connector.register_signal_handlers before it trains"


def test_sigterm_broadcast_before_each_batch_can_be_skipped(tmp_path, monkeypatch):
    trainer, calls = trainer_in(tmp_path), []
    loop = trainer.fit_loop.epoch_loop
    assert hasattr(loop, "_broadcast_sigterm_tensor"), (
        "Lightning has no epoch_loop._broadcast_sigterm_tensor: find out whether it still exchanges signals between "
        "processes before each batch, which waits for the device"
    )
    monkeypatch.setattr(type(loop), "_broadcast_sigterm_tensor", lambda self: calls.append("broadcast"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(type(trainer), "world_size", 2)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *args, **kwargs: calls.append("other broadcast"))
    module = TinyModule()
    skip_sigterm_broadcast(trainer)
    trainer.fit(module, CountedBatches(STEPS))
    assert not calls, f"Lightning still exchanges signals between processes while it trains: {calls}"


def test_dump_is_a_whole_checkpoint_of_the_step(tmp_path):
    checkpoints: list[dict[str, Any]] = []
    counter = pl.Callback()
    counter.state_dict = lambda: {"count": 3}
    counter.on_save_checkpoint = lambda trainer, module, checkpoint: checkpoint.update(extra="ours")

    def save(module: pl.LightningModule, batch_idx: int) -> None:
        if module.trainer.global_step == 4 and not checkpoints:
            checkpoints.append(dump_checkpoint(module.trainer))

    module = TinyModule(save)
    trainer_in(tmp_path, callbacks=[counter]).fit(module, CountedBatches(STEPS))
    (checkpoint,) = checkpoints
    needed = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "global_step", "extra"}
    assert needed <= checkpoint.keys(), (
        f"Lightning's dump_checkpoint lacks {needed - checkpoint.keys()}: a run could not resume from it"
    )
    assert checkpoint["global_step"] == 4, "Lightning's dump_checkpoint is not of the step after which it is called"
    assert {"count": 3} in checkpoint["callbacks"].values(), (
        "Lightning's dump_checkpoint lacks the callbacks' states: the clipper's statistics would be lost"
    )
    assert checkpoint["state_dict"].keys() == {"layer.weight", "layer.bias"}, (
        "Lightning's dump_checkpoint names the weights differently: training.checkpoint.format reads them as they were"
    )


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (3, 1), (2, 4)])
def test_a_run_resumes_at_a_step_with_another_number_of_micro_batches(before, after, tmp_path):
    """As after step 4 of 6, saved at the end of a batch."""
    file = tmp_path / "checkpoint.ckpt"

    def save(module: pl.LightningModule, batch_idx: int) -> None:
        if module.trainer.global_step == 4 and not file.exists():
            torch.save(dump_checkpoint(module.trainer), file)

    trainer_in(tmp_path, before).fit(TinyModule(save), CountedBatches(STEPS * before))
    counts = torch.load(file, weights_only=False)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for which in ("total", "current"):
        assert counts[which].keys() == {"ready", "started", "processed", "completed"}, (
            f"Lightning counts batches by {list(counts[which])}: rescale_batch_counts must convert them all"
        )
        assert counts[which] == {n: 4 * before - (n == "completed") for n in counts[which]}, (
            f"Lightning saves other batch counts at the end of a batch ({counts[which]}): rescale_batch_counts "
            "must write the same"
        )

    checkpoint = torch.load(file, weights_only=False)
    rescale_batch_counts(checkpoint, before)
    unchanged = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert unchanged == counts, "counts of as many micro-batches are those that Lightning saves"

    seen: list[tuple[int, int]] = []
    batches = CountedBatches(STEPS * after)
    batches.position = 4 * after
    module = TinyModule(lambda module, batch_idx: seen.append((batch_idx, module.trainer.global_step)))
    resumed = trainer_in(tmp_path, after, callbacks=[Rescale()])
    resumed.fit(module, batches, ckpt_path=str(file), weights_only=False)
    expected = [(index, (index + 1) // after) for index in range(4 * after, STEPS * after)]
    assert seen == expected, (
        f"Lightning resumes after step 4 with micro-batches and steps {seen} instead of {expected}: the counters in "
        'checkpoint["loops"] mean something else, and rescale_batch_counts must be adapted'
    )


def test_interrupts_during_an_evaluation_are_raised_with_their_step(tmp_path):
    def interrupt(module: pl.LightningModule, batch_idx: int) -> None:
        raise Interrupted(signal.SIGTERM)

    trainer = trainer_in(tmp_path)
    with pytest.raises(BaseException) as raised, interrupts_as_raised(SimpleNamespace(global_step=5)):
        trainer.test(TinyModule(interrupt), CountedBatches(1), verbose=False)
    assert isinstance(raised.value, Interrupted), (
        f"Lightning turns an interrupt into {raised.value!r}, not into SystemExit with the interrupt as its context: "
        "interrupts_as_raised must translate that"
    )
    assert (raised.value.signum, raised.value.step) == (signal.SIGTERM, 5)


def test_other_exits_stay_exits():
    with pytest.raises(SystemExit), interrupts_as_raised(SimpleNamespace(global_step=5)):
        raise SystemExit(4)


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_forward_context_has_the_precision_of_training(precision, dtype, tmp_path):
    trainer, module = trainer_in(tmp_path, precision=precision), TinyModule()
    with forward_context(trainer):
        found = module.layer(torch.ones(2, 4)).dtype
    assert found == dtype, (
        f"Lightning's precision_plugin.forward_context computes {precision} in {found}: evaluations during training "
        "would differ from training"
    )


def test_variables_of_lightning_do_not_change_a_run(monkeypatch, tmp_path):
    variables = {"PL_TRAINER_MAX_TIME": "00:00:00:01", "PL_TRAINER_LIMIT_TEST_BATCHES": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trainer = build_trainer(compose_config(), RunDir(tmp_path), [])
    assert trainer.limit_test_batches == 1.0 and trainer.callbacks == []
    assert variables.items() <= os.environ.items()
