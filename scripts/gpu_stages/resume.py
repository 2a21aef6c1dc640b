"""A run that resumes ends with the same bits, and what a checkpoint costs while it trains."""

import torch
from torch.utils._pytree import tree_leaves

from scripts.gpu_stages.context import Context, metrics
from training.run_dir import RunDir


def run(context: Context) -> None:
    """Save whether weights and optimizer are equal, and the seconds for which steps waited for a checkpoint."""
    last = 8 if context.dry_run else 40
    settings = (*context.model(), f"trainer.max_steps={last}", f"trainer.checkpoint_every={last // 2}")
    if not context.dry_run:
        settings = (*settings, "trainer.global_batch_size=32", "trainer.micro_batch_size=32")
    folder = context.train("resume", *settings, "trainer.async_save=true")
    context.save(async_stall_seconds=_stall(metrics(folder)))
    checkpoint = RunDir(folder).checkpoint(last)
    straight = _tensors(torch.load(checkpoint, weights_only=True, mmap=True))
    straight = [tensor.clone() for tensor in straight]
    losses = [row["loss"] for row in metrics(folder)]
    checkpoint.unlink()
    (folder / "result.json").unlink()
    context.train("resume", *settings, "trainer.async_save=false")
    resumed = _tensors(torch.load(checkpoint, weights_only=True, mmap=True))
    equal = sum(map(torch.equal, straight, resumed))
    same_losses = losses == [row["loss"] for row in metrics(folder)]
    context.save(tensors=len(straight), equal=equal, same_losses=same_losses)
    context.save(plain_stall_seconds=_stall(metrics(folder)))
    if equal != len(straight) or len(straight) != len(resumed):
        raise RuntimeError(f"{len(straight) - equal} of {len(straight)} tensors differ after resuming")


def _tensors(checkpoint: dict[str, object]) -> list[torch.Tensor]:
    leaves = tree_leaves([checkpoint["state_dict"], checkpoint["optimizer_states"]])
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _stall(rows: list[dict[str, float]]) -> float:
    return max(row["saving_seconds"] for row in rows)
