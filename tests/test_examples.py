"""The examples run as their first lines say, and show what they promise."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from tests.helpers import CHECKOUT
from tests.process_pool import ENVIRONMENT

EXAMPLES = CHECKOUT / "examples"
#: Steps that get bad batches.
BAD = {70, 71, 72}


@pytest.fixture
def run_example(monkeypatch, tmp_path, capfd):
    """Return a function that runs an example as a program, in this process, and returns what it prints."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)

    def run(name: str) -> str:
        threads = torch.get_num_threads()
        try:
            with patch.dict(os.environ):  # as a program of its own would, it may set variables
                runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
            sys.modules.pop("toy", None)
        return capfd.readouterr().out

    return run


def clipped_steps(output: str) -> dict[int, tuple[float, float]]:
    """Return the norms before and after clipping, by step."""
    found = re.findall(r"step (\d+): norm ([\d.]+) -> ([\d.]+)", output)
    return {int(step): (float(before), float(after)) for step, before, after in found}


@pytest.mark.slow
def test_plain_loop_shows_less_excess_loss_with_clipping(run_example):
    rows = dict(re.findall(r"(\w+) .* ([\d.]+) nats", run_example("plain_loop.py")))
    assert list(rows) == ["NoClipping", "FixedNorm", "ZClip"]
    assert float(rows["ZClip"]) < 0.5 * float(rows["NoClipping"])


@pytest.mark.parametrize(
    "name",
    [
        "own_strategy.py",
        "accelerate_loop.py",
        pytest.param("lightning_callback.py", marks=pytest.mark.slow),
        pytest.param("transformers_trainer.py", marks=pytest.mark.slow),
    ],
)
def test_example_clips_the_bad_batches_only(name, run_example):
    output = run_example(name)
    steps = clipped_steps(output)
    assert steps.keys() == BAD
    assert all(after < 0.2 * before for before, after in steps.values())
    assert re.search(r"mean (norm )?0\.[67]", output.splitlines()[-1]), "the statistics were saved"


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["fsdp2", "ddp"])
def test_two_processes_make_the_decisions_of_one(wrapper, run_example, tmp_path, monkeypatch):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    script = [str(EXAMPLES / "fsdp2.py"), wrapper]
    done = subprocess.run([*command, *script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", script)
    one, two = clipped_steps(run_example("fsdp2.py")), clipped_steps(done.stdout)
    assert one.keys() == two.keys() == BAD and done.stdout.count("of 2, step") == 2 * len(BAD)
    for step in BAD:
        assert two[step] == pytest.approx(one[step], abs=0.02)


def test_notebook_runs(run_example, monkeypatch, tmp_path, capfd):
    """Its code cells share their names; saved outputs would go out of date."""
    cells = json.loads((EXAMPLES / "clip_and_replay.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    Path(tmp_path, "notebook.py").write_text("\n".join("".join(cell["source"]) for cell in code))
    monkeypatch.setattr(sys.modules[__name__], "EXAMPLES", tmp_path)
    shares = re.findall(r"z_thresh=([\d.]+): (\d+)%", run_example("notebook.py"))
    assert [z for z, _ in shares] == ["2.0", "2.5", "3.0"]
    assert [int(share) for _, share in shares] == sorted((int(share) for _, share in shares), reverse=True)


def test_each_example_names_its_command():
    files = {file.name for file in EXAMPLES.glob("*.py")} - {"toy.py"}
    named = {file for file in files if f"python examples/{file}" in (EXAMPLES / file).read_text().split('"""')[1]}
    assert named == files
