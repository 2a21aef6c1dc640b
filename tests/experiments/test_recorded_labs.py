"""The recorded reports and numbers of the labs are those of the archived runs."""

import re

import matplotlib.pyplot as plt
import pytest

from experiments.labs.declaration import LABS
from experiments.run.archive import ENDING, restore_archive
from tests.helpers import CHECKOUT
from tests.scripts.loading import load_script

RESULTS = CHECKOUT / "experiments" / "results"
#: The lab and the seeds of records that are not those of the lab of their name, with seeds 0 to 4.
RECORDS = {"bad_data": ("bad_data", [*range(10)]), "adam_lag_fresh_seeds": ("adam_lag", [*range(5, 10)])}
RECORDED = sorted(path.name for path in (RESULTS / "labs").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_report_follows_from_the_archived_runs(name, tmp_path):
    lab, seeds = RECORDS.get(name, (name, [0, 1, 2, 3, 4]))
    folder = lab.replace("_", "-")
    for archive in (RESULTS / "runs" / folder).glob(f"*{ENDING}"):
        restore_archive(archive, tmp_path / folder / archive.name.removesuffix(ENDING))
    recorded = (RESULTS / "labs" / name / "report.md").read_text()
    (made,) = re.findall(r"Read \S+ at commit \w+\.", recorded)
    script = load_script("make_lab")
    settings = script.LabSettings(lab=lab, seeds=seeds, runs=str(tmp_path))
    written = script.lab_report(LABS[lab], script.collect_runs(LABS[lab], settings), made)
    for figure in written.figures.values():
        plt.close(figure)
    assert written.text == recorded
    assert written.numbers == (RESULTS / "labs" / name / "numbers.csv").read_text()


def test_every_archived_lab_is_recorded():
    archived = {path.name.replace("-", "_") for path in (RESULTS / "runs").iterdir()}
    assert archived & {*LABS} == {RECORDS.get(name, (name,))[0] for name in RECORDED}
