"""The model as Lightning trains it: loss, optimizer and learning-rate schedule (the paper's Table 1)."""

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

from data import Batch
from models import Llama
from models.parallel import set_gradient_sync
from training.validation.validation_set import Share, ValidationSet


class PretrainingModule(pl.LightningModule):
    """Next-token prediction with a LLaMA.

    Args:
        model: to be trained.
        lr: peak learning rate.
        steps: optimizer steps of the whole run, for the schedule.
        betas, eps, weight_decay, fused: of AdamW; the decay applies to every parameter.
        warmup_fraction: share of the steps over which the learning rate rises linearly from 0.
        final_lr_fraction: where the cosine ends, as a share of `lr`.
        z_loss: weight of the squared logarithm of the softmax's denominator in what is minimised.
        prepare_model: called with the model once, when the processes of the run know of each other.
        micro_batches: backward passes in an optimizer step.
    """

    def __init__(
        self,
        model: Llama,
        lr: float,
        steps: int,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        fused: bool,
        warmup_fraction: float,
        final_lr_fraction: float,
        z_loss: float = 0.0,
        prepare_model: Callable[[Llama], None] | None = None,
        micro_batches: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.lr = lr
        self.steps = steps
        self.adamw: dict[str, Any] = {
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "fused": fused,
        }
        self.warmup_steps = round(warmup_fraction * steps)
        self.final_lr_fraction = final_lr_fraction
        self.z_loss = z_loss
        self.prepare_model = prepare_model
        self.micro_batches = micro_batches
        self._test_sum = torch.zeros((), dtype=torch.float64)
        self._test_tokens = 0

    def configure_model(self) -> None:
        """Compile, shard and so on, the first time that Lightning asks."""
        prepare_model, self.prepare_model = self.prepare_model, None
        if prepare_model is not None:
            prepare_model(self.model)

    def on_train_start(self) -> None:
        """Go on with this run's settings: a checkpoint may be of a run with others."""
        for optimizer, schedule in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=True):
            for group in optimizer.param_groups:
                group.update(self.adamw, initial_lr=self.lr, lr=self.lr * self.lr_factor(self.global_step))
            schedule.scheduler.base_lrs = [self.lr for _ in optimizer.param_groups]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Have sharded gradients reduced after the last micro-batch of a step only; Lightning sees to the others."""
        set_gradient_sync(self.model, (batch_idx + 1) % self.micro_batches == 0)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what is to be minimised, and the mean cross entropy of a batch in nats per token."""
        tokens = batch.tokens.long()
        targets = tokens[:, 1:] if batch.targets is None else batch.targets.long()
        return self.model(tokens[:, :-1], targets, self.z_loss)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return `loss` of one micro-batch, to be minimised, and `cross_entropy`, to be recorded."""
        loss, cross_entropy = self.loss(batch)
        return {"loss": loss, "cross_entropy": cross_entropy}

    def lr_factor(self, step: int) -> float:
        """Return the learning rate of optimizer step `step` (from 0) as a share of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule, advanced every step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, **self.adamw)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_test_epoch_start(self) -> None:
        """Forget an earlier evaluation."""
        self._test_sum = torch.zeros((), dtype=torch.float64)
        self._test_tokens = 0

    def evaluate(self, held_out: ValidationSet) -> float:
        """Return the mean loss over held-out tokens in nats per token. All processes of the run call it."""
        self.on_test_epoch_start()
        for share in held_out:
            batch = move_data_to_device(share.batch, self.device)
            self.test_step(share._replace(batch=batch), 0)
        self.on_test_epoch_end()
        return self.test_loss

    def test_step(self, share: Share, batch_idx: int) -> None:
        """Add one batch of held-out sequences, which may be smaller than the others, to the sum."""
        loss = self.loss(share.batch)[1]
        if share.tokens:
            self._test_sum += loss.to("cpu", torch.float64) * share.tokens
            self._test_tokens += share.tokens

    def on_test_epoch_end(self) -> None:
        """Add up what the processes have found."""
        strategy = self.trainer.strategy
        both = torch.stack([self._test_sum, torch.tensor(self._test_tokens, dtype=torch.float64)])
        both = strategy.reduce(both.to(strategy.root_device), reduce_op="sum").cpu()
        self._test_sum, self._test_tokens = both[0], int(both[1])

    @property
    def test_loss(self) -> float:
        """Mean loss over all held-out tokens of the last evaluation, in nats per token."""
        return float(self._test_sum) / self._test_tokens
