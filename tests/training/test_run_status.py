"""The state of a run is read from its files, however long a line is and whatever the files hold."""

import json

import pytest

from tests.helpers import copy_run
from training.launch.sweep import status
from training.run_dir import RunDir


@pytest.fixture
def run(finished_run, tmp_path):
    """The folder of a run that was stopped before it wrote its result."""
    run = RunDir(copy_run(finished_run, tmp_path))
    run.result_file.unlink()
    return run


@pytest.mark.parametrize("length", [10, 4090, 4096, 5000, 100_000])
def test_last_line_of_metrics_may_be_long(run, length):
    rows = [{"step": step, "tokens": 8, "loss": 0.5 * step, "grad_norm": None, "x" * length: 0.0} for step in (1, 2)]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    current = status(run, {})
    assert (current.state, current.row["step"], current.row["loss"]) == ("stopped", 2, 1.0)


@pytest.mark.parametrize(
    "line", ["[1, 2]", "3", "null", '"step"', '{"step": [1]}', '{"step": 1, "loss": "x"}', "[" * 100_000, "{"]
)
def test_damaged_metrics_are_a_state_and_no_traceback(run, line):
    run.metrics_file.write_text(f'{{"step": 1, "tokens": 8, "loss": 2.0, "grad_norm": 1.0}}\n{line}\n')
    assert status(run, {}).state == "damaged"


@pytest.mark.parametrize("name", ["job_file", "result_file", "environment_file"])
@pytest.mark.parametrize("content", ["[]", "3", "null", '{"slurm": [1], "starts": 5}', "{", "[" * 100_000])
def test_damaged_files_are_a_state_and_no_traceback(run, name, content):
    getattr(run, name).write_text(content)
    assert status(run, {}).state in ("damaged", "stopped", "done")
