"""The check of a GPU keeps what a stage has, ends it in time, goes on where it stopped, and runs on a CPU when dry."""

import json
import sys
from types import ModuleType

import pytest

from tests.helpers import CHECKOUT, have_ended, script
from tests.process_pool import run
from tests.scripts.loading import load_script

#: The stages in their order, each a module beside context.py.
FILES = ("environment.py", "cuda_tests.py", "clipping.py", "training.py", "resume.py", "evaluation.py", "figure.py")


def states(folder):
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


def test_a_dry_run_of_a_stage_saves_its_results_and_prints_all(tmp_path):
    done = script("gpu_check.py", "dry_run=true", "only=clipping", "out=out", "report=report", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    stage = states(tmp_path / "report")["clipping"]
    assert stage["state"] == "done" and stage["results"]["parameters"] > 0, stage
    assert stage["results"]["over_floor"]["norm pass (the floor)"] == 1
    assert "clipping" in done.stdout and "not run" in done.stdout
    again = script("gpu_check.py", "dry_run=true", "only=clipping", "out=out", cwd=tmp_path)
    assert states(tmp_path / "out")["clipping"] == stage, "a stage that is done does not run again"
    assert again.returncode == 0 and "done" in again.stdout


def test_stages_are_the_modules_and_a_call_has_time_for_the_least_of_each():
    check = load_script("gpu_check")
    stages = CHECKOUT / "scripts" / "gpu_stages"
    assert [f"{name}.py" for name in check.STAGES] == [*FILES]
    assert {*FILES, "context.py", "__init__.py"} == {file.name for file in stages.glob("*.py")}
    assert sum(fewest for _, fewest in check.STAGES.values()) < check.GpuCheckConfig().budget < 600


def test_what_is_carried_has_pinned_versions_and_a_command_that_starts_the_check(tmp_path):
    carry = load_script("gpu_carry")
    (tmp_path / "out" / "wheels").mkdir(parents=True)
    (tmp_path / "out" / "published").mkdir()
    for name in carry.BINARIES + carry.SOURCES:
        (tmp_path / "out" / "wheels" / f"{name.replace('-', '_')}-1-py3-none-any.whl").write_text("")
    done = script("gpu_carry.py", "out=out", "tokens=false", "eval_sets=false", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0 are downloaded, 0 are built" in done.stdout and "MiB  in all, of 64" in done.stdout
    assert "--no-index" in done.stdout and "scripts/gpu_check.py report=$OUT" in done.stdout
    pins = (CHECKOUT / "constraints.txt").read_text().splitlines()
    assert {*carry.BINARIES, *carry.SOURCES} <= {line.partition("==")[0] for line in pins}


@pytest.fixture
def stage(monkeypatch):
    """Make a function the stage `clipping`, and run it as the process of the stage does."""
    check = load_script("gpu_check")

    def run(folder, function):
        module = ModuleType("scripts.gpu_stages.clipping")
        module.run = function
        monkeypatch.setitem(sys.modules, "scripts.gpu_stages.clipping", module)
        monkeypatch.setenv("GPU_CHECK_DEADLINE", "0")
        check.run_here(check.GpuCheckConfig(stage="clipping"), folder)

    return run


@pytest.mark.parametrize(("error", "state"), [(ValueError("no"), "failed"), (TimeoutError("no"), "unfinished")])
def test_results_before_an_error_are_kept_and_passed_to_the_next_call(error, state, stage, tmp_path):
    seen = []

    def first(context):
        context.save(one=1)
        raise error

    with pytest.raises(type(error)):
        stage(tmp_path, first)
    assert states(tmp_path)["clipping"] == {"state": state, "error": "no", "results": {"one": 1}}
    stage(tmp_path, lambda context: (seen.append(dict(context.results)), context.save(two=2)))
    assert seen == [{"one": 1}]
    assert states(tmp_path)["clipping"] == {"state": "done", "results": {"one": 1, "two": 2}}


def test_a_stage_that_takes_too_long_is_ended_with_its_children_and_goes_on_later(monkeypatch, tmp_path):
    check = load_script("gpu_check")
    program = tmp_path / "stage.py"
    program.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        f'open({str(tmp_path / "clipping.json")!r}, "w").write(\'{{"state": "running", "results": {{"one": 1}}}}\')\n'
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(check, "__file__", str(program))
    monkeypatch.setitem(check.STAGES, "clipping", (1, 1))
    config = check.GpuCheckConfig(only="clipping")
    check.run_stage("clipping", config, tmp_path, check.time.time() + 100, check.make_console())
    found = states(tmp_path)["clipping"]
    assert found["state"] == "unfinished" and found["results"] == {"one": 1} and found["seconds"] >= 1
    assert have_ended([(tmp_path / "child").read_text()], seconds=30)


def test_a_stage_leaves_time_for_those_after_it(monkeypatch, tmp_path, capsys):
    check = load_script("gpu_check")
    monkeypatch.setattr(check.subprocess, "Popen", None)  # nothing is started
    config = check.GpuCheckConfig(only="figure")
    check.run_stage("figure", config, tmp_path, check.time.time() + 100, check.make_console())
    assert "it needs 150: call again" in capsys.readouterr().out and not states(tmp_path)


#: Checks of what each stage has found in a dry run.
FOUND = {
    "environment": lambda results, out: results["versions"]["torch"],
    "cuda_tests": lambda results, out: results,
    "training": lambda results, out: results,
    "resume": lambda results, out: results["equal"] == results["tensors"] > 0 and results["same_losses"],
    "figure": lambda results, out: (out / "figure1.png").exists(),
}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The folder with the results of a dry run of these stages, which share their tokens, and of the evaluation."""
    folder = tmp_path_factory.mktemp("dry-run")
    settings = ("dry_run=true", f"only={','.join(FOUND)},evaluation", "budget=1400", "out=out", "carried=none")
    done = run("scripts/gpu_check.py", *settings, cwd=folder, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FOUND)
def test_a_dry_run_runs_every_stage(name, dry_run):
    stage = states(dry_run)[name]
    assert stage["state"] == "done" and FOUND[name](stage["results"], dry_run), stage


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_stage_of_the_validation_sets_says_that_there_are_none(dry_run):
    stage = states(dry_run)["evaluation"]
    assert stage["state"] == "failed" and "there are no validation sets" in stage["error"], stage
