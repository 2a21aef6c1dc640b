"""The machine: versions, memory, and the rates of a matrix product and of copies."""

import os
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch

from scripts._bench import DEVICE, GPU, median_seconds
from scripts.gpu_stages.context import Context
from training.runtime.environment import environment

PACKAGES = ("triton", "transformers", "lm-eval", "datasets", "pyarrow", "pydantic", "filelock", "nvidia-nccl-cu13")


def run(context: Context) -> None:
    """Save what the other numbers depend on."""
    machine = environment()
    versions = machine["versions"] | {name: _version(name) for name in PACKAGES}
    context.save(device=machine["device"], commit=machine["commit"], versions=versions, cpus=os.cpu_count())
    context.save(disk_free_gb=round(shutil.disk_usage(context.out).free / 1e9))
    if GPU:
        driver = torch.cuda.get_device_properties(0)
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        context.save(memory_gib=round(driver.total_memory / 2**30, 1), cuda=torch.version.cuda, nccl=nccl)
    n, size = (256, 1 << 20) if context.dry_run else (8192, 1 << 32)
    x = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    context.save(matmul_tflops=round(2 * n**3 / median_seconds({"": lambda: x @ x}, 10)[""] / 1e12, 2))
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    # A copy reads and writes each byte.
    seconds = median_seconds({"": lambda: target.copy_(source)}, 10)[""]
    context.save(copy_gb_per_s=round(2 * size / seconds / 1e9, 1))
    part = source[: size // 4]
    pageable = torch.empty_like(part, device="cpu")
    hosts = {"pageable": pageable, "pinned": torch.empty_like(pageable, pin_memory=GPU)}
    for name, host in hosts.items():
        host.fill_(0)  # the system gives the pages now
        seconds = median_seconds({"": lambda host=host: host.copy_(part)}, 3)[""]  # type: ignore[misc]
        context.save(**{f"to_{name}_gb_per_s": round(len(part) / seconds / 1e9, 1)})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
