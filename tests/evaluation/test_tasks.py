"""Tasks, and their data from files."""

import json
import lzma
import shutil
from pathlib import Path

import lm_eval.tasks
import pytest
import yaml

from common.errors import ConfigError
from evaluation.language_model import LlamaLM
from evaluation.scores import score_task
from evaluation.tasks import TaskError, check_data_dir, data_file, data_folders, load_tasks, sample
from tests.evaluation.conftest import items
from tests.evaluation.known_models import CPU, Uniform
from tests.helpers import SLOW


def test_sampled_items_are_deterministic_and_from_the_whole_set():
    drawn = sample(10_042, 500, seed=0)
    assert drawn == sample(10_042, 500, seed=0) != sample(10_042, 500, seed=1)
    assert drawn == sorted(set(drawn)) and len(drawn) == 500 and drawn[-1] < 10_042
    first_source = sum(item < 3_243 for item in drawn) / 500
    assert abs(first_source - 3_243 / 10_042) < 0.07
    assert sample(10, None, 0) is sample(10, 10, 0) is sample(10, 99, 0) is None


def test_sets_are_those_of_the_given_folder_or_of_the_cache():
    """A folder that is given never stands in for another one."""
    assert data_folders("sets", "cache") == [Path("sets")]
    assert data_folders(None, "cache") == [Path("cache/eval")]


#: Kinds of `eval.data_dir` that cannot be, and what is said of each.
WRONG_FOLDERS = {
    "nothing": "does not exist",
    "file": "is a file",
    "file/sets": "does not exist",
    "dangling": "does not exist",
    "other": "has no hellaswag_validation.jsonl, and no hellaswag_validation.jsonl.xz",
    "folders": "has no winogrande_xl_validation.jsonl, and no winogrande_xl_validation.jsonl.xz",
    "x" * 300: "cannot be read (File name too long)",
}


def make_folders(parent: Path) -> None:
    (parent / "file").write_text("x")
    (parent / "dangling").symlink_to("nowhere")
    for name, files in (("other", ["winogrande_xl"]), ("folders", ["hellaswag"]), ("whole", ["winogrande_xl"])):
        (parent / name).mkdir()
        for file in files:
            (parent / name / f"{file}_validation.jsonl.xz").touch()
    (parent / "folders" / "winogrande_xl_validation.jsonl").mkdir()


@pytest.mark.parametrize("name", WRONG_FOLDERS)
def test_folder_without_the_sets_of_the_tasks_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folders(tmp_path)
    with pytest.raises(ConfigError) as error:
        check_data_dir(name, ["last_word", "hellaswag", "winogrande"])
    allowed = "it must be a folder with the validation sets of the tasks"
    assert str(error.value) == f"eval.data_dir={name} {WRONG_FOLDERS[name]}: {allowed}"
    check_data_dir("whole", ["last_word", "winogrande"])
    check_data_dir("whole", ["last_word"])
    check_data_dir(None, ["hellaswag", "winogrande"])


def test_incomplete_or_damaged_sets_are_errors(sets, tmp_path):
    (file,) = sets.glob("winogrande*")
    shutil.copy(file, tmp_path)
    assert data_file(tmp_path, "winogrande") == tmp_path / file.name
    assert data_file(tmp_path, "hellaswag") is None
    text = (lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()).decode()
    (tmp_path / file.name).unlink()
    (tmp_path / "winogrande_xl_validation.jsonl").write_text(text + "\n\n")
    assert data_file(tmp_path, "winogrande") == tmp_path / "winogrande_xl_validation.jsonl", "empty lines are no items"
    (tmp_path / "winogrande_xl_validation.jsonl").write_text(text[: text.index("\n", 1000)])
    with pytest.raises(TaskError, match=r"winogrande_xl_validation.jsonl has \d+ items of winogrande: .* has 1,267"):
        load_tasks("winogrande", [tmp_path], 0)
    (tmp_path / "winogrande_xl_validation.jsonl").unlink()
    (tmp_path / "winogrande_xl_validation.jsonl.xz").write_bytes(b"no archive")
    with pytest.raises(TaskError, match="cannot be read"):
        data_file(tmp_path, "winogrande")


@pytest.mark.parametrize("name", ["x[1]*?", SLOW("[!a]/**/{b}"), SLOW("a::b"), "http:/t[1]/c\\d"])
def test_path_of_a_set_is_no_pattern_and_no_url(name, sets, tmp_path, monkeypatch):
    """The temporary folder may have such a name too."""
    folder, temporary = tmp_path / name, tmp_path / "t[1]"
    folder.mkdir(parents=True)
    temporary.mkdir()
    shutil.copy(next(sets.glob("winogrande*")), folder)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.chdir(folder)
    (task,) = load_tasks("winogrande", [Path()], 0)["tasks"].values()
    assert len(task.eval_docs) == 1_267 and task.eval_docs[0]["option1"]
    assert not any(temporary.iterdir())


@pytest.mark.parametrize("changed", ["answers", "repeated"])
def test_changed_items_are_an_error(changed, sets, tmp_path):
    lines = [json.dumps(item) for item in items(sets, "winogrande")]
    if changed == "answers":
        lines[7] = lines[7].replace('"answer": "1"', '"answer": "3"').replace('"answer": "2"', '"answer": "1"')
    else:
        lines = lines[:1] * len(lines)
    (tmp_path / "winogrande_xl_validation.jsonl").write_text("\n".join(lines))
    with pytest.raises(TaskError, match=r"has other items than the validation set of winogrande as it was published"):
        load_tasks("winogrande", [tmp_path], 0)


FIELDS = "not an object with sentence, option1, option2, answer"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("garbage", "Expecting value: line 1 column 1 (char 0)"),
        ("[1]", FIELDS),
        ("null", FIELDS),
        ('{"sentence": "a _ b", "option1": "x", "option2": "y"}', FIELDS),
        ("\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("first", [0, 1200])
def test_damaged_lines_are_one_sentence(line, reason, first, sets, tmp_path, capfd, caplog):
    """Of 1,267 lines as they should be. `datasets` logs a line of its own for some, and ends the process for `null`."""
    lines = [json.dumps(item) for item in items(sets, "winogrande")]
    path = tmp_path / "winogrande_xl_validation.jsonl"
    path.write_text("\n".join([*lines[:first], *[line] * (1267 - first)]), encoding="latin-1")
    with pytest.raises(TaskError) as error:
        load_tasks("winogrande", [tmp_path], 0)
    assert str(error.value) == f"{path} is damaged (line {first + 1}: {reason}): remove it, and get it again"
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_damaged_data_of_another_task_is_one_sentence(tmp_path, monkeypatch, capfd, caplog):
    """Its reason is that of the reader, and not that there was an error."""
    (tmp_path / "data.jsonl").write_text("garbage\n" * 3)
    task = {"task": "own", "dataset_path": "json", "validation_split": "validation", "doc_to_text": "x"}
    files = {"dataset_kwargs": {"data_files": {"validation": str(tmp_path / "data.jsonl")}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(task | files))
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager)
    with pytest.raises(TaskError) as error:
        load_tasks("own", [], 0)
    reason = "JSON parse error: Invalid value. in row 0"
    assert str(error.value) == f"the data of eval.tasks=own cannot be loaded ({reason})"
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_more_solved_examples_than_there_are_are_refused(sets):
    """Of 1,267 items, the item that is evaluated is no example."""
    load_tasks("winogrande", [sets], 1266)
    for number in (1267, 5000):
        with pytest.raises(ConfigError) as error:
            load_tasks("winogrande", [sets], number)
        allowed = "it must be at most 1,266 for winogrande, which has no more solved examples"
        assert str(error.value) == f"eval.num_fewshot={number} is not allowed: {allowed}"


OWN = {
    "task": "own",
    "dataset_path": "json",
    "validation_split": "validation",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["a", "b"],
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}


@pytest.mark.parametrize(
    ("splits", "available"),
    [
        ({}, 3),
        ({"training_split": "train"}, 5),
        ({"fewshot_split": "train"}, 6),
        ({"fewshot_config": {"split": "train", "sampler": "first_n"}}, 6),
        ({"fewshot_split": "validation", "test_split": "validation"}, 3),
        ({"fewshot_config": {"samples": [{"question": "?", "answer": 0}] * 2}, "test_split": "validation"}, 2),
    ],
)
def test_number_of_solved_examples_is_what_lm_eval_can_draw(splits, available, tokenizer, tmp_path, monkeypatch):
    """The oracle is lm-eval's own evaluation, of a task of 4 items and a training set of 6. It may draw one more."""
    for split, count in (("validation", 4), ("train", 6)):
        rows = [json.dumps({"question": f"{split} {number}", "answer": 0}) for number in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("validation", "train")}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**OWN, "dataset_kwargs": {"data_files": files}, **splits}))
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager)
    model = LlamaLM(Uniform(tokenizer.size, []), tokenizer, CPU)
    assert score_task(model, "own", load_tasks("own", [], available), None, 0)["items"] == 4
    with pytest.raises(
        ConfigError, match=f"^eval.num_fewshot=9 is not allowed: it must be at most {available} for own"
    ):
        load_tasks("own", [], 9)
    loaded = load_tasks("own", [], available)
    loaded["tasks"]["own"].set_config(key="num_fewshot", value=available + 1)
    with pytest.raises(TaskError):
        score_task(model, "own", loaded, None, 0)


@pytest.mark.slow
def test_unknown_task_is_an_error(tmp_path):
    with pytest.raises(TaskError, match=r"eval.tasks=hellaswug is not known: it must be a task of lm-eval"):
        load_tasks("hellaswug", [tmp_path], 0)
