"""Memory and speed of devices, the memory that this process uses, and the FLOPs of a model."""

import os
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from models import LlamaConfig

#: Dense bf16 FLOP/s of NVIDIA's data sheets, by a part of torch's name for the device. The first match counts.
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
    """Return the dense bf16 FLOP/s of a device by its name; `None` if it is unknown."""
    return next((flops for part, flops in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", device)), None)


def flops_per_token(config: LlamaConfig, sequence_length: int) -> float:
    """Return the FLOPs of the forward and backward pass for one token.

    They are 6 per weight of a matrix product, and 12 per layer, channel and position for attention, as if it were not
    causal (PaLM, appendix B). An embedding that is only looked up does not count. The paper's 1B model has 6.43e9.
    """
    matmul_weights = config.parameters - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    return 6 * matmul_weights + 12 * config.num_hidden_layers * config.hidden_size * sequence_length


def available_memory(accelerator: str, processes: int) -> int:
    """Return the bytes available to each process: its GPU's memory, or its share of the machine's or container's.

    `processes` is the number of those that share this machine.
    """
    if accelerator == "gpu":
        return torch.cuda.mem_get_info()[1]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, container_memory() or machine) // processes


def container_memory(proc: Path = Path("/proc/self"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes to which cgroups (v2 or v1) limit this process; `None` if they do not."""
    try:
        lines = (proc / "cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return None
    limits: list[int] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            limits += _group_limits(cgroups, path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _group_limits(cgroups / "memory", path, "memory.limit_in_bytes")
    unlimited = 1 << 60  # v1 writes the largest multiple of a page
    return min((limit for limit in limits if 0 < limit < unlimited), default=None)


def _group_limits(root: Path, path: str, name: str) -> list[int]:
    """Return the limits of a control group, such as `/system.slice/a.service`, and of all groups above it.

    Inside a container the group's own path may not be mounted. Its limit is then in the root.
    """
    limits = []
    parts = [part for part in path.split("/") if part]
    if ".." in parts:  # the group is outside of the cgroup namespace, and what is mounted is not above it
        parts = []
    for depth in range(len(parts) + 1):
        with suppress(OSError, ValueError):  # "max" is no limit
            limits.append(int(root.joinpath(*parts[:depth], name).read_text()))
    return limits


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak that `peak_memory` reports, where the system can do so."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process since the reset, in bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        if peak := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return int(peak[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
