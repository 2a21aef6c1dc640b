"""Planned memory is what torch's own trackers see in a step, on tensors without content and without the ranks."""

import pytest

from tests.helpers import compose_config
from tests.training.memory_tracker import peak_bytes
from training.launch.plan import plan

STRATEGIES = {
    1: ("trainer.accelerator=gpu", "trainer.precision=bf16-mixed"),
    8: ("trainer=fsdp",),
    64: ("trainer=fsdp", "trainer.nodes=8"),
    "8 x 8": ("trainer=hsdp", "trainer.nodes=8"),
}


def compared(strategy: int | str, batch: int, accumulated: int, *settings: str) -> tuple[float, int]:
    """Return the planned bytes of a configuration on GPUs, and those that torch tracks."""
    ranks = strategy if isinstance(strategy, int) else 64
    batches = (f"trainer.micro_batch_size={batch}", f"trainer.global_batch_size={batch * ranks * accumulated}")
    config = compose_config(*STRATEGIES[strategy], *batches, *settings, "plan=true")
    return plan(config).bytes, peak_bytes(config)


@pytest.mark.parametrize("amsgrad", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_planned_memory_of_two_layers_is_what_torch_tracks(amsgrad):
    settings = ("model=60m", "model.num_hidden_layers=2", "data.sequence_length=512", f"optim.amsgrad={amsgrad}")
    planned, tracked = compared(8, 4, 1, *settings)
    assert planned == pytest.approx(tracked, rel=0.1)


#: Each takes ten seconds or so: those of the larger models have one way of recomputing each.
CASES = [
    *(("60m", 1024, 4, strategy, recomputed, 1) for strategy in STRATEGIES for recomputed in ("none", "full")),
    *(("1b", 2048, 4, strategy, "none", 1) for strategy in (1, 8, 64)),
    *(("1b", 2048, 4, strategy, "selective", 1) for strategy in (1, 8, 64)),
    *(("7b", 2048, 1, strategy, "full", 1) for strategy in (1, 8, 64)),
    ("60m", 1024, 4, 8, "none", 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "length", "batch", "strategy", "recomputed", "accumulated"), CASES)
def test_planned_memory_is_within_a_tenth_of_what_torch_tracks(model, length, batch, strategy, recomputed, accumulated):
    settings = (f"data.sequence_length={length}", f"trainer.activation_checkpointing={recomputed}")
    planned, tracked = compared(strategy, batch, accumulated, f"model={model}", *settings)
    assert planned == pytest.approx(tracked, rel=0.1)
