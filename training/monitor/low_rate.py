"""A warning while a rule over updates holds the learning rate far below its schedule."""

from rich.console import Console

from training.monitor.metrics import Row

#: Scale below which a rate is low, and number of consecutive steps after which that is reported.
LOW, STEPS = 0.5, 200


class LowRateWarning:
    """Gets each line of the metrics, and prints a warning once for each long time of low rates."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._low_steps = 0

    def __call__(self, step: int, row: Row) -> None:
        """Count the steps in a row whose rate is low; a skipped step does not count."""
        scale = row.get("update_scale")
        if scale is not None:
            self._low_steps = self._low_steps + 1 if scale < LOW else 0
            if self._low_steps == STEPS:
                self.console.print(
                    f"step {step}: for {STEPS} steps the rule over updates has held the learning rate below {LOW:g} of "
                    "the schedule: at the full rate the run may be unstable, or norms have risen because the text "
                    "has changed; docs/how-to/clip-updates.md says what to do",
                    style="bold red",
                )
