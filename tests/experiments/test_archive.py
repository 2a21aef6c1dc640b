"""Archives of runs: what is read of a restored run is what was read of the run itself."""

import json
import lzma
import shutil

import numpy as np
import pytest

from experiments.run.archive import DERIVED, ENDING, read_archive, restore_archive, write_archive
from experiments.run.read import read_run
from tests.helpers import script, train


@pytest.fixture(scope="module")
def archive(finished_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("archives") / f"{finished_run.name}{ENDING}"
    write_archive(finished_run, path)
    return path


def test_restored_run_reads_as_the_run_itself(finished_run, archive, tmp_path):
    restore_archive(archive, tmp_path / "run")
    run, restored = read_run(finished_run), read_run(tmp_path / "run")
    assert restored.result == run.result
    columns = {name for name in run.metrics if not name.endswith(("seconds", "per_second", "mfu", "gib"))}
    assert {*restored.metrics} == columns and {"loss", "grad_norm", "clipped"} <= columns
    for name in columns:
        rtol = 6e-4 if name in DERIVED else 6e-5
        np.testing.assert_allclose(restored.metrics[name], run.metrics[name], rtol=rtol)
    for name in ("step", "tokens"):
        assert np.array_equal(restored.metrics[name], run.metrics[name])
    assert {key: value for key, value in restored.config.items() if key != "paths"} == {
        key: value for key, value in run.config.items() if key != "paths"
    }


def test_archive_of_before_has_whole_columns(archive, tmp_path):
    """Steps and tokens are archived as differences now. Recorded archives have the numbers themselves."""
    content = json.loads(lzma.decompress(archive.read_bytes()))
    assert {"step", "tokens"} <= {*content.pop("differences")} and set(content["metrics"]["step"]) == {1}
    whole = read_archive(archive).metrics
    old = tmp_path / f"old{ENDING}"
    old.write_bytes(lzma.compress(json.dumps(content | {"metrics": whole}).encode()))
    assert whole["step"] == [*range(1, len(whole["step"]) + 1)] and read_archive(old).metrics == whole


def test_archive_has_no_paths_of_the_machine_but_those_of_the_data(finished_run, archive):
    assert any(word.startswith("paths.cache=") for word in read_run(finished_run).environment["command"])
    files = json.loads(lzma.decompress(archive.read_bytes()))["files"]
    assert "paths:\n  runs: runs\n  cache: cache\n" in files["config.yaml"]
    assert "paths." not in files["environment.json"] and "data.path=" in files["environment.json"]


def test_train_shows_a_restored_run_and_does_not_train_it(finished_run, archive, tiny, tmp_path):
    experiment = finished_run.parent.name
    (tmp_path / "archives" / experiment).mkdir(parents=True)
    (tmp_path / "archives" / experiment / archive.name).write_bytes(archive.read_bytes())
    words = (f"experiment={experiment}", "archives=archives")
    done = script("archive.py", *words, "restore=true", cwd=tmp_path)
    assert done.returncode == 0 and "1 run restored, 0 were there already" in done.stdout, done.stderr
    done = train(*tiny, "trainer.checkpoint_every=8", "trainer.keep_last=9", cwd=tmp_path)
    assert "finished already" in done.stdout, done.stdout + done.stderr
    for more, message in (((), "0 runs archived, 1 was there"), (("restore=true",), "0 runs restored, 1 was")):
        done = script("archive.py", *words, *more, cwd=tmp_path)
        assert done.returncode == 0 and message in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not compressed by xz, or cut off"),
        (b"\xfd7zXZ\x00 and so on", "not compressed by xz, or cut off"),
        (lzma.compress(b"[]"), "not an object"),
        (lzma.compress(b'{"files": {}}'), "metrics"),
        (lzma.compress(b'{"files": {}, "metrics": {}}'), "config.yaml"),
        (lzma.compress(b'{"files": {"../x": ""}, "metrics": {}}'), "a run has no file '../x'"),
        (lzma.compress(b'{"files": {}, "metrics": {"step": [1], "loss": []}}'), "columns of metrics differ in length"),
        (lzma.compress(b'{"files": {}, "metrics": {"a": [1.5]}, "differences": ["a"]}'), "differences of 'a' must be"),
        (lzma.compress(b'{"files": {}, "metrics": {}, "differences": ["a"]}'), "differences of 'a' must be"),
        (lzma.compress(b"x" * 1000)[:40], "cut off"),
    ],
    ids=["empty", "no-xz", "list", "no-metrics", "no-config", "name", "columns", "float", "no-column", "cut-off"],
)
def test_damaged_archive_is_named_and_leaves_nothing(content, problem, tmp_path):
    (tmp_path / "archives" / "main").mkdir(parents=True)
    (tmp_path / "archives" / "main" / f"a{ENDING}").write_bytes(content)
    done = script("archive.py", "experiment=main", "archives=archives", "restore=true", cwd=tmp_path)
    assert done.returncode == 2 and "error: archives/main/a.json.xz cannot be restored (" in done.stderr, done
    assert problem in done.stderr and done.stderr.count("\n") == 1
    assert not [*(tmp_path / "runs").glob("*/*")]


def test_archive_of_an_unfinished_run_is_refused(finished_run, archive, tmp_path):
    content = json.loads(lzma.decompress(archive.read_bytes()))
    del content["files"]["result.json"]
    (tmp_path / "a.json.xz").write_bytes(lzma.compress(json.dumps(content).encode()))
    with pytest.raises(ValueError, match=r"has no result\.json"):
        restore_archive(tmp_path / "a.json.xz", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json.xz"]


def test_folder_that_appears_meanwhile_is_left_as_it_is(archive, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(OSError, match="not empty"):
        restore_archive(archive, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_one_damaged_archive_does_not_stop_the_others(archive, tmp_path):
    folder = tmp_path / "archives" / "main"
    folder.mkdir(parents=True)
    for name, content in (("a", b""), ("b", archive.read_bytes()), ("", archive.read_bytes()), ("..", b"")):
        (folder / f"{name}{ENDING}").write_bytes(content)
    done = script("archive.py", "experiment=main", "archives=archives", "restore=true", cwd=tmp_path)
    assert done.returncode == 2 and "archives/main/a.json.xz cannot be restored" in done.stderr
    assert "1 run restored, 0 were there already" in done.stdout
    for name in ("", ".."):
        assert f"archives/main/{name}.json.xz cannot be restored ({name!r} is no name of a run" in done.stderr
    assert [path.name for path in (tmp_path / "runs" / "main").iterdir()] == ["b"]


def test_run_that_could_not_be_restored_is_not_archived(finished_run, tmp_path):
    """And a file that is no archive is not taken for one. The other run is archived."""
    runs, archives = tmp_path / "runs" / "main", tmp_path / "archives" / "main"
    for name in ("good", "my run", "taken", ".saving-1234-leftover"):
        shutil.copytree(finished_run, runs / name)
    archives.mkdir(parents=True)
    (archives / f"taken{ENDING}").write_text("a note")
    done = script("archive.py", "experiment=main", "archives=archives", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "1 run archived, 0 were there already: archives/main\n", done
    assert "runs/main/my run cannot be archived ('my run' is no name of a run: it must have only" in done.stderr
    taken = f"runs/main/taken cannot be archived (archives/main/taken{ENDING} is there, and is no archive: not compr"
    assert taken in done.stderr and done.stderr.count("cannot be archived") == 2
    assert {path.name for path in archives.iterdir()} == {f"good{ENDING}", f"taken{ENDING}"}


def test_archive_that_is_not_restored_is_named(archive, tmp_path):
    """For its name, or as another folder is in the place of the run. A leftover of a killed process is neither."""
    folder = tmp_path / "archives" / "main"
    folder.mkdir(parents=True)
    for name in ("my run", "unfinished", ".saving-1234-leftover", "good"):
        (folder / f"{name}{ENDING}").write_bytes(archive.read_bytes())
    (tmp_path / "runs" / "main" / "unfinished" / "checkpoints").mkdir(parents=True)
    done = script("archive.py", "experiment=main", "archives=archives", "restore=true", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "1 run restored, 0 were there already: runs/main\n", done
    assert f"archives/main/my run{ENDING} cannot be restored ('my run' is no name of a run: it must" in done.stderr
    there = "cannot be restored (runs/main/unfinished is there, and is no finished run: move it away)"
    assert there in done.stderr and done.stderr.count("cannot be restored") == 2
    assert {path.name for path in (tmp_path / "runs" / "main").iterdir()} == {"unfinished", "good"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("experiment=none",), "runs=runs has no finished run of experiment=none"),
        (("experiment=none", "restore=true", "archives=a"), "archives=a has no archives of experiment=none"),
        (("experiment=../x",), "experiment=../x is not allowed: it must be a folder name"),
        ((), "experiment"),
    ],
)
def test_missing_runs_and_archives_are_named(words, message, tmp_path):
    done = script("archive.py", *words, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not [*tmp_path.iterdir()]
