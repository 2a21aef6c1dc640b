"""Loss on held-out text: on some of it every `trainer.val_every` steps, in val_metrics.jsonl, and on all at the end."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from common.files import write_atomic
from common.text import every
from data import Batch, TokenDataset
from training.config.schema import TrainerConfig
from training.run_dir import RunDir
from training.runtime.distributed import broadcast_from_rank0, rank
from training.validation.report import EvaluationReport


class ValidationSet:
    """The held-out sequences in batches, in order, once; distributed over the processes of a run.

    Each process gets the same number of batches, as sharded models need. At most `max_tokens` tokens are evaluated, in
    whole sequences, but at least one sequence; `None` stands for all.
    """

    def __init__(
        self,
        sequences: TokenDataset,
        batch_size: int,
        max_tokens: float | None,
        console: Console,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        limit = len(sequences) if max_tokens is None else max(1, int(max_tokens) // sequences.length)
        self.sequences = sequences
        self.batch_size = batch_size
        self.count = min(len(sequences), limit)
        self.tokens = self.count * sequences.length
        self.console = console
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Batches of this process."""
        return math.ceil(math.ceil(self.count / self.batch_size) / self.world_size)

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        """Yield batches, each with the number of its tokens that count.

        It is 0 if another process counts them, and this process evaluates them only to make as many forward passes.
        """
        line_due = every()
        for number in range(len(self)):
            if line_due():
                self.console.print(f"evaluated {number / len(self):.0%}")
            first = (number * self.world_size + self.rank) * self.batch_size
            counts = first < self.count
            first = first if counts else 0
            rows = np.arange(first, min(first + self.batch_size, self.count))
            tokens = len(rows) * self.sequences.length if counts else 0
            yield Batch(self.sequences.batch(rows)), tokens


def bits_per_byte(loss: float, tokens: int, size: float) -> float:
    """Return the bits per byte of a text, which can be compared between tokenizers.

    `loss` is the mean in nats per token of a text of so many tokens, whose size is in bytes.
    """
    return loss * tokens / size / math.log(2)


@dataclass
class LossValidator:
    """Evaluates the loss on held-out text during training.

    Training waits for it and is not changed: no random number is drawn, and no gradient is computed.
    `text_bytes` is the size of the text that the set's tokens stand for.
    """

    run_dir: RunDir
    trainer: TrainerConfig
    validation_set: ValidationSet
    text_bytes: float
    report: EvaluationReport

    def __post_init__(self) -> None:
        self._rows: list[dict[str, Any]] = []  # on rank 0

    def start(self, step: int) -> None:
        """Drop the results of later steps than the one that the run resumes from: they will be computed again."""
        if rank() == 0:
            self._rows = [row for row in self.run_dir.val_metrics() if row["step"] <= step]
            if self.run_dir.val_metrics_file.exists():
                self._write()

    def _write(self) -> None:
        """Write all results so far, whatever others have made of the file."""
        with self.report.tolerate_io_errors():
            write_atomic(self.run_dir.val_metrics_file, "".join(json.dumps(row) + "\n" for row in self._rows))

    def is_due(self, step: int) -> bool:
        """Whether the loss is to be evaluated after a step. The last step has the final evaluation instead."""
        interval = self.trainer.val_every
        return interval is not None and step % interval == 0 and step < self.trainer.max_steps

    def validate(self, step: int, evaluate: Callable[[ValidationSet], float]) -> None:
        """Evaluate the loss after a step, unless its result is there already. All processes call it.

        `evaluate` returns the mean loss in nats per token.
        """
        if step in broadcast_from_rank0(lambda: [row["step"] for row in self._rows]):
            return
        loss = evaluate(self.validation_set)
        if rank() > 0:
            return
        tokens = self.validation_set.tokens
        numbers: dict[str, float] = {}
        if math.isfinite(loss):
            numbers = {
                "val_loss": loss,
                "val_perplexity": math.exp(min(loss, 700.0)),
                "val_bits_per_byte": bits_per_byte(loss, tokens, self.text_bytes),
            }
        row: dict[str, Any] = {"step": step, "val_tokens": tokens, **numbers}
        self._rows.append(row)
        self._write()
        text = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
        self.report.report(step, text or "val loss not finite", numbers)
