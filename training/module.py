"""The model as Lightning trains it: loss, optimizer, learning-rate schedule (the paper's Table 1), and sharding."""

import math
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
from models import Llama, parallel
from models.hugging_face import load
from training.config.optimizer import make_optimizer
from training.config.schema import Config
from training.validation.loss import ValidationSet


class PretrainingModule(pl.LightningModule):
    """Next-token prediction with a LLaMA, which is on the meta device until Lightning configures it.

    Args:
        config: checked configuration.
        fresh: whether the model needs initial weights; otherwise those of a checkpoint are loaded.
    """

    def __init__(self, config: Config, fresh: bool) -> None:
        super().__init__()
        with torch.device("meta"):
            self.model = Llama(config.model.llama)
        self.config = config
        self.fresh = fresh
        self.optimizer_settings: list[dict[str, Any]] = []
        self.warmup_steps = round(config.optim.warmup_fraction * config.trainer.max_steps)
        self.test_loss = math.nan

    def configure_model(self) -> None:
        """Compile and shard the model and give it weights, the first time that Lightning calls this.

        If it is sharded, no process ever holds more than one full weight.
        """
        model, trainer = self.model, self.config.trainer
        if not next(model.parameters()).is_meta:
            return
        parallel.apply_activation_checkpointing(model, trainer.activation_checkpointing)
        if trainer.compile:
            torch.compiler.reset()  # drops the compiled code of an earlier run of a sweep
            parallel.compile_model(model)
        device = torch.device("cpu")  # Lightning moves an unsharded model to its device
        if trainer.sharded:
            device = torch.device("cuda" if trainer.accelerator == "gpu" else "cpu")
            sizes, names = (trainer.dp_replicate, trainer.dp_shard), ("replicate", "shard")
            mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
            dtype = torch.bfloat16 if trainer.precision == "bf16-mixed" else torch.float32
            parallel.apply_fsdp(model, mesh if trainer.strategy == "hsdp" else mesh["shard"], dtype)
        parallel.materialize(model, device)
        if not self.fresh:
            return
        if self.config.model.init_from is None:
            torch.manual_seed(self.config.seed)
            model.init_weights(parallel.copy_full_weight)
        else:
            with prefix_errors("model"):
                load(model, Path(self.config.model.init_from), parallel.copy_full_weight)

    def on_train_start(self) -> None:
        """Apply the optimizer settings of this run: the checkpoint may come from a run with others."""
        peak = self.config.lr
        for optimizer, schedule in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=True):
            for group, settings in zip(optimizer.param_groups, self.optimizer_settings, strict=True):
                group.update(settings, initial_lr=peak, lr=self.lr_at(self.global_step))
            schedule.scheduler.base_lrs = [peak for _ in optimizer.param_groups]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copy a batch to the device. A GPU copies it while Python goes on, for which it must be in pinned memory."""
        if isinstance(batch, Batch) and device.type == "cuda":
            targets, mask = (None if part is None else part.pin_memory() for part in batch[1:3])
            batch = Batch(batch.tokens.pin_memory(), targets, mask, batch.masked_rows)
        return move_data_to_device(batch, device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Reduce sharded gradients after the last micro-batch of a step only. Lightning does so for other models."""
        parallel.set_gradient_sync(self.model, (batch_idx + 1) % self.config.trainer.grad_accum_steps == 0)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss to minimise, and the mean cross entropy of a batch in nats per token.

        Of a micro-batch with an instance mask, they are its part of the mean over the rows that contribute: the mean
        over the micro-batches of all processes is that of the global batch.
        """
        tokens = batch.tokens.long()
        targets = tokens[:, 1:] if batch.targets is None else batch.targets.long()
        loss, cross_entropy = self.model(tokens[:, :-1], targets, self.config.optim.z_loss, batch.instance_mask)
        if batch.instance_mask is None:
            return loss, cross_entropy
        rows = self.config.trainer.global_batch_size
        weight = rows / (rows - batch.masked_rows)
        return loss * weight, cross_entropy * weight

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return of a micro-batch `loss`, which is minimised, and `cross_entropy`, which is recorded."""
        loss, cross_entropy = self.loss(batch)
        return {"loss": loss, "cross_entropy": cross_entropy}

    def lr_factor(self, step: int) -> float:
        """Return the learning rate of an optimizer step, counted from 0, as a share of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.config.trainer.max_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        last = self.config.optim.final_lr_fraction
        return last + (1 - last) * cosine

    def lr_at(self, step: int) -> float:
        """Return the learning rate of an optimizer step, counted from 0."""
        return self.config.lr * self.lr_factor(step)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule, which advances every step."""
        optim = self.config.optim
        optimizer = make_optimizer(optim, self.named_parameters(), self.config.lr)
        self.optimizer_settings = [
            {key: group[key] for key in optim.arguments.keys() & group.keys()} for group in optimizer.param_groups
        ]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def test_step(self, validation_set: ValidationSet, batch_idx: int) -> None:
        """Evaluate a whole set, which is the only batch: `test_loss` is its mean loss in nats per token."""
        self.test_loss = self.evaluate(validation_set)

    def evaluate(self, validation_set: ValidationSet) -> float:
        """Return the mean loss over held-out tokens in nats per token. All processes of the run call it."""
        total, count = 0.0, 0
        for batch, tokens in validation_set:
            loss = self.loss(self.transfer_batch_to_device(batch, self.device, 0))[1]
            if tokens:
                total += float(loss) * tokens
                count += tokens
        strategy = self.trainer.strategy
        sums = torch.tensor([total, count], dtype=torch.float64, device=strategy.root_device)
        total, count = strategy.reduce(sums, reduce_op="sum").tolist()
        return total / count

    def reshard(self) -> None:
        """Free the full weights that a forward pass without a backward pass leaves gathered in a sharded model."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()
