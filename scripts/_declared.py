"""What the scripts that read declared runs share: settings of the command line, and finding the runs on disk."""

from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from common.errors import UserError
from common.settings import Allowed
from experiments.run.collect import ExpectedRun, RunCollection, collect
from training.config.compose import resolve_runs, saved_identity

Seeds = Annotated[
    list[Annotated[int, Field(ge=0)]], Field(min_length=1), Allowed("a list of integers from 0, as [0,1,2]")
]
Overrides = Annotated[
    list[Annotated[str, StringConstraints(pattern="=")]],
    Allowed("""a list of settings in quotes, as 'overrides=["trainer.max_steps=400"]'"""),
]


#: Seeds that the labs are declared with.
LAB_SEEDS = [0, 1, 2, 3, 4]


def find_declared(
    specs: Iterable[Any], base: Sequence[str], seeds: Sequence[int], varied: Collection[str] = ()
) -> RunCollection:
    """Return the declared runs that exist, each with the settings `base` and its spec's `overrides`.

    Other folders next to them are reported, except those that differ only in the settings `varied`.

    A spec with a `fork`, see `experiments.labs.declaration.Fork`, begins after another run, which has the same `base`.
    """
    runs = {}
    for spec in specs:
        fork = getattr(spec, "fork", None)
        other = None if fork is None else ((*base, *fork.overrides), fork.times)
        runs[spec] = (*base, *spec.overrides), other
    resolved = resolve_runs(runs, seeds)
    return collect({key: ExpectedRun(*found) for key, found in resolved.items()}, saved_identity, varied)


def collect_declared(
    specs: Iterable[Any], base: Sequence[str], seeds: Sequence[int], problem: str, varied: Collection[str] = ()
) -> RunCollection:
    """Return the runs of `find_declared`.

    Raises:
        UserError: none of them is finished: `problem`, and why.
    """
    collection = find_declared(specs, base, seeds, varied)
    if not collection.runs:
        reasons = "".join(f"; {warning}" for warning in collection.warnings[:3])
        raise UserError(f"{problem}: nothing is written{reasons}")
    return collection
