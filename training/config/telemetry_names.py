"""Names in metrics.jsonl that the telemetry of a strategy, or of a rule over updates, must not have."""

from collections.abc import Iterable

#: Names of other numbers of a step, besides those of times, which end in `_seconds`.
OWN_NAMES = {"step", "tokens", "lr", "loss", "masked_rows", "tokens_per_second", "mfu", "peak_memory_gib"}


def check_telemetry_names(strategy: str, clipping: Iterable[object], rule: str, updates: Iterable[object]) -> None:
    """Raise `ReservedNameError` if a name in the telemetry of a strategy or of a rule is that of another number.

    Args:
        strategy, rule: names of the classes.
        clipping, updates: names of their numbers, as text. Those of rules alone may begin with `update_`.
    """
    taken = OWN_NAMES.copy()
    for by_rule, names in ((False, clipping), (True, updates)):
        for name in map(str, names):
            if name in taken or name.endswith("_seconds") or (name.startswith("update_") and not by_rule):
                raise ReservedNameError(by_rule, rule if by_rule else strategy, name)
            taken.add(name)


class ReservedNameError(ValueError):
    """Telemetry has the name of another number; `by_rule`: it is that of the rule over updates."""

    def __init__(self, by_rule: bool, owner: str, name: str) -> None:
        self.by_rule = by_rule
        super().__init__(
            f"telemetry of {owner} must not have the name {name}: metrics.jsonl has another number of that name"
        )
