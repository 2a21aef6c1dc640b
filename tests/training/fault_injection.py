"""Run train.py and kill it (SIGKILL) at a named moment: `python fault_injection.py MOMENT OVERRIDE ...`."""

import os
import runpy
import signal
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from common import files
from training import run_dir
from training.checkpoint import manager
from training.monitor import metrics
from training.validation.loss import ValidationSet


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def while_saving(step: int) -> None:
    """Kill the run when half of a checkpoint is on the disk."""
    write = manager.write

    def write_half(checkpoint, path, *args):
        write(checkpoint, path, *args)
        if checkpoint["global_step"] == step:
            os.truncate(path, path.stat().st_size // 2)
            kill_self()

    manager.write = write_half


def after_saving(step: int) -> None:
    """Kill the run when a checkpoint has its final name, and older ones are not removed yet."""
    sync = files.sync

    def sync_last(path):
        sync(path)
        if path.is_dir() and (path / f"step-{step:08d}.ckpt").exists():
            kill_self()

    files.sync = sync_last


def while_writing_metrics(step: int) -> None:
    """Kill the run when the last line of metrics.jsonl is incomplete."""
    flush = metrics.MetricsRecorder.flush

    def flush_part(self):
        flushed = flush(self)
        if flushed and flushed[-1][0] == step:
            os.truncate(self.run_dir.metrics_file, self.run_dir.metrics_file.stat().st_size - 40)
            kill_self()
        return flushed

    metrics.MetricsRecorder.flush = flush_part


def while_evaluating(batch: int) -> None:
    """Kill the run after some batches of the final evaluation."""
    batches = ValidationSet.__iter__

    def batches_until(self):
        yield from islice(batches(self), batch)
        kill_self()

    ValidationSet.__iter__ = batches_until


def while_writing(name: str) -> None:
    """Kill the run when an atomic file is half written under its temporary name."""
    for module in (run_dir, metrics):
        write_atomic = module.write_atomic

        def write_half(path, text, write_atomic=write_atomic):
            if path.name == name and text:
                files.tmp_path(path).write_bytes((text if isinstance(text, bytes) else text.encode())[: len(text) // 2])
                kill_self()
            write_atomic(path, text)

        module.write_atomic = write_half


MOMENTS = {
    "mid-save": lambda: while_saving(16),
    "after-save": lambda: after_saving(24),
    "line-before-checkpoint": lambda: while_writing_metrics(6),
    "line": lambda: while_writing_metrics(20),
    "rewriting-metrics": lambda: while_writing("metrics.jsonl"),
    "config": lambda: while_writing("config.yaml"),
    "environment": lambda: while_writing("environment.json"),
    "evaluation": lambda: while_evaluating(2),
}

if __name__ == "__main__":
    MOMENTS[sys.argv.pop(1)]()
    sys.argv[0] = str(Path(__file__).parents[2] / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
