"""scripts/evaluate.py on runs and exported models; one evaluation is killed and resumes."""

import errno
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.torch import load_file, save_file

import evaluation.evaluator
from common.errors import UserError
from common.settings import parse
from tests.helpers import CHECKOUT, SLOW, script, start
from tests.scripts.loading import load_script


@pytest.fixture(scope="module")
def runs(finished_run, sharded_run, tmp_path_factory) -> Path:
    """A folder with two finished runs, one of them sharded, and three runs that cannot be scored."""
    folder = tmp_path_factory.mktemp("runs") / "runs"
    one = folder / "main" / "one"
    for name, run in (("one", finished_run), ("two", sharded_run), ("diverged", finished_run), ("lost", finished_run)):
        shutil.copytree(run, one.with_name(name))
    one.with_name("empty").mkdir()
    shutil.copy(one / "config.yaml", one.with_name("empty"))
    shutil.rmtree(one.with_name("lost") / "tokenizer")
    (path,) = one.with_name("diverged").glob("checkpoints/*40.ckpt")
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["state_dict"]["model.model.norm.weight"].fill_(float("nan"))
    torch.save(checkpoint, path)
    return folder


def scores(path: Path) -> list[dict]:
    return json.loads(path.read_text())["scores"]


def numbers(score: dict) -> dict:
    return {
        key: value for key, value in score.items() if key.startswith("acc") or key in ("items", "task", "num_fewshot")
    }


def test_only_missing_scores_of_a_sweep_are_computed(runs, sets, tmp_path, evaluate, capsys):
    settings = (f"run={runs}/main", f"eval.data_dir={sets}", "eval.limit=20")
    done = script("evaluate.py", *settings, "eval.tasks=[winogrande]", cwd=tmp_path)
    assert done.returncode == 3 and done.stderr == "3 of the runs were skipped, see above\n", done.stderr
    for name, why in (
        ("empty", f"run={runs}/main/empty has no checkpoint yet: train it first"),
        ("diverged", "the model's answers are not numbers: it has diverged, and has no score"),
        ("lost", f"run={runs}/main/lost has lost its tokenizer: "),
    ):
        assert f"{name}: {why}" in done.stdout
    one = runs / "main" / "one" / "task_scores.json"
    (first,) = scores(one)
    assert first["items"] == first["limit"] == 20 and first["step"] == 40 and first["num_fewshot"] == 0
    assert 0 <= first["acc"] <= 1 and first["acc_stderr"] > 0 and first["versions"]["lm_eval"]
    evaluate(
        f"run=[{runs}/main/one,{runs}/main/two]", *settings[1:], "eval.tasks=[winogrande]", "eval.num_fewshot=[0,1]"
    )
    assert scores(one)[0] == first, "it was not scored again"
    assert [(s["task"], s["num_fewshot"]) for s in scores(one)] == [("winogrande", 0), ("winogrande", 1)]
    assert "items: winogrande 20 drawn" in capsys.readouterr().out
    assert_similar(one, runs / "main" / "two" / "task_scores.json")
    assert not list(runs.rglob(".task_scores-*"))


def assert_similar(file: Path, other_file: Path) -> None:
    """Assert that scores differ by no more than those of a run and of its sharded version: by rounding."""
    for score, other in zip(scores(file), scores(other_file), strict=True):
        assert score["task"] == other["task"] and abs(score["acc"] - other["acc"]) <= 0.1


def test_checkpoint_may_be_removed_while_the_tasks_are_loaded(runs, sets, tmp_path, evaluate, monkeypatch):
    """A run that is still training keeps only its last ones."""
    run = shutil.copytree(runs / "main" / "one", tmp_path / "run")
    load = evaluation.evaluator.load_tasks

    def remove_and_load(*arguments):
        shutil.rmtree(run / "checkpoints")
        return load(*arguments)

    monkeypatch.setattr("evaluation.evaluator.load_tasks", remove_and_load)
    evaluate(f"run={run}", f"eval.data_dir={sets}", "eval.limit=4", "eval.tasks=[winogrande]", "eval.seed=9")
    assert scores(run / "task_scores.json")[-1]["items"] == 4
    assert not list(run.glob(".saving-*"))


@pytest.mark.slow
def test_both_tasks_are_scored_by_default(runs, sets, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(runs / "main" / name, tmp_path / name)
        (tmp_path / name / "task_scores.json").unlink(missing_ok=True)
    settings = (f"eval.data_dir={sets}", "eval.limit=60", "eval.num_fewshot=[0,1]")
    done = script("evaluate.py", "run=[one,two]", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {(s["task"], s["num_fewshot"]) for s in scores(tmp_path / "one" / "task_scores.json")} == {
        ("winogrande", 0), ("hellaswag", 0), ("hellaswag", 1), ("winogrande", 1),
    }  # fmt: skip
    assert "items: hellaswag 60 drawn, winogrande 60 drawn" in done.stdout and "acc_norm" in done.stdout
    assert_similar(tmp_path / "one" / "task_scores.json", tmp_path / "two" / "task_scores.json")


@pytest.mark.parametrize("task", ["winogrande", SLOW("hellaswag")])
def test_exported_run_has_the_same_scores(task, runs, exported, sets, tmp_path, evaluate):
    shutil.copytree(exported, tmp_path / "exported")
    shutil.copytree(runs / "main" / "one", tmp_path / "one")
    settings = (f"eval.data_dir={sets}", "eval.limit=30", "eval.seed=4", f"eval.tasks=[{task}]")
    for subject in (f"hf={tmp_path}/exported", f"run={tmp_path}/one"):
        evaluate(subject, *settings)
    ours = [numbers(score) for score in scores(tmp_path / "one" / "task_scores.json") if score["seed"] == 4]
    assert ours == [numbers(score) for score in scores(tmp_path / "exported" / "task_scores.json")]


@pytest.mark.slow
def test_scores_of_two_models_can_be_in_one_file(exported, sets, tmp_path):
    weights = load_file(exported / "model.safetensors")
    shutil.copytree(exported, tmp_path / "other")
    negated = {name: -tensor for name, tensor in weights.items()}
    save_file(negated, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    settings = (f"eval.data_dir={sets}", "eval.limit=20", "eval.tasks=[winogrande]")
    for model in (exported, "other"):
        done = script("evaluate.py", f"hf={model}", "out=both.json", *settings, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert len(scores(tmp_path / "both.json")) == 2


@pytest.mark.slow
def test_killed_evaluation_resumes(runs, sets, tmp_path):
    for name in ("complete", "killed"):
        shutil.copytree(runs / "main" / "one", tmp_path / name)
        (tmp_path / name / "task_scores.json").unlink(missing_ok=True)
    settings = (f"eval.data_dir={sets}", "eval.limit=600", "eval.tasks=[hellaswag]")
    job = start("run=killed", *settings, cwd=tmp_path, program="scripts/evaluate.py")
    responses = tmp_path / "killed" / ".task_scores-40-float32.jsonl"
    while not responses.exists() or responses.stat().st_size == 0:
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    job.kill()
    job.wait()
    with responses.open("a") as file:
        file.write('["half a li')
    before = responses.read_bytes()
    assert not (tmp_path / "killed" / "task_scores.json").exists() and before.count(b"\n") >= 513
    for name in ("complete", "killed"):
        done = script("evaluate.py", f"run={name}", *settings, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    complete, killed = (scores(tmp_path / name / "task_scores.json") for name in ("complete", "killed"))
    assert [numbers(score) for score in complete] == [numbers(score) for score in killed]


DATA_DIR = "it must be a folder with the validation sets of the tasks"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run=nothing", "run=nothing does not exist: it must be a run folder, or a folder of such"),
        ("run=.", "run=. is not a run folder: it must be one, with a config.yaml in it, or hold such"),
        ("hf=./nothing", "hf=./nothing does not exist: it must be a folder, or owner/name on the Hugging Face hub"),
        ("eval.tasks=hellaswag", "eval.tasks=hellaswag is not allowed: it must be a list of tasks, as [hellaswag]"),
        ("eval.limit=0", "eval.limit=0 is not allowed: it must be an integer from 1, or null"),
        ("eval.num_fewshot=-1", "eval.num_fewshot=-1 is not allowed: it must be integers from 0, as 0 or [0,5]"),
        ("eval.data_dir=nowhere", f"eval.data_dir=nowhere does not exist: {DATA_DIR}"),
        ("eval.data_dir=notes", f"eval.data_dir=notes is a file: {DATA_DIR}"),
        (
            "eval.data_dir=. eval.tasks=[last_word,winogrande]",
            "eval.data_dir=. has no winogrande_xl_validation.jsonl, and no winogrande_xl_validation.jsonl.xz: "
            f"{DATA_DIR}",
        ),
        ("eval.num_fewshot=[]", "eval.num_fewshot=[] is not allowed: it must be integers from 0, as 0 or [0,5]"),
        (
            "run={a:1}",
            "run={'a': 1} is not allowed: it must be a run folder, the folder of an experiment, or a list of such",
        ),
        ("hf=./x run=y", "run=y means nothing with hf=./x: give one of them"),
        ("hf=./x step=3", "step=3 means nothing with hf=./x: give one of them"),
        ("hf=. out=.", "out=. is a folder: it must be a file for the scores"),
        ("hf=. out=/dev/null", "out=/dev/null is there, and no file of scores: choose another"),
        ("hf=. out=notes", "out=notes is there, and no file of scores: choose another"),
        ("hf=a/b/c", "hf=a/b/c does not exist: it must be a folder, or owner/name on the Hugging Face hub"),
        ("out=x.json", "out=x.json means nothing without hf: the scores of a run are in its task_scores.json"),
        ("dtype=float", "dtype=float is not allowed: it must be one of float32, bfloat16, float16"),
        ("device=tpu", "device=tpu is not possible: it must be auto, cpu, or cuda where torch sees a GPU"),
    ],
)
def test_evaluate_mistakes_are_one_sentence(override, message, tmp_path, monkeypatch, evaluate):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("somebody's notes")
    with pytest.raises(UserError) as error:
        evaluate(*override.split())
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run=nothing", "run=nothing does not exist: it must be a run folder, or a folder of such"),
        SLOW(
            "eval.task=[x]",
            "eval.task=[x] is not possible: there is no key eval.task (the nearest is eval.tasks); `--cfg job` lists "
            "all keys",
        ),
    ],
)
def test_evaluate_prints_a_mistake_with_status_2(override, message, tmp_path):
    done = script("evaluate.py", override, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == f"evaluate.py: error: {message}\n", done.stderr


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What is held until the end of a test."""
    with ExitStack() as stack:
        yield stack


def test_runs_of_one_name_are_named_by_their_folders(finished_run, tmp_path, monkeypatch, capsys, stack):
    """And a run that has not reached its last step is said to be unfinished, unless a step is asked for."""
    monkeypatch.chdir(tmp_path)
    for name in ("a/one", "b/one", "b/two"):
        shutil.copytree(finished_run, tmp_path / name)
    (tmp_path / "b/two/checkpoints/step-00000040.ckpt").unlink()
    evaluate = load_script("evaluate")
    with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
        values = OmegaConf.to_container(compose("evaluate", [f"run=[a/one,b,{tmp_path}/a/one]"]), resolve=True)
    config, console, skipped = parse(evaluate.EvaluateConfig, values), Console(width=200), []
    models = evaluate.run_models(config, console, skipped, stack)
    assert [(model.title, model.step) for model in models] == [(f"{tmp_path}/a/one", 40), ("b/one", 40), ("two", 32)]
    assert not skipped and re.findall(r"^(\S+) is not finished: this is step 32 ", capsys.readouterr().out, re.M) == [
        "b/two"
    ]
    models = evaluate.run_models(config.model_copy(update={"step": 32}), console, skipped, stack)
    assert {model.step for model in models} == {32} and capsys.readouterr().out == ""
    shutil.rmtree(tmp_path / "b/two/checkpoints")
    (tmp_path / "b/two/result.json").unlink()
    with pytest.raises(UserError, match=r"^run=b/two has no checkpoint yet: train it first$"):
        evaluate.run_models(config.model_copy(update={"run": "b/two"}), console, skipped, stack)
    assert [model.title for model in evaluate.run_models(config, console, skipped, stack)][1:] == ["b/one"]
    assert skipped == ["b/two"] and "skipped: b/two: run=b/two has no checkpoint yet" in capsys.readouterr().out


def test_run_that_cannot_be_read_is_skipped_and_a_full_disk_is_not(capsys):
    skip_failures, skipped = load_script("evaluate").skip_failures, []
    with skip_failures("one", 2, Console(width=200), skipped):
        raise FileNotFoundError("config.yaml")
    assert skipped == ["one"]
    assert capsys.readouterr().out == "skipped: one: run=one cannot be read (FileNotFoundError: config.yaml)\n"
    with pytest.raises(OSError, match="No space left"), skip_failures("two", 2, Console(), skipped):
        raise OSError(errno.ENOSPC, "No space left on device")
    message = r"^run=one cannot be read \(KeyError: 'model'\)$"
    with pytest.raises(UserError, match=message), skip_failures("one", 1, Console(), skipped):
        raise KeyError("model")


SOURCES = ("the Hugging Face hub", "eval.data_dir=", "`make eval-data`")


def test_missing_data_error_names_the_sources(runs, tmp_path, monkeypatch, evaluate):
    """Of lm-eval's tasks, whose files it takes ten seconds to read, only this one is read."""
    only_hellaswag = Path(lm_eval.tasks.__file__).parent / "hellaswag"
    manager = partial(lm_eval.tasks.TaskManager, include_path=str(only_hellaswag))
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_defaults: manager(include_defaults=False))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "none")
    message = r"the data of eval.tasks=hellaswag cannot be loaded \(.+\)"
    with pytest.raises(UserError, match=message) as error:
        evaluate(f"run={runs}/main/two", "eval.seed=9", "eval.limit=5", f"paths.cache={tmp_path}")
    assert all(source in str(error.value) for source in SOURCES)


@pytest.mark.slow
def test_missing_data_is_an_error_of_one_sentence(runs, tmp_path):
    env = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "none")}
    done = script("evaluate.py", f"run={runs}/main/two", "eval.seed=9", "eval.limit=5", cwd=tmp_path, **env)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "the data of eval.tasks=hellaswag cannot be loaded (" in done.stderr
    assert all(source in done.stderr for source in SOURCES)


def change_config(folder: Path, **fields: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | fields))


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def weights_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    names = load_file(folder.parent / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_a_weight, "1 weights are missing, model.norm.weight among them"),
        (
            weights_elsewhere,
            "model.safetensors.index.json names ../other.safetensors, which is not the name of a file in the folder",
        ),
        (
            partial(change_config, attn_implementation="somebody/kernel"),
            "attn_implementation=somebody/kernel is code on the hub",
        ),
    ],
)
def test_hugging_face_model_is_whole_and_only_from_its_folder(change, reason, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "model")
    change(folder)
    model = evaluation.evaluator.hugging_face_model(str(folder), folder / "task_scores.json", "cpu", "float32")
    with pytest.raises(UserError) as error:
        model.load()
    assert str(error.value) == f"hf={folder} cannot be loaded ({reason})"
