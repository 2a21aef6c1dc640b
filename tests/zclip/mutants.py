"""For `make mutants`: the order of the tests, and the summary.

As a plugin of pytest it lets each mutant run its quickest tests first; pytest stops at the first that fails. As a
program it prints the results that mutmut keeps in the folder mutants/.
"""

import itertools
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import Phase, settings

#: Tests that train with Lightning, transformers or Accelerate, and the mutants that run them.
TRAINERS = ("test_lightning.py", "test_transformers.py", "test_accelerate.py")
TRAINED = ("zclip.x_", "zclip.integrations.")
#: Other mutants get so many seconds of tests, the quickest first; one that is still alive has survived.
SECONDS = 10.0


def pytest_configure() -> None:
    """Let hypothesis stop at the first failing example: it need not be a small one."""
    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)
    settings.load_profile("mutants")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the tests of a mutant by the seconds that mutmut has measured."""
    measured = Path("mutmut-stats.json")
    mutant = os.environ.get("MUTANT_UNDER_TEST", "")
    if not measured.exists() or not mutant.startswith("zclip."):
        return
    seconds = json.loads(measured.read_text())["duration_by_test"]
    items.sort(key=lambda item: seconds.get(item.nodeid, 0.0))
    if mutant.startswith(TRAINED):
        return
    untrained = [item for item in items if item.path.name not in TRAINERS]
    total = itertools.accumulate(seconds.get(item.nodeid, 0.0) for item in untrained)
    chosen = [item for item, end in zip(untrained, total, strict=True) if end <= SECONDS]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def print_summary() -> None:
    """Print how many mutants of each file a test has killed, and the names of those that none has killed."""
    from mutmut.stats import status_by_exit_code

    total: Counter[str] = Counter()
    alive = []
    for file in sorted(Path("mutants/zclip").rglob("*.meta")):
        results = json.loads(file.read_text())["exit_code_by_key"]
        statuses = {name: status_by_exit_code[code] for name, code in results.items()}
        alive += [f"{name}: {status}" for name, status in statuses.items() if status in ("survived", "no tests")]
        if statuses:
            print(f"{file.relative_to('mutants').with_suffix('')!s:40} {_line(Counter(statuses.values()))}")
        total.update(statuses.values())
    print(*alive, f"{'all':40} {_line(total)}", sep="\n")


def _line(counts: Counter[str]) -> str:
    checked = counts.total() - counts["not checked"]
    killed = counts["killed"] + counts["timeout"]
    rate = f"{killed / checked:.1%} of {checked} mutants killed" if checked else "no mutant checked"
    return "; ".join([rate, *(f"{count} {status}" for status, count in sorted(counts.items()) if status != "killed")])


if __name__ == "__main__":
    print_summary()
