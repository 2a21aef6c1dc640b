"""The model as Lightning trains it: loss, optimizer, learning-rate schedule (the paper's Table 1), and sharding."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from common.errors import prefix_errors
from data import Batch
from models import Llama
from models.hugging_face import load
from models.parallel import (
    apply_activation_checkpointing,
    apply_fsdp,
    compile_model,
    copy_full_weight,
    materialize,
    set_gradient_sync,
)
from training.config.schema import Config, OptimConfig, TrainerConfig
from training.validation.validation_set import ValidationBatch, ValidationSet


class PretrainingModule(pl.LightningModule):
    """Next-token prediction with a LLaMA.

    Args:
        model: model to train.
        lr: peak learning rate.
        optim: settings of the optimizer and of its schedule.
        trainer: `max_steps`, for the schedule, and the number of backward passes in an optimizer step.
        prepare_model: called once with the model, when the processes of the run are connected; `None`: not needed.
    """

    def __init__(
        self,
        model: Llama,
        lr: float,
        optim: OptimConfig,
        trainer: TrainerConfig,
        prepare_model: Callable[[Llama], None] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.lr = lr
        self.steps = trainer.max_steps
        self.grad_accum_steps = trainer.grad_accum_steps
        self.adamw: dict[str, Any] = optim.model_dump(include={"betas", "eps", "weight_decay", "fused"})
        self.warmup_steps = round(optim.warmup_fraction * self.steps)
        self.final_lr_fraction = optim.final_lr_fraction
        self.z_loss = optim.z_loss
        self.prepare_model = prepare_model
        self._test_sum = torch.zeros((), dtype=torch.float64)
        self._test_tokens = 0

    def configure_model(self) -> None:
        """Compile and shard the model and give it weights, the first time that Lightning calls this."""
        prepare_model, self.prepare_model = self.prepare_model, None
        if prepare_model is not None:
            prepare_model(self.model)

    def on_train_start(self) -> None:
        """Apply the optimizer settings of this run: the checkpoint may come from a run with others."""
        for optimizer, schedule in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=True):
            for group in optimizer.param_groups:
                group.update(self.adamw, initial_lr=self.lr, lr=self.lr_at(self.global_step))
            schedule.scheduler.base_lrs = [self.lr for _ in optimizer.param_groups]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Reduce sharded gradients after the last micro-batch of a step only. Lightning does so for other models."""
        set_gradient_sync(self.model, (batch_idx + 1) % self.grad_accum_steps == 0)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss to minimise, and the mean cross entropy of a batch in nats per token."""
        tokens = batch.tokens.long()
        targets = tokens[:, 1:] if batch.targets is None else batch.targets.long()
        return self.model(tokens[:, :-1], targets, self.z_loss)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return of a micro-batch `loss`, which is minimised, and `cross_entropy`, which is recorded."""
        loss, cross_entropy = self.loss(batch)
        return {"loss": loss, "cross_entropy": cross_entropy}

    def lr_factor(self, step: int) -> float:
        """Return the learning rate of an optimizer step, counted from 0, as a share of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine

    def lr_at(self, step: int) -> float:
        """Return the learning rate of an optimizer step, counted from 0."""
        return self.lr * self.lr_factor(step)

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule, which advances every step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, **self.adamw)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_test_epoch_start(self) -> None:
        """Reset the sums of the evaluation."""
        self._test_sum = torch.zeros((), dtype=torch.float64)
        self._test_tokens = 0

    def evaluate(self, validation_set: ValidationSet) -> float:
        """Return the mean loss over held-out tokens in nats per token. All processes of the run call it."""
        self.on_test_epoch_start()
        for validation_batch in validation_set:
            batch = move_data_to_device(validation_batch.batch, self.device)
            self.test_step(validation_batch._replace(batch=batch), 0)
        self.on_test_epoch_end()
        return self.test_loss

    def test_step(self, validation_batch: ValidationBatch, batch_idx: int) -> None:
        """Add the losses of a batch of held-out sequences to the sum. The last batch may be smaller than the others."""
        loss = self.loss(validation_batch.batch)[1]
        if validation_batch.tokens:
            self._test_sum += loss.to("cpu", torch.float64) * validation_batch.tokens
            self._test_tokens += validation_batch.tokens

    def on_test_epoch_end(self) -> None:
        """Sum the losses over the processes."""
        strategy = self.trainer.strategy
        sums = torch.stack([self._test_sum, torch.tensor(self._test_tokens, dtype=torch.float64)])
        sums = strategy.reduce(sums.to(strategy.root_device), reduce_op="sum").cpu()
        self._test_sum, self._test_tokens = sums[0], int(sums[1])

    @property
    def test_loss(self) -> float:
        """Mean loss over all held-out tokens of the last evaluation, in nats per token."""
        return float(self._test_sum) / self._test_tokens

    def reshard(self) -> None:
        """Free the full weights that a forward pass without a backward pass leaves gathered in a sharded model."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()


def build_module(config: Config, fresh: bool) -> PretrainingModule:
    """Return the module with a model on the meta device. Lightning lets it prepare the model.

    Args:
        config: checked configuration.
        fresh: whether the model needs initial weights; otherwise those of a checkpoint are loaded.
    """
    with torch.device("meta"):
        model = Llama(config.model.llama)
    prepare_model = partial(_prepare_model, config, fresh)
    return PretrainingModule(model, config.lr, config.optim, config.trainer, prepare_model)


def _prepare_model(config: Config, fresh: bool, model: Llama) -> None:
    """Apply activation checkpointing, compile and shard a model on the meta device, and give it weights.

    If it is sharded, no process ever holds more than one full weight.
    """
    trainer = config.trainer
    apply_activation_checkpointing(model, trainer.activation_checkpointing)
    if trainer.compile:
        torch.compiler.reset()  # drops the compiled code of an earlier run of a sweep
        compile_model(model)
    device = torch.device("cpu")  # Lightning moves an unsharded model to its device
    if trainer.sharded:
        device = torch.device("cuda" if trainer.accelerator == "gpu" else "cpu")
        sizes, names = (trainer.dp_replicate, trainer.dp_shard), ("replicate", "shard")
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        dtype = torch.bfloat16 if trainer.precision == "bf16-mixed" else torch.float32
        apply_fsdp(model, mesh if trainer.strategy == "hsdp" else mesh["shard"], dtype)
    materialize(model, device)
    if not fresh:
        return
    if config.model.init_from is None:
        torch.manual_seed(config.seed)
        model.init_weights(copy_full_weight)
    else:
        with prefix_errors("model"):
            load(model, Path(config.model.init_from), copy_full_weight)
