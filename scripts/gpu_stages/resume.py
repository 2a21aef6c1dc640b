"""A run that resumes ends with the same bits, and what a checkpoint costs while it trains.

The backward pass of attention on a GPU adds in any order unless torch is told otherwise. If the runs differ, they are
made again with deterministic algorithms.
"""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from scripts.gpu_stages.context import Context, metrics
from training.run_dir import RunDir


def run(context: Context) -> None:
    """Save how many tensors are equal, and the seconds for which steps waited for a checkpoint."""
    last = 8 if context.dry_run else 40
    settings = (*context.model(), f"trainer.max_steps={last}", f"trainer.checkpoint_every={last // 2}")
    if not context.dry_run:
        settings = (*settings, "trainer.global_batch_size=32", "trainer.micro_batch_size=32")
    same = compare(context, "resume", last, settings)
    context.save(**same)
    if same["equal"] < same["tensors"]:
        same = compare(context, "resume-deterministic", last, settings, deterministic=True)
        context.save(deterministic=same)
    if same["equal"] < same["tensors"] or not same["same_losses"]:
        raise RuntimeError(f"{same['tensors'] - same['equal']} of {same['tensors']} tensors differ after resuming")


def compare(
    context: Context, name: str, last: int, settings: tuple[str, ...], deterministic: bool = False
) -> dict[str, Any]:
    """Return what is equal after a run of `last` steps, and after its second half is run again."""
    folder = context.train(name, *settings, "trainer.async_save=true", deterministic=deterministic)
    checkpoint, rows = RunDir(folder).checkpoint(last), metrics(folder)
    straight = _tensors(torch.load(checkpoint, weights_only=True))
    checkpoint.unlink()
    (folder / "result.json").unlink()
    context.train(name, *settings, "trainer.async_save=false", deterministic=deterministic)
    resumed, again = _tensors(torch.load(checkpoint, weights_only=True)), metrics(folder)
    return {
        "tensors": max(len(straight), len(resumed)),
        "equal": sum(map(torch.equal, straight, resumed)),
        "same_losses": [row["loss"] for row in rows] == [row["loss"] for row in again],
        "checkpoint_gb": round(sum(tensor.nbytes for tensor in straight) / 1e9, 3),
        "async_stall_seconds": max(row["saving_seconds"] for row in rows),
        "plain_stall_seconds": max(row["saving_seconds"] for row in again),
    }


def _tensors(checkpoint: dict[str, Any]) -> list[torch.Tensor]:
    leaves = tree_leaves([checkpoint["state_dict"], checkpoint["optimizer_states"]])
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
