"""The loader of a training run: one number says where it is.

It deals out the run's global batches in order, this rank's rows of each, and counts the sequences that all
ranks together have consumed. That count is its whole state, beside the place in the text where that is streamed; it is
the same on every rank, so a run may continue with another number of ranks or another micro-batch.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from data.batch import Batch
from data.corruption import BatchCorruption
from data.sequences import ShuffledDataset
from data.stream import StreamingDataset


class TrainLoader:
    """Iterate over the micro-batches of a run from wherever it stands.

    Args:
        sequences: what to read from.
        fingerprint: of the tokens; a state of other tokens is refused.
        steps: optimizer steps in the whole run.
        global_batch_size: sequences per optimizer step, over all ranks.
        micro_batch_size: sequences per forward pass on one rank; `world_size * micro_batch_size` divides
            `global_batch_size`.
        rank: of this process among `world_size`.
        world_size: number of data-parallel ranks.
        corruption: replaces batches at chosen steps; `None`: none.
        documents: whether batches say of which document each input is.
        skipped_batches: global batches, before this run's next one, on which no step was taken.
    """

    def __init__(
        self,
        sequences: ShuffledDataset | StreamingDataset,
        fingerprint: str,
        steps: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        corruption: BatchCorruption | None = None,
        documents: bool = False,
        skipped_batches: int = 0,
    ) -> None:
        self.sequences = sequences
        self.fingerprint = fingerprint
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.corruption = corruption
        self.documents = documents
        self.rank = rank
        self.world_size = world_size
        self.per_forward = micro_batch_size * world_size
        self.skipped_batches = skipped_batches
        self.steps = steps
        self.total = (steps + skipped_batches) * global_batch_size
        self.consumed = skipped_batches * global_batch_size

    def __len__(self) -> int:
        """Micro-batches of all steps, those already done included (Lightning counts from there)."""
        return self.steps * self.global_batch_size // self.per_forward

    def __iter__(self) -> Iterator[Batch]:
        """Yield micro-batches until the run's last; their ids are of the type they are stored in."""
        while self.consumed < self.total:
            first = self.consumed + self.rank * self.micro_batch_size
            batch = self.sequences.take(first, self.micro_batch_size, self.documents)
            if self.corruption:
                positions = np.arange(first, first + self.micro_batch_size)
                batch = self.corruption.replace(batch, positions, self.consumed // self.global_batch_size + 1)
            self.consumed += self.per_forward
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as JSON holds it: sequences consumed by all ranks, and of which tokens."""
        return {
            "sequences_consumed": self.consumed,
            "skipped_batches": self.skipped_batches,
            "fingerprint": self.fingerprint,
            **self.sequences.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position, or past it by the batches that were not passed over then.

        Raises:
            ValueError: it is a position in other tokens.
        """
        if state_dict["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"the checkpoint was trained on tokens {state_dict['fingerprint']}, but these are {self.fingerprint}"
            )
        self.sequences.load_state(state_dict)
        more = self.skipped_batches - state_dict.get("skipped_batches", 0)
        if more < 0:
            raise ValueError(f"the checkpoint had passed over {-more} more batches than this run: its rewinds are lost")
        self.consumed = state_dict["sequences_consumed"] + more * self.global_batch_size
