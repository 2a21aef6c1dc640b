"""A few of the inputs of `make fuzz`, read in the process of the test."""

import pytest

from tests.fuzz.attempts import attempt
from tests.fuzz.bases import write_bases
from tests.fuzz.readers import READERS
from tests.helpers import same_handlers

#: Inputs of each reader. Those of readers that take longer, and of programs, are left to `make fuzz`.
INPUTS = {
    "run folder": 4, "run, read": 12, "scores": 12, "model": 10, "model with index": 6, "tokenizer": 8, "tokens": 8,
    "texts": 6, "clipper state": 20, "replay": 12,
}  # fmt: skip


@pytest.fixture(scope="session")
def bases(finished_run, sharded_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    write_bases(folder, finished_run, sharded_run)
    return folder


@pytest.mark.timeout(60, method="thread")  # a reader that waits for a FIFO cannot be interrupted
@pytest.mark.parametrize("name", INPUTS)
def test_hostile_files_are_used_or_refused_with_a_sentence(name, bases, tmp_path):
    with same_handlers():
        for number in range(INPUTS[name]):
            attempted = attempt(READERS[name], bases, tmp_path / str(number), f"0 {name}", number)
            assert not attempted.outcome.failed, f"input {number}, {attempted.change}: {attempted.detail}"
