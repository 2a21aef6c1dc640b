"""How a run is split over its processes: what follows from `cfg.trainer`, in one place."""

from omegaconf import DictConfig


def world_size(cfg: DictConfig) -> int:
    """Return the number of processes of a run."""
    return cfg.trainer.nodes * cfg.trainer.devices


def sharded(cfg: DictConfig) -> bool:
    """Whether no process holds the whole model."""
    return cfg.trainer.strategy in ("fsdp", "hsdp")


def shards(cfg: DictConfig) -> int:
    """Return over how many processes each copy of the model is spread."""
    return world_size(cfg) // cfg.trainer.dp_replicate if sharded(cfg) else 1


def micro_batches(cfg: DictConfig) -> int:
    """Return the backward passes of each process in an optimizer step."""
    return cfg.trainer.global_batch_size // (cfg.trainer.micro_batch_size * world_size(cfg))
