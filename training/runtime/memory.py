"""How much memory there is, and how much a run takes."""

import os
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch
from omegaconf import DictConfig


def available_memory(cfg: DictConfig) -> int:
    """Return the bytes that each process of a run may take: those of its GPU, or its share of those of the machine."""
    if cfg.trainer.accelerator == "gpu":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // cfg.trainer.devices


def reset_peak_memory(device: torch.device) -> None:
    """Forget how much this process has had at most, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has had since the reset: allocated on a GPU, resident otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
