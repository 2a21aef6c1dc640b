"""The system's error is reported, however it is wrapped."""

import errno
import os
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from common.root_cause import root_cause

DISK_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def while_handling(error: BaseException, handled: BaseException) -> BaseException:
    try:
        try:
            raise handled
        except BaseException:
            raise error  # noqa: B904 - as libraries do
    except BaseException as result:
        return result


def from_cause(error: BaseException, cause: BaseException) -> BaseException:
    try:
        raise error from cause
    except BaseException as result:
        return result


@pytest.mark.parametrize(
    "error",
    [
        DISK_FULL,
        while_handling(RuntimeError("unexpected pos 64 vs 0"), DISK_FULL),
        from_cause(RuntimeError("no"), while_handling(ValueError("pos"), DISK_FULL)),
        CheckpointException("save", {1: (while_handling(RuntimeError("unexpected pos"), DISK_FULL), None)}),
        ExceptionGroup("several", [ValueError("x"), from_cause(RuntimeError("y"), DISK_FULL)]),
        while_handling(DISK_FULL, FileNotFoundError(errno.ENOENT, "of no interest")),
    ],
)
def test_error_of_the_system_is_found(error):
    assert root_cause(error) is DISK_FULL


def test_other_errors_stand_for_themselves():
    error = while_handling(ValueError("wrong"), KeyError("looked up"))
    assert root_cause(error) is error
    first = RuntimeError("first")
    assert root_cause(CheckpointException("save", {0: (first, None), 1: (KeyError("second"), None)})) is first


def test_errors_that_refer_to_each_other_end():
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert root_cause(one) is one


def test_full_disk_under_torch_is_a_full_disk():
    """/dev/full takes no byte."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    with pytest.raises(Exception) as caught, open("/dev/full", "wb", buffering=0) as file:  # noqa: PTH123
        torch.save({"a": torch.ones(100_000)}, file)
    assert "No space left on device" in str(root_cause(caught.value))
