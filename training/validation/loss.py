"""Loss on held-out text every `trainer.val_every` steps, in val_metrics.jsonl."""

import json
import math
from collections.abc import Callable
from typing import Any

from common.files import write_atomic
from data import Tokenizer
from training.config.schema import TrainerConfig
from training.run_dir import RunDir
from training.runtime.distributed import broadcast_from_rank0, rank
from training.validation.report import EvaluationReport
from training.validation.validation_set import ValidationSet, bits_per_byte


class LossValidator:
    """Evaluates the loss on held-out text during training.

    Training waits for it and is not changed: no random number is drawn, and no gradient is computed.

    Args:
        run_dir: run folder.
        trainer: `val_every` and `max_steps`.
        validation_set: held-out sequences.
        tokenizer: tokenizer of the run.
        report: where the results go.
    """

    def __init__(
        self,
        run_dir: RunDir,
        trainer: TrainerConfig,
        validation_set: ValidationSet,
        tokenizer: Tokenizer,
        report: EvaluationReport,
    ) -> None:
        self.run_dir = run_dir
        self.trainer = trainer
        self.validation_set = validation_set
        self.tokenizer = tokenizer
        self.report = report
        self._bytes: int | None = None

    def start(self, step: int) -> None:
        """Drop the results of later steps than the one that the run resumes from: they will be computed again."""
        if rank() == 0:
            rows = [row for row in self.run_dir.val_metrics() if row["step"] <= step]
            if rows or self.run_dir.val_metrics_file.exists():
                write_atomic(self.run_dir.val_metrics_file, "".join(json.dumps(row) + "\n" for row in rows))

    def is_due(self, step: int) -> bool:
        """Whether the loss is to be evaluated after a step. The last step has the final evaluation instead."""
        every = self.trainer.val_every
        return every is not None and step % every == 0 and step < self.trainer.max_steps

    def validate(self, step: int, evaluate: Callable[[ValidationSet], float]) -> None:
        """Evaluate the loss after a step, unless its result is there already. All processes call it.

        Args:
            step: optimizer step, counted from 1.
            evaluate: returns the mean loss over held-out sequences in nats per token.
        """
        if step in broadcast_from_rank0(lambda: [row["step"] for row in self.run_dir.val_metrics()]):
            return
        loss = evaluate(self.validation_set)
        if rank() > 0:
            return
        if self._bytes is None:
            self._bytes = self.validation_set.bytes(self.tokenizer)
        tokens = self.validation_set.tokens
        numbers: dict[str, float] = {}
        if math.isfinite(loss):
            numbers = {
                "val_loss": loss,
                "val_perplexity": math.exp(min(loss, 700.0)),
                "val_bits_per_byte": bits_per_byte(loss, tokens, self._bytes),
            }
        row: dict[str, Any] = {"step": step, "val_tokens": tokens, **numbers}
        with self.report.tolerate_io_errors(), self.run_dir.val_metrics_file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        text = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
        self.report.report(step, text or "val loss not finite", numbers)
