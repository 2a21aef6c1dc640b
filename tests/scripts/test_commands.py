"""Every script and every command of the Makefile is there and is tested."""

import re
import sys
from pathlib import Path

from tests.helpers import CHECKOUT, copy_run, make, script

#: The tests' own environment is used as it is.
INSTALLED = ("-o", "setup", f"BIN={Path(sys.executable).parent}")


def test_help_lists_every_command():
    listed = set(re.findall(r"^  make ([\w-]+) ", make(*INSTALLED, "help"), re.M))
    phony = re.search(r"^\.PHONY: (.*)$", (CHECKOUT / "Makefile").read_text(), re.M)
    assert phony is not None and listed == {*phony[1].split()}


def test_commands_name_programs_that_exist():
    commands = re.findall(r"^  make ([\w-]+) ", make(*INSTALLED, "help"), re.M)
    lines = make(*INSTALLED, "-n", *(command for command in commands if command not in ("setup", "clean")))
    programs = re.findall(r"bin/python ((?:scripts/)?\w+\.py)", lines)
    assert {*programs} == {
        "train.py", "scripts/eval_data.py", "scripts/evaluate.py", "scripts/make_tables.py", "scripts/make_figures.py",
        "scripts/make_report.py", "scripts/status.py", "scripts/bench_data.py", "scripts/bench_train.py",
        "scripts/bench_eval.py", "scripts/bench_clip.py",
    }  # fmt: skip
    modules = {name.replace(".", "/") for name in re.findall(r"bin/python -m ([\w.]+)", lines) if name != "pytest"}
    for program in (*programs, *(f"{module}.py" for module in modules)):
        assert (CHECKOUT / program).is_file(), program


def test_every_script_is_tested():
    """By the name of the file in the tests of this folder, or of another."""
    tests = "".join(path.read_text() for path in (CHECKOUT / "tests").rglob("test_*.py"))
    for path in (CHECKOUT / "scripts").rglob("*.*"):
        if path.suffix in (".py", ".sbatch") and not path.name.startswith("_"):
            assert path.name in tests or f"scripts.{path.stem} " in tests, path.name


def test_status_lists_the_runs_of_a_folder(finished_run, tmp_path):
    copied = copy_run(finished_run, tmp_path)
    done = script("status.py", cwd=tmp_path, COLUMNS="160")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"│ {copied.name} +│ done +│ +40 of 40 │ +\d\.\d+ │ +[\d,]+ │", done.stdout), done.stdout
    assert done.stdout.endswith("1 done\n")


def test_help_of_a_script_is_its_documentation(tmp_path):
    done = script("status.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "folder" in done.stdout, done.stderr
    done = script("bench_clip.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("Measure clipping: `python scripts/bench_clip.py"), done
