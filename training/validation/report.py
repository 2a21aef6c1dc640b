"""What the evaluations of a run have in common: their results are printed and logged, and never stop training."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console


class EvaluationReport:
    """Reports the results of evaluations during training.

    Args:
        console: console to print on.
        log: called with the numbers of an evaluation and its step, as wandb logs them.
    """

    def __init__(self, console: Console, log: Callable[[Mapping[str, float], int], None]) -> None:
        self.console = console
        self.log = log

    def report(self, step: int, text: str, numbers: Mapping[str, float]) -> None:
        """Print a result as text, and log it as numbers. Only rank 0 calls it."""
        self.console.print(f"after step {step}: {text}")
        self.log(numbers, step)

    @contextmanager
    def tolerate_io_errors(self) -> Iterator[None]:
        """Report that the files of an evaluation cannot be written in this block, and go on."""
        try:
            yield
        except OSError as error:
            self.console.print(
                f"AN EVALUATION COULD NOT BE WRITTEN: {error}. Training continues.", style="bold red", markup=False
            )
