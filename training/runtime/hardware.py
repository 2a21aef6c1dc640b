"""Memory and speed of devices: what there is, what this process has taken, and the arithmetic of a model."""

import os
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from models import LlamaConfig

#: Dense bf16 FLOP/s that NVIDIA states for a device, by a part of the name that torch gives it.
PEAK_FLOPS = {
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "L4": 121e12,
    "4090": 165.2e12,
    "3090": 71e12,
}


def peak_flops(device: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device by its name; `None` if it is not known."""
    return next((value for part, value in PEAK_FLOPS.items() if part in device), None)


def flops_per_token(config: LlamaConfig, sequence_length: int) -> float:
    """Return the FLOPs of the forward and backward pass for one token.

    Six for each weight that is multiplied (embeddings are looked up); for attention twelve for each layer, channel and
    position, as if it were not causal (PaLM, appendix B). The paper's 1B model has 6.43e9.
    """
    multiplied = config.parameters - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    return 6 * multiplied + 12 * config.num_hidden_layers * config.hidden_size * sequence_length


def available_memory(accelerator: str, processes: int) -> int:
    """Return the bytes that each process may take: its GPU's memory, or its share of the machine's or container's.

    Args:
        accelerator: cpu or gpu.
        processes: that share this machine.
    """
    if accelerator == "gpu":
        return torch.cuda.mem_get_info()[1]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, container_memory() or machine) // processes


def container_memory(proc: Path = Path("/proc/self"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes to which cgroups (v2 or v1) limit this process; `None` if they do not.

    Args:
        proc: folder of this process in procfs.
        cgroups: where the cgroup file systems are mounted.
    """
    with suppress(OSError, ValueError):
        limits: list[int] = []
        for line in (proc / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                root, name = cgroups, "memory.max"
            elif "memory" in controllers.split(","):
                root, name = cgroups / "memory", "memory.limit_in_bytes"
            else:
                continue
            group = root / path.lstrip("/")
            # A limit of any group above holds too; inside a container the path may not be mounted, but its root is.
            for folder in [group, *group.parents]:
                if folder != root and root not in folder.parents:
                    break
                with suppress(OSError, ValueError):
                    limits.append(int((folder / name).read_text()))  # "max" is no number
        unlimited = 1 << 60  # v1 writes the largest multiple of a page
        return min((limit for limit in limits if 0 < limit < unlimited), default=None)
    return None


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak that `peak_memory` reports, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process since the reset in bytes: allocated on a GPU, resident otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        if peak := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return int(peak[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
