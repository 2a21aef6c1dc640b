"""What is installed by others: the wheel, the files that go into containers, and what states the version."""

import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.helpers import CHECKOUT, Once, make
from tests.test_docs import blocks, check_command, commands

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
#: What README's example finds, as in tests/test_docs.py, and what must be true after it.
BEFORE = """
import torch

class Model(torch.nn.Linear):
    def forward(self, batch):
        return super().forward(batch).square().mean()

model, batches = Model(4, 2), torch.randn(30, 8, 4)
optimizer, loss = torch.optim.AdamW(model.parameters()), model(batches[0])
"""
AFTER = """
for batch in batches:
    model(batch).backward()
    optimizer.step()
    optimizer.zero_grad()
import zclip as library
(strategy,) = [value for value in vars().copy().values() if isinstance(value, library.ClippingStrategy)]
print(strategy.read_telemetry()["grad_norm"])
"""


def distributions(name: str) -> set[str]:
    """Return the installed distributions that one needs, itself among them."""
    found, waiting = set(), [name]
    while waiting:
        found.add(name := waiting.pop())
        requirements = map(Requirement, importlib.metadata.requires(name) or [])
        needed = [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
        waiting += [other for other in needed if other not in found]
    return found


def build_wheel(folder: Path) -> None:
    """Build the wheel by the command of `make wheel`, from a copy of the checkout, without downloads."""
    left_out = shutil.ignore_patterns(".*", "runs", "cache", "build", "dist", "mutants", "wandb", "*.egg-info")
    shutil.copytree(CHECKOUT, folder / "checkout", ignore=left_out, symlinks=True)
    (command,) = [line for line in make("--dry-run", "wheel").splitlines() if " pip wheel " in line]
    words = [sys.executable, *shlex.split(command)[1:], "--no-build-isolation"]
    done = subprocess.run(words, cwd=folder / "checkout", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def wheel(once: Once) -> Path:
    """The wheel of the library."""
    (path,) = (once("wheel", build_wheel) / "checkout" / "dist").iterdir()
    return path


@pytest.mark.slow
def test_wheel_has_the_library_and_nothing_else(wheel):
    assert wheel.name == f"zclip-{PROJECT['version']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    folder = f"zclip-{PROJECT['version']}.dist-info/"
    code = {name for name in names if not name.startswith(folder)}
    sources = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "zclip").rglob("*.py")}
    assert code == sources | {"zclip/py.typed", "zclip_lightning_callback.py"}
    assert folder + "licenses/LICENSE" in names
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.11"]


@pytest.mark.slow
def test_wheel_works_where_torch_alone_is_installed(wheel, tmp_path):
    """The new environment gets the wheel by pip, and torch by links to this environment's installation.

    Linked are the files of torch and of the distributions that torch requires, so nothing is downloaded. pip finds
    them: it installs the wheel without an index only because all that the wheel requires is there.
    """
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    for distribution in map(importlib.metadata.distribution, distributions("torch")):
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))

    def run(*words: str) -> str:
        done = subprocess.run([python, "-I", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-index", str(wheel)], check=True)
    frameworks = ("lightning", "numpy", "transformers", "hydra", "pydantic", "matplotlib")
    code = "import importlib.util, sys; print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name)])"
    assert run("-c", code, *frameworks, "training", "torch").split() == ["torch"]

    example = next(block for block in blocks(CHECKOUT / "README.md", "python") if "from zclip import" in block)
    assert float(run("-c", BEFORE + example + AFTER)) > 0

    code = "from zclip import ZClipLightningCallback"
    done = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "ModuleNotFoundError: zclip.ZClipLightningCallback needs lightning: pip install lightning" in done.stderr

    rows = [{"step": step, "grad_norm": 50.0 if step == 35 else 1 + step % 3 / 10} for step in range(40)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "z_thresh=3" in run("-m", "zclip", "replay", "metrics.jsonl", "z_thresh=2,3", "out=none")


def test_version_is_the_same_everywhere():
    """PyPI's `zclip` 1.0.0 is the authors' package, so ours begin with 2."""
    version = PROJECT["version"]
    newest = re.search(r"^## \[?([\d.]+)", (CHECKOUT / "CHANGELOG.md").read_text(), re.M)
    assert newest and newest[1] == version
    assert yaml.safe_load((CHECKOUT / "CITATION.cff").read_text())["version"] == version
    documents = [*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md")]
    wheels = {w for document in documents for w in re.findall(r"zclip-([\d.]+)-py3", document.read_text())}
    assert wheels == {version}


def copied_by_docker() -> dict[str, str]:
    """Return what the Dockerfile copies, each with its place in the image."""
    lines = re.findall(r"^COPY (.+) (\S+)$", (CHECKOUT / "Dockerfile").read_text(), re.M)
    places = [(name, Path("/zclip", place)) for names, place in lines for name in names.split()]
    return {name: str(place if place.name == name else place / name) for name, place in places}


def copied_by_apptainer() -> dict[str, str]:
    """Return what apptainer.def copies, each with its place in the image."""
    section = (CHECKOUT / "apptainer.def").read_text().partition("%files\n")[2].partition("\n\n")[0]
    return dict(line.split() for line in section.splitlines())


def test_both_images_are_made_alike():
    docker, apptainer = (CHECKOUT / "Dockerfile").read_text(), (CHECKOUT / "apptainer.def").read_text()
    assert copied_by_docker() == copied_by_apptainer()
    (python,) = re.findall(r"^ARG PYTHON=(.+)$", docker, re.M)
    assert f"From: python:{python}-slim" in apptainer
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    for text in (docker, apptainer):
        assert "PIP_NO_CACHE_DIR=1 make .venv/.train .venv/.eval\n" in text
        assert "/zclip/.venv/bin:$PATH" in text


@pytest.mark.slow
def test_files_of_the_images_are_enough_to_train(tiny, tmp_path):
    """In a folder with what the images copy, from another working directory."""
    for name, place in copied_by_docker().items():
        target = tmp_path / place[1:]
        if (CHECKOUT / name).is_dir():
            shutil.copytree(CHECKOUT / name, target)
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(CHECKOUT / name, target)
    work, program = tmp_path / "work", tmp_path / "zclip"
    work.mkdir()
    for words in (["train.py", *tiny, "trainer.max_steps=6"], ["scripts/status.py", "folder=runs/main"]):
        command = [sys.executable, program / words[0], *words[1:]]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "done" in done.stdout
    assert {path.name for path in work.iterdir()} == {"runs"}


def test_commands_in_images_are_accepted_by_their_programs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    lines = [
        words for words in commands(CHECKOUT / "docs" / "how-to" / "containers.md") if "/zclip/" in " ".join(words)
    ]
    assert len(lines) > 3
    checked: set[tuple[str, ...]] = set()
    for words in lines:
        start = words.index("python")
        check_command(["python", words[start + 1].removeprefix("/zclip/"), *words[start + 2 :]], checked, monkeypatch)
