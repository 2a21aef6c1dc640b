"""The settings that a run saves: its name, what may differ when it resumes, and files from others."""

import shutil

import pytest
from rich.console import Console

from common.errors import ConfigError, UserError
from tests.helpers import compose_config, copy_run, read_jsonl, train
from training.config.compose import read_config, resumed_config, to_yaml
from training.config.identity import differences, identity, run_name
from training.config.schema import ClipConfig
from training.run import prepare_tokens


def test_taken_name_is_refused(finished_run, tiny, refusal, tmp_path, monkeypatch):
    run = copy_run(finished_run, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    line = refusal(*tiny, f"name={run.name}", "lr=1e-4")
    assert f"name={run.name} is taken" in line and "lr=0.0001 (there: 0.003)" in line
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_checkpoint_says_what_a_run_was_trained_with(finished_run, tiny, checked, refusal, tmp_path, monkeypatch):
    """config.yaml may be lost: it is made again from the same settings only. It may not say what was not trained."""
    run = copy_run(finished_run, tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = (*tiny, f"name={run.name}", "trainer.checkpoint_every=8", "trainer.keep_last=9")
    file = run / "config.yaml"
    written = file.read_text()
    file.write_text(written.replace("weight_decay: 0.01", "weight_decay: 0.5"))
    assert "config.yaml says what the run was not trained with, optim.weight_decay=0.5 (trained: 0.01)" in refusal(
        *settings, "optim.weight_decay=0.5"
    )
    assert "what the run was not trained with" in refusal(f"resume={run}")
    file.unlink()
    assert "optim.weight_decay=0.5 (there: 0.01)" in refusal(*settings, "optim.weight_decay=0.5")
    config, run_dir = checked(*settings)
    resumed, _ = checked(f"resume={run}")
    assert differences(config, resumed) == {} and resumed.optim.weight_decay == 0.01
    with run_dir.acquire(resumed, prepare_tokens(config, Console(quiet=True))):
        assert differences(read_config(file), config) == {}


def test_saved_configuration_is_the_same_configuration(tmp_path):
    overrides = ("clip=adagc", "data.corruption.steps=[3,5]", "lr=1e-4", "data.max_tokens=50e9")
    saved = compose_config(*overrides, "data.column='é\x85 \u2028'")  # rare line breaks
    assert saved.data.column == "é\x85 \u2028"
    (tmp_path / "config.yaml").write_text(to_yaml(saved))
    assert read_config(tmp_path / "config.yaml") == saved
    assert identity(read_config(tmp_path / "config.yaml")) == identity(saved)


def test_run_whose_steps_are_not_drawn_keeps_the_name_that_it_had():
    """The hash in the name of a run folder is of its settings. Runs of earlier versions must be found again."""
    plain, drawn = (
        compose_config(),
        compose_config("data.corruption.random_steps=4", "data.corruption.random_first_step=9"),
    )
    assert identity(plain)["data"]["corruption"] == {"steps": [], "kind": "random"}
    assert "instance_filter" not in identity(plain)["data"]
    assert identity(drawn)["data"]["corruption"]["random_first_step"] == 9
    assert len({run_name(compose_config("data.corruption.random_steps=4", f"seed={seed}")) for seed in (0, 1)}) == 2


def test_corrupted_batches_of_a_run_are_drawn_by_its_seed():
    setting = ("data.corruption.random_steps=4", "data.corruption.random_first_step=100")
    steps = [list(compose_config(*setting, f"seed={seed}").corrupted_batches) for seed in (0, 1)]
    assert steps[0] != steps[1] and all(100 <= step <= 300 for step in (*steps[0], *steps[1]))


def test_run_folder_of_another_version_is_named(tiny, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "main" / "old"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(compose_config()).replace("on_nonfinite:", "nonfinite:"))
    line = refusal(*tiny, "name=old")
    assert "config.yaml is not a configuration of this version (trainer.nonfinite=skip is not possible" in line


def test_run_follows_its_text_to_another_place(finished_run, corpus, tiny, checked, refusal, tmp_path, monkeypatch):
    """Its tokens are known by their content: text that is another one is refused later."""
    run = copy_run(finished_run, tmp_path)
    moved = shutil.copytree(corpus, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    config, run_dir = checked(f"resume={run}", f"data.path={moved}", f"data.tokenizer={run / 'tokenizer'}")
    assert config.data.path == config.data.sources["text"].path == str(moved)
    with run_dir.acquire(config, prepare_tokens(config, Console(quiet=True))):
        assert len(run_dir.checkpoint_steps()) > 1
    (moved / "more.txt").write_text("another text " * 100)
    tokens = prepare_tokens(config, Console(quiet=True))
    with pytest.raises(UserError, match="the text has changed"), run_dir.acquire(config, tokens):
        pass
    line = refusal(f"resume={run}", f"data.sources.other.path={moved}")
    assert "data.sources.other.path" in line and "is not possible" in line


def test_class_that_a_run_folder_names_is_not_imported(tiny, checked, refusal, tmp_path, monkeypatch):
    """It is if the command line names it too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "imported_from_run.py").write_text(
        "from pathlib import Path\nfrom zclip import ZClip\nPath('imported').touch()\nclass Mine(ZClip): pass\n"
    )
    folder = tmp_path / "runs" / "main" / "theirs"
    folder.mkdir(parents=True)
    theirs = compose_config(*tiny, "name=theirs").model_copy(
        update={"clip": ClipConfig(_target_="imported_from_run.Mine", name="x")}
    )
    (folder / "config.yaml").write_text(to_yaml(theirs))
    line = refusal(f"resume={folder}")
    assert "clip._target_=imported_from_run.Mine is not a class of zclip, and not imported because a file says" in line
    assert "is taken" in refusal(*tiny, "name=theirs")
    assert "imported_from_run.Mine is not" in refusal(f"resume={folder}", "clip._target_=os.system")
    assert not (tmp_path / "imported").exists()
    resumed, _ = checked(f"resume={folder}", "clip._target_=imported_from_run.Mine")
    assert resumed.clip.target == "imported_from_run.Mine" and (tmp_path / "imported").exists()


def test_run_is_resumed_from_its_folder_alone(finished_run, refusal, tmp_path, monkeypatch):
    moved = shutil.copytree(finished_run, tmp_path / "moved")
    metrics = read_jsonl(moved / "metrics.jsonl")
    (moved / "result.json").unlink()
    (moved / "checkpoints" / "step-00000040.ckpt").unlink()
    done = train(f"resume={moved}", "trainer.log_every=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"continuing {moved} after step 32 of 40" in done.stdout
    assert [row["loss"] for row in read_jsonl(moved / "metrics.jsonl")] == [row["loss"] for row in metrics]
    done = train(f"resume={moved}", cwd=tmp_path)
    assert "finished already" in done.stdout, done.stderr
    monkeypatch.chdir(tmp_path)
    line = refusal(f"resume={moved}", "lr=1e-4")
    assert f"lr=0.0001 is not possible with resume={moved}: the run has its own settings" in line
    for setting in ("fork_statistics=reset", "fork_data=new"):
        assert f"{setting} is not possible with resume={moved}: the run has its own" in refusal(
            f"resume={moved}", setting
        )


def test_resumed_run_that_rewinds_keeps_the_checkpoints_to_which_it_goes_back():
    change = "trainer.checkpoint_every=7"
    resumed = compose_config("resume=x", change)
    assert resumed_config(resumed, compose_config(), [change]).trainer.checkpoint_every == 7
    with pytest.raises(ConfigError, match=r"^trainer\.checkpoint_every=7 is not possible with resume=x: the run has"):
        resumed_config(resumed, compose_config("trainer.on_nonfinite=rewind"), [change])
