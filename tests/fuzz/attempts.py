"""One input for a reader: what is changed, how the reader is called, and what became of it."""

import contextlib
import io
import os
import random
import runpy
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import RunError, UserError
from tests.fuzz.mutations import Mutator, digest_of, plant_module
from tests.helpers import CHECKOUT
from training.launch.cli import CANNOT_WRITE

#: Longest sentence that a reader of files may answer with; a command line may be as long as it likes.
LONGEST_SENTENCE = 2500


class Refused(Exception):
    """A program has refused its input with a sentence on stderr."""


class Outcome(str):
    """`accepted`, `refused`, or what failed."""

    @property
    def failed(self) -> bool:
        """Whether the reader neither accepted nor refused its input."""
        return self not in ("accepted", "refused")


@dataclass(frozen=True)
class Attempt:
    """What became of one input: its outcome, what was changed, and the sentence or the traceback."""

    outcome: Outcome
    change: str
    detail: str


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
        read: called with the folder of the changed files, the folder of the bases, and a generator.
        base: folder of the bases that is copied; empty if the reader has no files.
        files: patterns of the files that are changed.
        made: files that the reader makes.
        refusals: errors that are a sentence for the user.
        share: inputs, relative to other readers.
        in_process: whether it can be called in a process that goes on; programs can not.
    """

    read: Callable[[Path, Path, random.Random], object]
    base: str = ""
    files: Sequence[str] = ("**/*",)
    made: Sequence[str] = ()
    refusals: tuple[type[Exception], ...] = (UserError, RunError)
    share: float = 1.0
    in_process: bool = True


def attempt(reader: Reader, bases: Path, folder: Path, seed: str, number: int) -> Attempt:
    """Change a copy of a reader's base in `folder`, which must not exist, and let the reader read and use it.

    The input with the number 0 is not changed, and must be accepted.
    """
    rng = random.Random(f"{seed} {number}")
    work, outside = folder / "work" / "reader", folder / "outside"
    outside.mkdir(parents=True)
    (outside / "precious.txt").write_text("precious\n" * 10)
    change = ""
    if reader.base:
        base = bases / reader.base
        if reader.base == "texts":
            base = rng.choice(sorted(base.iterdir()))
            work /= base.name
        shutil.copytree(base, work)
        files = sorted({file for pattern in reader.files for file in work.glob(pattern)})
        made = [work / name for name in reader.made]
        change = Mutator(rng, outside).mutate(work, files, made) if number else ""
    else:
        work.mkdir(parents=True)
    plant_module(work, outside / "executed")
    before = digest_of(outside)
    sys.path.insert(0, str(work))
    try:
        attempted = _attempt(reader, work, bases, rng, change)
    finally:
        sys.path.remove(str(work))
        sys.modules.pop("planted_module", None)
    if digest_of(outside) != before:
        names = ", ".join(sorted(path.name for path in outside.iterdir()))
        outcome = "code was executed" if (outside / "executed").exists() else "a file outside was written"
        return Attempt(Outcome(outcome), change, f"{names}\n{attempted.detail}")
    if reader.base and not number and attempted.outcome != "accepted":
        return Attempt(Outcome(f"{attempted.outcome}, though unchanged"), change, attempted.detail)
    return attempted


def _attempt(reader: Reader, work: Path, bases: Path, rng: random.Random, change: str) -> Attempt:
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), np.errstate(all="ignore"):
            more = reader.read(work, bases, rng)
    except (*reader.refusals, Refused) as error:
        sentence = str(error)
        if not sentence.strip():
            return Attempt(Outcome("no sentence"), change, traceback.format_exc())
        if reader.base and len(sentence) > LONGEST_SENTENCE:
            return Attempt(Outcome("a long sentence"), change, f"{len(sentence)} characters: {sentence[:500]}")
        return Attempt(Outcome("refused"), change, sentence)
    except OSError as error:
        if error.errno in CANNOT_WRITE and UserError in reader.refusals:  # the programs report it in a sentence
            return Attempt(Outcome("refused"), change, str(error))
        return Attempt(Outcome(type(error).__name__), change, traceback.format_exc())
    except BaseException as error:
        return Attempt(Outcome(type(error).__name__), change, traceback.format_exc()[-6000:])
    if "\x1b" in output.getvalue():
        return Attempt(Outcome("a command to the terminal"), change, repr(output.getvalue()))
    return Attempt(Outcome("accepted"), change, f"{more or ''}\n{output.getvalue()[-2000:]}")


def run_program(program: str, *arguments: str, cwd: Path) -> None:
    """Run a program of the checkout in this process, which is to end afterwards; raise `Refused` for status 2 and 3."""
    os.chdir(cwd)
    sys.argv = [str(CHECKOUT / program), *arguments]
    sys.path.insert(0, str(CHECKOUT / Path(program).parent))
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    print(out.getvalue())
    if "Traceback" in err.getvalue() or status not in (0, 2, 3):
        raise AssertionError(f"status {status}: {err.getvalue()[-6000:]}")
    if status:
        raise Refused(err.getvalue().strip())
    if "\x1b" in err.getvalue():
        raise AssertionError(repr(err.getvalue()))
