"""Run train.py, killed (SIGKILL) at a named moment: `python killed.py MOMENT OVERRIDE ...`."""

import os
import runpy
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from training import checkpoint_files, checkpoints, folder, metrics
from training.module import PretrainingModule


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def while_saving(step: int) -> None:
    """Half of the checkpoint is on the disk."""
    write = checkpoints.write

    def half(checkpoint, path, *args):
        write(checkpoint, path, *args)
        if checkpoint["global_step"] == step:
            os.truncate(path, path.stat().st_size // 2)
            die()

    checkpoints.write = half


def after_saving(step: int) -> None:
    """The checkpoint has its name, older ones are still there."""
    sync = checkpoint_files._sync

    def last(path):
        sync(path)
        if path.is_dir() and (path / f"step-{step:08d}.ckpt").exists():
            die()

    checkpoint_files._sync = last


def in_a_line(step: int) -> None:
    """The last line of metrics.jsonl is cut."""
    flush = metrics.Metrics.flush

    def cut(self, trainer, module):
        flush(self, trainer, module)
        if trainer.global_step == step:
            os.truncate(self.folder.metrics, self.folder.metrics.stat().st_size - 40)
            die()

    metrics.Metrics.flush = cut


def in_evaluation(batch: int) -> None:
    """Some test batches are done."""
    test_step = PretrainingModule.test_step

    def until(self, tokens, index):
        if index == batch:
            die()
        test_step(self, tokens, index)

    PretrainingModule.test_step = until


def writing(name: str) -> None:
    """A file written whole is half there, under its other name."""
    for module in (folder, metrics):
        write = module.write_atomic

        def half(path, text, write=write):
            if path.name == name and text:
                path.with_name(f".saving-{path.name}").write_text(text[: len(text) // 2])
                die()
            write(path, text)

        module.write_atomic = half


MOMENTS = {
    "mid-save": lambda: while_saving(16),
    "after-save": lambda: after_saving(24),
    "line-before-checkpoint": lambda: in_a_line(6),
    "line": lambda: in_a_line(20),
    "rewriting-metrics": lambda: writing("metrics.jsonl"),
    "config": lambda: writing("config.yaml"),
    "environment": lambda: writing("environment.json"),
    "evaluation": lambda: in_evaluation(2),
}

if __name__ == "__main__":
    MOMENTS[sys.argv.pop(1)]()
    sys.argv[0] = str(Path(__file__).parents[2] / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
