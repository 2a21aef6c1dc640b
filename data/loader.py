"""The loader of a training run. Its position is the number of sequences that all ranks together have consumed.

A stream adds the start of its block. A run that goes on with other data adds the position at which they begin: there
it takes their first sequence. The position is the same on every rank, so a run may be resumed on another number of
ranks or with another micro-batch size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import UserError, one_line
from common.reading import check_record
from data.config import InstanceFilterConfig
from data.corruption import BatchCorruption
from data.instance_filter import has_repetition
from data.sequences import Batch, ShuffledDataset
from data.shapes import LoaderState
from data.stream import StreamingDataset


class BatchShare(NamedTuple):
    """What one of `world_size` data-parallel ranks takes of each global batch."""

    global_batch_size: int  # sequences per optimizer step, over all ranks; a multiple of world_size * micro_batch_size
    micro_batch_size: int  # sequences per forward pass on one rank
    rank: int = 0
    world_size: int = 1


@dataclass(eq=False)
class TrainLoader:
    """Iterates over the micro-batches of a run from its current position."""

    sequences: ShuffledDataset | StreamingDataset
    fingerprint: str  # of the tokens; a state saved with other tokens is refused
    steps: int  # optimizer steps in the whole run
    share: BatchShare
    corruption: BatchCorruption | None = None  # replaces the batches of chosen steps
    skipped_batches: int = 0  # global batches before this run's next one on which no step was taken
    skipped_before: int = 0  # those of them that a saved position must have skipped already
    instance_filter: InstanceFilterConfig | None = None  # masks rows, corrupted or not; `None`: none
    new_data_after: int | None = None  # global batches before these data, if the saved position is one in other data

    def __post_init__(self) -> None:
        self.per_forward = self.share.micro_batch_size * self.share.world_size
        self.total = (self.steps + self.skipped_batches) * self.share.global_batch_size
        self.consumed = self.skipped_batches * self.share.global_batch_size
        #: Sequences of the run before the first one of these data.
        self.data_start = 0
        #: Position, rows and mask of the global batch that was filtered last.
        self._filtered: tuple[int, Batch, Tensor] | None = None

    def __len__(self) -> int:
        """Number of micro-batches of all steps, including those already done, because Lightning counts them too."""
        return self.steps * self.share.global_batch_size // self.per_forward

    def __iter__(self) -> Iterator[Batch]:
        """Yield micro-batches up to the end of the run, with ids of the data type in which they are stored."""
        while self.consumed < self.total:
            first = self.consumed + self.share.rank * self.share.micro_batch_size
            step = self.consumed // self.share.global_batch_size - self.skipped_batches + 1
            self.consumed += self.per_forward
            if self.instance_filter is None:
                yield self._take(first, self.share.micro_batch_size, step)
            else:
                yield self._take_filtered(self.instance_filter, first, step)

    def _take(self, first: int, rows: int, step: int) -> Batch:
        """Return the rows from position `first` of the run on, as they are trained on at a step."""
        tokens = self.sequences.take(first - self.data_start, rows)
        return self.corruption.replace(tokens, first, step) if self.corruption else Batch(tokens)

    def _take_filtered(self, instance_filter: InstanceFilterConfig, first: int, step: int) -> Batch:
        """Return the micro-batch at a position with its mask.

        Every rank filters the whole global batch, so that all know how many rows are masked without a message.
        """
        start = first - first % self.share.global_batch_size
        if self._filtered is None or self._filtered[0] != start:
            batch = self._take(start, self.share.global_batch_size, step)
            self._filtered = start, batch, torch.from_numpy(~has_repetition(batch.tokens.numpy(), instance_filter))
        _, batch, mask = self._filtered
        rows = slice(first - start, first - start + self.share.micro_batch_size)
        masked = len(mask) - int(mask.sum())
        targets = None if batch.targets is None else batch.targets[rows]
        return Batch(batch.tokens[rows], targets, mask[rows] if 0 < masked < len(mask) else None, masked)

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values for JSON."""
        return {
            "sequences_consumed": self.consumed,
            "skipped_batches": self.skipped_batches,
            "fingerprint": self.fingerprint,
            **({"data_start": self.data_start} if self.data_start else {}),
            **self.sequences.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved position, and advance by the batches that were skipped since it was saved.

        With `new_data_after`, it is one in other data: these begin with their first sequence after so many batches.

        Raises:
            UserError: it is a position in other tokens, or none.
        """
        try:
            state = check_record(LoaderState, state_dict)
            if self.new_data_after is not None:
                self.data_start = self.new_data_after * self.share.global_batch_size
            elif state.fingerprint != self.fingerprint:
                raise UserError(
                    f"the checkpoint was trained on tokens {state.fingerprint}, but these are {self.fingerprint}"
                )
            else:
                self.data_start = state.data_start
                self.sequences.load_state(state_dict)
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise UserError(f"the checkpoint has no position in these tokens ({one_line(error)})") from error
        newly_skipped = self.skipped_batches - state.skipped_batches
        if newly_skipped < 0:
            raise UserError(
                f"the checkpoint has skipped {-newly_skipped} more batches than this run: the record of its rewinds "
                "is missing, restore rewinds.json"
            )
        if state.skipped_batches < self.skipped_before:
            raise UserError(
                f"rewinds.json has {self.skipped_before - state.skipped_batches} skipped batches more than the "
                "checkpoint, which is from after that rewind: it is of another run, or was edited; restore it"
            )
        self.consumed = state.sequences_consumed + newly_skipped * self.share.global_batch_size
