"""Every script and every command of the Makefile is there and is tested."""

import ast
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from common.errors import UserError
from common.missing_packages import missing_package
from evaluation.tasks import SETS
from tests.helpers import CHECKOUT, copy_run, make, script, train
from tests.scripts.loading import load_script
from training.run_dir import RunDir
from zclip.replay import __doc__ as replay_help

#: The tests' own environment is used as it is.
EXTRAS = ("train", "eval", "paper", "dev", "docs")
INSTALLED = (*(word for extra in EXTRAS for word in ("-o", f".venv/.{extra}")), f"BIN={Path(sys.executable).parent}")
#: Rows and columns of the screen that a program's help fits on.
ROWS, COLUMNS = 24, 100


def test_help_lists_every_command():
    listed = set(re.findall(r"^  make ([\w-]+) ", make(*INSTALLED, "help-all"), re.M))
    phony = re.search(r"^\.PHONY: (.*)$", (CHECKOUT / "Makefile").read_text(), re.M)
    assert phony is not None and listed == {*phony[1].split()}


def test_commands_name_programs_that_exist():
    commands = re.findall(r"^  make ([\w-]+) ", make(*INSTALLED, "help-all"), re.M)
    lines = make(*INSTALLED, "-n", *(command for command in commands if command not in ("setup", "clean")))
    programs = re.findall(r"bin/python ((?:scripts/)?\w+\.py)", lines)
    assert {*programs} == {
        "train.py", "scripts/eval_data.py", "scripts/evaluate.py", "scripts/make_tables.py", "scripts/make_figures.py",
        "scripts/make_report.py", "scripts/status.py", "scripts/bench_data.py", "scripts/bench_train.py",
        "scripts/bench_eval.py", "scripts/bench_clip.py", "scripts/compare.py",
        "scripts/make_lab.py", "scripts/gpu_check.py", "scripts/gpu_carry.py",
    }  # fmt: skip
    modules = {name.replace(".", "/") for name in re.findall(r"bin/python -m ([\w.]+)", lines)} - {"pytest", "pip"}
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


def test_status_of_a_run_that_cannot_be_looked_into_is_damaged(tmp_path, monkeypatch):
    script = load_script("status")
    is_file = Path.is_file
    (tmp_path / "closed").mkdir()

    def refuse(path):
        if path.parent.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    monkeypatch.setattr(Path, "exists", refuse)
    monkeypatch.setattr(script, "queued_jobs", None)  # not asked
    monkeypatch.setattr("sys.stdout", output := io.StringIO())
    script.main({"folder": str(tmp_path)})
    assert re.search(r"│ closed │ damaged │", output.getvalue()), output.getvalue()


def fake_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program on the path that prints a job in SLURM's queue."""
    (folder / "bin").mkdir()
    (folder / "bin" / "squeue").write_text("#!/bin/sh\necho 8 PENDING\n")
    (folder / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")


LINE = json.dumps({"step": 3, "tokens": 1536, "loss": 2.5, "grad_norm": 1.0, "tokens_per_second": 1234.5})


def test_status_of_runs_that_have_not_finished(finished_run, tmp_path, monkeypatch, capsys):
    runs = {name: RunDir(tmp_path / name) for name in ("[b]failed", "stopped", "submitted", "damaged", "waiting")}
    for name, run in runs.items():
        run.path.mkdir()
        if name in ("submitted", "waiting"):
            run.write_slurm_job({"submitted": "7", "waiting": "8"}[name])
        else:
            run.config_file.write_bytes((finished_run / "config.yaml").read_bytes())
    runs["[b]failed"].write_failure(RuntimeError("why"))
    runs["[b]failed"].metrics_file.write_text(LINE + '\n{"step"')
    runs["damaged"].result_file.write_text("{")
    (tmp_path / "no run").mkdir()
    fake_squeue(tmp_path, monkeypatch)
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
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho fatal: no configuration >&2; exit 1\n")
    status.main({"folder": str(tmp_path)})
    output, error = capsys.readouterr()
    assert output.endswith("1 failed, 3 stopped, 1 damaged\n")
    assert error == "squeue failed: fatal: no configuration: the states of jobs in the queue are not known\n"


HOSTILE = {
    "a line of another shape": ("metrics.jsonl", "[1, 2]\n"),
    "a text as a number": ("metrics.jsonl", '{"step": "3", "loss": "x"}\n'),
    "deep": ("metrics.jsonl", "[" * 100_000 + "\n"),
    "long": ("metrics.jsonl", "x" * 10_000_000 + "\n"),
    "a fifo": ("metrics.jsonl", os.mkfifo),
    "a folder": ("metrics.jsonl", os.mkdir),
    "a result that is a folder": ("result.json", os.mkdir),
    "a result that is a fifo": ("result.json", os.mkfifo),
    "a result of another shape": ("result.json", '{"steps": 3}'),
    "a deep result": ("result.json", '{"a":' * 100_000),
    "a surrogate": ("result.json", '"\\ud800"'),
    "a job": ("job.json", '{"slurm": [1]}'),
    "a configuration": ("config.yaml", "[" * 1000),
    "aliases": ("config.yaml", "a: &a [1]\nb: [*a]\n"),
}


def test_one_damaged_run_is_one_line_of_the_status(finished_run, tmp_path, monkeypatch, capsys):
    fake_squeue(tmp_path, monkeypatch)
    for name, (file, content) in HOSTILE.items():
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_bytes((finished_run / "config.yaml").read_bytes())
        (run / file).unlink(missing_ok=True)
        (run / file).write_text(content) if isinstance(content, str) else content(run / file)
    load_script("status").main({"folder": str(tmp_path / "runs")})
    out = capsys.readouterr().out
    lines = {row[0]: row[1] for row in (re.split(r" *│ *", line)[1:-1] for line in out.splitlines() if "│" in line)}
    assert lines == dict.fromkeys(HOSTILE, "damaged"), out


def test_names_that_no_file_system_takes_are_a_mistake(tmp_path):
    """Also those that a script makes of a setting."""
    load_script("status")
    with pytest.raises(UserError) as error, sys.modules["_entry"]._short_names():
        (tmp_path / ("n" * 300)).read_text()
    assert str(error.value) == f"{'n' * 40}... is too long a name for a file or folder: choose a shorter one"
    with pytest.raises(FileNotFoundError), sys.modules["_entry"]._short_names():
        (tmp_path / "gone").read_text()


def collection(*items: int, device: str = "CPU") -> SimpleNamespace:
    """Return finished runs with scores on so many items of WinoGrande, in the place of those that the report reads."""
    scores = [{"winogrande": {"task": "winogrande", "items": count}} for count in items]
    runs = [SimpleNamespace(score=score.get, environment={"device": device}) for score in scores]
    return SimpleNamespace(seeds=[0, 1], runs=dict(enumerate(runs)))


def test_report_has_the_commands_that_make_it_again():
    make_report, complete = load_script("make_report"), SETS["winogrande"].items
    assert make_report._score_overrides(collection(complete, complete)) == []
    assert make_report._score_overrides(collection(complete, 400, 100)) == ["eval.limit=100"]
    with_last_words = collection(complete, 400)
    with_last_words.runs[1].score = {"last_word": {"task": "last_word", "items": 9}}.get
    assert make_report._score_overrides(with_last_words) == ["eval.tasks=[hellaswag,winogrande,last_word]"]
    paths = SimpleNamespace(runs="runs")
    settings = SimpleNamespace(scale="micro", paths=paths, overrides=["a.b=1"], out="here", windows=None)
    readers = """scale=micro 'seeds=[0,1]' paths.runs=runs 'overrides=["a.b=1"]' out=here"""
    assert make_report._commands(settings, collection(complete), ["figure3", "figure7"]) == [
        "python train.py -m 'experiment=[figure7]' scale=micro seed=0,1 paths.runs=runs a.b=1 hydra/launcher=local",
        "python scripts/eval_data.py",
        "python scripts/evaluate.py run=runs/paper-micro",
        f"python scripts/make_figures.py 'experiment=[figure3,figure7]' {readers}",
        f"python scripts/make_report.py 'experiment=[figure3,figure7]' {readers}",
    ]
    train, *_, tables, _ = make_report._commands(settings, collection(complete, device="H100"), ["table5"])
    assert "hydra/launcher" not in train and tables.startswith("python scripts/make_tables.py")


def test_commands_of_the_report_are_quoted_for_hydra():
    paths = SimpleNamespace(runs="a,b [ü]")
    overrides = ["data.path=ü", 'data.path="c"', r"data.path=\d"]
    settings = SimpleNamespace(scale="micro", paths=paths, overrides=overrides, out="it's", windows=None)
    *_, command = load_script("make_report")._commands(settings, collection(1), ["table5"])
    read = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(shlex.split(command)[2:])}
    assert (read["paths.runs"], read["out"], read["overrides"]) == (paths.runs, "it's", overrides)


def test_commands_install_what_they_need_once():
    """As extras of pyproject.toml; `make train` installs one of them."""
    extras = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*EXTRAS} == {*extras} - {"lightning"}, "lightning is for those who install the library alone"
    new = ("VENV=new",)
    assert re.findall(r"--editable '\.\[(\w+)\]'", make(*new, "-n", "train")) == ["train"]
    assert re.findall(r"--editable '\.\[(\w+)\]'", make(*new, "-n", "test")) == ["train", "eval", "paper", "dev"]
    assert make(*new, "-n", "train", "status").count("pip install") == 1


def test_environment_that_could_not_be_made_is_made_again(tmp_path):
    """As on Debian without python3-venv, where `python -m venv` fails after it has made a python without pip."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || (mkdir -p "$3/bin" && ln -s /bin/true "$3/bin/python" && exit 1)\n')
    python.chmod(0o755)
    made = tmp_path / "venv" / "bin" / "python"
    with pytest.raises(AssertionError, match="Deleting file"):
        make(f"VENV={tmp_path}/venv", f"PYTHON={python}", str(made))
    assert made.parent.is_dir() and not made.is_symlink()


def test_make_train_compares_strategies_unless_others_are_given():
    assert "train.py -m experiment=first_look clip=none,fixed,zclip seed=1" in make(
        *INSTALLED, "-n", "train", "ARGS=seed=1"
    )
    (line,) = make(*INSTALLED, "-n", "train", "ARGS=lr=1e-3 clip=agc,zclip").splitlines()
    assert line.count("clip=") == 1 and line.endswith("lr=1e-3 clip=agc,zclip")
    assert "clip=none" not in make(*INSTALLED, "-n", "train", "ARGS='clip=agc,zclip'")


def test_help_of_every_program_fits_a_screen():
    load_script("status")
    for path in sorted((CHECKOUT / "scripts").glob("[a-z]*.py")):
        entry = re.search(r"_entry\.run\(main(?:, \"(\S+)\")?\)", path.read_text())
        if entry is None:
            continue
        documentation = ast.get_docstring(ast.parse(path.read_text()))
        shown = sys.modules["_entry"]._help(documentation, entry[1]).partition("Settings, and their defaults:")
        example = rf"^    (python scripts/{path.name}|make {path.stem.replace('_', '-')} )"
        assert re.search(example, shown[0], re.M), path
        assert len("".join(shown).splitlines()) <= ROWS, path
        assert max(map(len, shown[0].splitlines())) <= COLUMNS, path
    documented = (ast.get_docstring(ast.parse((CHECKOUT / "train.py").read_text())), replay_help, make("help"))
    for text in documented:
        assert text is not None and len(text.splitlines()) <= ROWS, text
        assert max(map(len, text.splitlines())) <= COLUMNS, text


def test_help_of_training_lists_the_options_of_each_group():
    text = ast.get_docstring(ast.parse((CHECKOUT / "train.py").read_text()))
    assert text is not None
    joined = re.sub(r"\n {8,}", " ", text)
    groups = {group: {*options.split()} for group, options in re.findall(r"^  (\w+) +(.*)$", joined, re.M)}
    assert groups == {group: {p.stem for p in (CHECKOUT / "configs" / group).glob("*.yaml")} for group in groups}


def test_help_of_a_program_is_its_documentation(tmp_path):
    done = script("status.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "folder: runs/main " in done.stdout and "hydra" not in done.stdout, done
    done = train("--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("Train one language model"), done
    done = script("bench_clip.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("Measure clipping: `python scripts/bench_clip.py"), done


@pytest.mark.parametrize("program", ["train.py", "scripts/status.py"])
def test_program_without_its_packages_says_what_to_do_in_one_sentence(program):
    done = subprocess.run([sys.executable, "-S", CHECKOUT / program], capture_output=True, text=True)  # no packages
    (sentence,) = done.stderr.splitlines()
    assert re.fullmatch(rf"{Path(program).name}: error: \w+ is not installed: run `make setup`, and use \S+", sentence)
    assert done.returncode == 2


def test_error_of_an_import_of_our_own_is_no_missing_package():
    assert missing_package(ModuleNotFoundError("", name="scipy.stats")) is not None
    ours, unnamed = ModuleNotFoundError("", name="training.gone"), ModuleNotFoundError("")
    assert all(missing_package(error) is None for error in (ours, unnamed, ImportError("", name="scipy")))
