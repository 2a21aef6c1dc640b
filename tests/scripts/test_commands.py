"""Every script and every command of the Makefile is there and is tested."""

import os
import re
import sys
from pathlib import Path

from tests.helpers import CHECKOUT, copy_run, make, script
from tests.scripts.loading import load_script
from training.run_dir import RunDir

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


def test_status_of_runs_that_have_not_finished(finished_run, tmp_path, monkeypatch, capsys):
    runs = {name: RunDir(tmp_path / name) for name in ("[b]failed", "stopped", "submitted", "damaged", "waiting")}
    for name, run in runs.items():
        run.path.mkdir()
        if name in ("submitted", "waiting"):
            run.write_slurm_job({"submitted": "7", "waiting": "8"}[name])
        else:
            run.config_file.write_bytes((finished_run / "config.yaml").read_bytes())
    runs["[b]failed"].write_failure(RuntimeError("why"))
    runs["[b]failed"].metrics_file.write_text('{"step": 3, "loss": 2.5, "tokens_per_second": 1234.5}\n{"step"')
    runs["damaged"].result_file.write_text("{")
    (tmp_path / "no run").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho 8 PENDING\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "30")
    status = load_script("status")
    status.main({"folder": str(tmp_path)})
    out = capsys.readouterr().out
    rows = [re.split(r" *│ *", line)[1:-1] for line in out.splitlines() if line.startswith("│")]
    assert rows == [
        ["[b]failed", "failed", "3 of 40", "2.500", "1,234", ""],
        ["damaged", "damaged", "0 of ?", "-", "-", ""],
        ["stopped", "stopped", "0 of 40", "-", "-", ""],
        ["submitted", "stopped", "0 of ?", "-", "-", ""],
        ["waiting", "waiting", "0 of ?", "-", "-", "8"],
    ], out
    assert out.endswith("1 waiting, 1 failed, 2 stopped, 1 damaged\n")
    status.main({"folder": str(tmp_path / "bin")})
    assert capsys.readouterr().out.endswith("no runs\n")


def test_help_of_a_script_is_its_documentation(tmp_path):
    done = script("status.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "folder" in done.stdout, done.stderr
    done = script("bench_clip.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("Measure clipping: `python scripts/bench_clip.py"), done
