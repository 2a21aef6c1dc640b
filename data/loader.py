"""The loader of a training run: one number says where it is.

It deals out the run's global batches in order, this rank's rows of each, and counts the sequences that all
ranks together have consumed. That count is its whole state, beside the place in the text where that is streamed; it is
the same on every rank, so a run may continue with another number of ranks or another micro-batch.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from data.bad_batches import BadBatches
from data.batch import Batch
from data.sequences import Shuffled
from data.stream import Streamed


class SequenceLoader:
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
        bad_batches: replaces batches at chosen steps; `None`: none.
        documents: whether batches say of which document each input is.
        passed_over: global batches, before this run's next one, on which no step was taken.
    """

    def __init__(
        self,
        sequences: Shuffled | Streamed,
        fingerprint: str,
        steps: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        bad_batches: BadBatches | None = None,
        documents: bool = False,
        passed_over: int = 0,
    ) -> None:
        self.sequences = sequences
        self.fingerprint = fingerprint
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.bad_batches = bad_batches
        self.documents = documents
        self.rank = rank
        self.world_size = world_size
        self.per_forward = micro_batch_size * world_size
        self.passed_over = passed_over
        self.steps = steps
        self.total = (steps + passed_over) * global_batch_size
        self.consumed = passed_over * global_batch_size

    def __len__(self) -> int:
        """Micro-batches of all steps, those already done included (Lightning counts from there)."""
        return self.steps * self.global_batch_size // self.per_forward

    def __iter__(self) -> Iterator[Batch]:
        """Yield micro-batches until the run's last; their ids are of the type they are stored in."""
        while self.consumed < self.total:
            first = self.consumed + self.rank * self.micro_batch_size
            batch = self.sequences.take(first, self.micro_batch_size, self.documents)
            if self.bad_batches:
                positions = np.arange(first, first + self.micro_batch_size)
                batch = self.bad_batches.replace(batch, positions, self.consumed // self.global_batch_size + 1)
            self.consumed += self.per_forward
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as JSON holds it: sequences consumed by all ranks, and of which tokens."""
        return {
            "sequences_consumed": self.consumed,
            "passed_over": self.passed_over,
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
        more = self.passed_over - state_dict.get("passed_over", 0)
        if more < 0:
            raise ValueError(f"the checkpoint had passed over {-more} more batches than this run: its rewinds are lost")
        self.consumed = state_dict["sequences_consumed"] + more * self.global_batch_size
