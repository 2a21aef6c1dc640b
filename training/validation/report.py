"""What the evaluations of a run have in common: their results are printed and logged, and never stop training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console

from common.errors import one_line
from common.root_cause import root_cause


class EvaluationReport(NamedTuple):
    """Reports the results of evaluations during training to a console, and to loggers that take a step and numbers."""

    console: Console
    loggers: Sequence[Callable[[int, Mapping[str, float]], None]]

    def report(self, step: int, text: str, numbers: Mapping[str, float]) -> None:
        """Print a result as text, and log it as numbers. Only rank 0 calls it."""
        self.console.print(f"after step {step}: {text}")
        for log in self.loggers:
            log(step, numbers)

    @contextmanager
    def tolerate_io_errors(self) -> Iterator[None]:
        """Report that the files of an evaluation cannot be written in this block, and go on."""
        try:
            yield
        except OSError as error:
            problem = f"AN EVALUATION COULD NOT BE WRITTEN: {one_line(root_cause(error))}"
            self.console.print(f"{problem}. Training continues.", style="bold red")
