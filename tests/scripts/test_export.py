"""A run is exported to Hugging Face's format, and another run starts from the export."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import TINY, script, train
from training.checkpoint.format import load_model_state


@pytest.fixture(scope="module")
def run(corpus, cache, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    done = train(*TINY, f"data.path={corpus}", f"paths.cache={cache}", "name=first", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "main" / "first"


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_exported_run_starts_another_run(run, corpus, cache, tmp_path):
    done = script("export_hf.py", f"run={run}", "out=exported", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert re.fullmatch(r"step 40, [\d,]+ parameters in float32: exported\n", done.stdout), done.stdout
    assert len({file.stat().st_mode for file in (tmp_path / "exported").iterdir()}) == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    ids = tokenizer("The state of the Union is", return_tensors="pt")["input_ids"]
    saved = load_model_state(max((run / "checkpoints").glob("step-*.ckpt")))
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert model.config.eos_token_id == tokenizer.eos_token_id and ids.max() < model.config.vocab_size
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] == ids.shape[1] + 5

    shape = [setting for setting in TINY if not setting.startswith("model.")]
    settings = [*shape, f"data.path={corpus}", f"paths.cache={cache}", "trainer.max_steps=3", "lr=1e-5"]
    on = [*settings, "model.init_from=exported", "data.tokenizer=exported"]
    for name, more in (("shape", ["model=hf", *on]), ("explicit", [*TINY, *on])):
        done = train(*more, f"name={name}", cwd=tmp_path)
        assert done.returncode == 0 and "starting from the weights in exported" in done.stdout, done.stderr
    started = losses(tmp_path / "runs" / "main" / "shape")
    assert started == losses(tmp_path / "runs" / "main" / "explicit")
    assert started[0] < losses(run)[0] - 0.5 and abs(started[0] - losses(run)[-1]) < 0.5


def test_step_and_dtype_of_the_export(run, tmp_path):
    done = script("export_hf.py", f"run={run}", "out=exported", "step=40", "dtype=bfloat16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_export_and_init_from_mistakes_are_one_sentence(run, tmp_path):
    assert script("export_hf.py", f"run={run}", "out=exported", cwd=tmp_path).returncode == 0
    cases = [
        (script, "export_hf.py", [], "run is not set: give it as run=..."),
        (script, "export_hf.py", ["run=nowhere"], "run=nowhere is not a run folder: it must be one"),
        (script, "export_hf.py", [f"run={run}", "out=exported"], "out=exported exists already"),
        (script, "export_hf.py", [f"run={run}", "out=x", "step=7"], "step=7 has no checkpoint in"),
        (script, "export_hf.py", [f"run={run}", "out=x", "dtype=int8"], "dtype=int8 is not allowed: it must be one of"),
        (train, "", ["model=hf"], "model.init_from=null is not possible with model=hf"),
        (train, "", ["model=hf", "model.init_from=x"], "model.init_from=x cannot be read"),
        (train, "", ["model.init_from=exported"], "model.vocab_size=4096 is not allowed: exported has 512; model=hf"),
        (train, "", ["model=hf", "model.init_from=exported"], "data.tokenizer=null is not possible with model.init"),
    ]  # fmt: skip
    for command, name, arguments, message in cases:
        done = command(*([name] if name else []), *arguments, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_resumed_run_does_not_load_initial_weights_again(run, corpus, cache, tmp_path):
    done = script("export_hf.py", f"run={run}", "out=exported", cwd=tmp_path)
    settings = [
        *TINY, f"data.path={corpus}", f"paths.cache={cache}", "model.init_from=exported",
        "data.tokenizer=exported", "name=x", "trainer.checkpoint_every=10",
    ]  # fmt: skip
    assert train(*settings, cwd=tmp_path).returncode == 0
    path = tmp_path / "runs" / "main" / "x"
    before = losses(path)
    (path / "result.json").unlink()
    max((path / "checkpoints").glob("step-*.ckpt")).unlink()
    done = train(*settings, cwd=tmp_path)
    assert done.returncode == 0 and "starting from the weights" not in done.stdout and "continuing" in done.stdout
    assert losses(path) == before
