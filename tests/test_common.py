"""Removed and locked files, and settings that are wrong in several ways."""

import datetime
import fcntl
import io
import shutil

import pytest
from pydantic import ValidationError, model_validator
from rich.table import Table

from common.console import make_console
from common.errors import UserError
from common.files import is_locked, remove
from common.settings import Count, Settings, parse


def test_folder_whose_removal_is_interrupted_has_lost_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    for name in "ab":
        (folder / name).mkdir(parents=True)

    def interrupted(path, *arguments, **options):
        (path / "a").rmdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            remove(folder)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".removing-") and left.name.endswith("-folder")
    remove(left)  # the next process completes it
    assert not any(tmp_path.iterdir())


def test_two_processes_can_ask_for_a_lock_at_once(tmp_path):
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert not is_locked(tmp_path / "lock")


class Inner(Settings):
    first: Count = 1
    last: Count = 2

    @model_validator(mode="after")
    def _in_order(self) -> "Inner":
        if self.first > self.last:
            raise UserError("the first must not be after the last")
        return self


class Outer(Settings):
    count: Count = 1
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0, "cuont": 1}, "cuont=1 is not possible: there is no key cuont (the nearest is count)"),
        ({"count": 2**31}, "count=2147483648 is not allowed: it must be an integer from 1"),
        ({5: 1}, "5=1 is not possible: there is no key 5"),
        (
            {"inner": {datetime.date(2001, 1, 1): 1}},
            "inner.2001-01-01=1 is not possible: there is no key inner.2001-01-01",
        ),
        ({"inner": {"first": 3}}, "the first must not be after the last"),
    ],
)
def test_first_of_several_mistakes_is_one_sentence(values, message):
    with pytest.raises(UserError) as error:
        parse(Outer, values)
    assert str(error.value) == message


def test_settings_stay_as_they_were_parsed():
    settings = parse(Outer, {"count": 2**31 - 1})
    with pytest.raises(ValidationError, match="frozen"):
        settings.count = 5
    assert settings.count == 2**31 - 1


def test_tables_are_printed_in_the_narrowest_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "3")
    console = make_console(soft_wrap=False, file=io.StringIO())
    row = ["time of a step", "0.272 s", "data 0.2%, forward and backward 98.2%"]
    table = Table(*row)
    table.add_row(*row)
    console.print(table)
    assert console.width == 20
