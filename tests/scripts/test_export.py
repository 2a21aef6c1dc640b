"""A run is exported to Hugging Face's format, and another run starts from the export."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf.errors import InterpolationResolutionError
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import CHECKOUT, SLOW, TINY, compose_config, read_jsonl, script, train
from tests.scripts.loading import load_script
from training.checkpoint.format import load_model_state


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(folder / "metrics.jsonl")]


def test_export_has_the_weights_and_the_tokenizer_of_the_run(exported, finished_run):
    assert len({file.stat().st_mode for file in exported.iterdir()}) == 1
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    card = (exported / "README.md").read_text()
    context = f"a context of {model.config.max_position_embeddings:,} tokens"
    assert f"{model.num_parameters():,} parameters with {context}, exported after step 40" in card, card
    assert f"each ended with `{tokenizer.eos_token}`" in card, card
    ids = tokenizer("The state of the Union is", return_tensors="pt")["input_ids"]
    saved = load_model_state(finished_run / "checkpoints" / "step-00000040.ckpt")
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert model.config.eos_token_id == tokenizer.eos_token_id and ids.max() < model.config.vocab_size
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] == ids.shape[1] + 5


def test_code_of_the_page_on_hugging_face_generates_text(exported, tmp_path, monkeypatch, capsys):
    page = (CHECKOUT / "docs" / "how-to" / "hugging-face.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "my-model").symlink_to(exported)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "hugging-face.md", "exec"), {})  # what the reader would run
    assert capsys.readouterr().out.startswith("The state of the Union is")


def test_step_and_dtype_of_the_export(finished_run, tmp_path):
    """What an export that was killed has left is replaced."""
    (tmp_path / ".saving-0123-exported").mkdir()
    (tmp_path / ".saving-0123-exported" / "left").touch()
    done = script("export_hf.py", f"run={finished_run}", "out=exported", "step=8", "dtype=bfloat16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"step 8 .*[\d,]+ parameters in bfloat16: exported\n", done.stdout), done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    saved = load_model_state(finished_run / "checkpoints" / "step-00000008.ckpt")
    assert model.dtype == torch.bfloat16 and not (tmp_path / "exported" / "left").exists()
    assert all(torch.equal(tensor, saved[name].bfloat16()) for name, tensor in model.state_dict().items())


def test_run_whose_name_looks_like_a_number_is_exported_into_its_folder(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "1.10")
    done = script("export_hf.py", "run=1.10", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith(": 1.10/hugging_face\n"), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["1.10"]


def test_model_card_shows_names_as_they_are():
    config = SimpleNamespace(parameters=1, max_position_embeddings=64)
    run_dir = SimpleNamespace(path=Path("/runs/<b>[x](http:y)\n# z"))
    checkpoint = SimpleNamespace(run_dir=run_dir, config=config, description="step 1")
    card = load_script("export_hf").model_card(checkpoint, "`</s>`\n# end")
    assert "\n# \\<b\\>\\[x\\](http:y) # z\n" in card and "ended with `'</s>' # end`" in card and "\n# end" not in card


def started_from(exported: Path, corpus: Path, cache: Path) -> tuple[str, ...]:
    """Return the settings of a run of three steps that starts from the export."""
    own = ("trainer.max_steps=3", "lr=1e-5", f"model.init_from={exported}", f"data.tokenizer={exported}")
    return (f"data.path={corpus}", f"paths.cache={cache}", *own)


def test_run_starts_from_an_export_and_takes_its_shape(exported, finished_run, corpus, cache, tmp_path):
    shape = [setting for setting in TINY if not setting.startswith("model.")]
    done = train("model=hf", *shape, *started_from(exported, corpus, cache), "name=shape", cwd=tmp_path)
    assert done.returncode == 0 and f"starting from the weights in {exported}" in done.stdout, done.stderr
    started, first = losses(tmp_path / "runs" / "main" / "shape"), losses(finished_run)
    assert started[0] < first[0] - 0.5 and abs(started[0] - first[-1]) < 0.5


def test_finished_run_is_shown_without_the_folder_that_it_started_from(exported, corpus, cache, tmp_path):
    model, runs = shutil.copytree(exported, tmp_path / "model"), tmp_path / "runs" / "main"
    shape = [setting for setting in TINY if not setting.startswith("model.")]
    settings = ("model=hf", *shape, *started_from(model, corpus, cache))
    done = train(*settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = runs.iterdir()
    shutil.rmtree(model)
    again = train(*settings, cwd=tmp_path)
    assert again.returncode == 0 and f"finished already: runs/main/{run.name} " in again.stdout, again.stderr
    gone = f"model.init_from={model} cannot be read"
    for other in ("lr=1e-4", "name=new", "name=new plan=true"):
        done = train(*settings, *other.split(), cwd=tmp_path)
        assert done.returncode == 2 and gone in done.stderr and [*runs.iterdir()] == [run], (other, done)
    config = run / "config.yaml"
    (shutil.copytree(run, runs / "other") / "config.yaml").write_text(
        config.read_text().replace("rms_norm_eps: 1.0e-05", "rms_norm_eps: 1.0e-04")
    )
    own = ("model=hf", f"model.init_from={model}", f"paths.runs={tmp_path}/runs")
    eps = [compose_config(*own, f"name={name}").model.rms_norm_eps for name in (run.name, "other")]
    assert eps == [1e-5, 1e-4], "each has its own"
    with pytest.raises(InterpolationResolutionError, match=re.escape(gone)):
        compose_config(*own)


@pytest.mark.slow
def test_shape_can_be_given_or_taken_from_the_export(exported, corpus, cache, tmp_path):
    shape = [setting for setting in TINY if not setting.startswith("model.")]
    for name, model in (("shape", ["model=hf", *shape]), ("explicit", TINY)):
        done = train(*model, *started_from(exported, corpus, cache), f"name={name}", cwd=tmp_path)
        assert done.returncode == 0 and f"starting from the weights in {exported}" in done.stdout, done.stderr
    assert losses(tmp_path / "runs" / "main" / "shape") == losses(tmp_path / "runs" / "main" / "explicit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        SLOW([], "run is not set: give it as run=..."),
        SLOW(["run=nowhere", "out=x"], "run=nowhere is not a run folder: it must be one"),
        (["run={run}", "out={exported}"], "out={exported} exists already"),
        (["run={run}", "out=x", "step=7"], "step=7 has no checkpoint in"),
        SLOW(["run={run}", "out=x", "dtype=int8"], "dtype=int8 is not allowed: it must be one of"),
    ],
)
def test_mistakes_of_an_export_are_one_sentence(arguments, message, exported, finished_run, tmp_path):
    given = [argument.format(run=finished_run, exported=exported) for argument in arguments]
    done = script("export_hf.py", *given, cwd=tmp_path)
    assert done.returncode == 2 and message.format(exported=exported) in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not [*tmp_path.iterdir()], done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        SLOW(["model=hf"], "model.init_from=null is not possible with model=hf"),
        SLOW(["model=hf", "model.init_from=x"], "model.init_from=x cannot be read"),
        (["model.init_from={exported}"], "model.vocab_size=4096 is not allowed: {exported} has 512; model=hf"),
        SLOW(["model=hf", "model.init_from={exported}"], "data.tokenizer=null is not possible with model.init"),
    ],
)
def test_mistakes_of_a_run_from_an_export_are_one_sentence(arguments, message, exported, tmp_path):
    done = train(*(argument.format(exported=exported) for argument in arguments), cwd=tmp_path)
    assert done.returncode == 2 and message.format(exported=exported) in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not [*tmp_path.iterdir()], done.stderr


@pytest.mark.slow
def test_resumed_run_does_not_load_initial_weights_again(exported, corpus, cache, tmp_path):
    settings = [*TINY, *started_from(exported, corpus, cache), "name=x", "trainer.checkpoint_every=2"]
    done = train(*settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "runs" / "main" / "x"
    before = losses(path)
    (path / "result.json").unlink()
    max((path / "checkpoints").glob("step-*.ckpt")).unlink()
    done = train(*settings, cwd=tmp_path)
    assert done.returncode == 0 and "starting from the weights" not in done.stdout, done.stderr
    assert "continuing" in done.stdout and losses(path) == before
