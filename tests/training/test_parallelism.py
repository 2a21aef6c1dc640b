"""The same run in one process, replicated, sharded, or both: the same losses and decisions. Real gloo processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from models import Llama
from models.hugging_face import export
from tests.conftest import CHECKOUT, TINY, script, train, train_command
from tests.training.test_config import composed
from tests.training.test_saving import SLOW
from tests.training.test_stopping import ranks
from training.checkpoint.format import is_valid, weights
from training.config.checks import model_config

#: Settings of each mode: processes x sequences at once, out of 8 in a global batch.
MODES = {
    "accumulated": ["trainer.micro_batch_size=2"],
    "recomputed": ["trainer.activation_checkpointing=full"],
    "ddp": ["trainer.strategy=ddp", "trainer.devices=2", "trainer.micro_batch_size=4"],
    "ddp-streamed": [
        "trainer.strategy=ddp", "trainer.devices=2", "trainer.micro_batch_size=2", "data.mode=stream",
    ],
    "ddp-accumulated": ["trainer.strategy=ddp", "trainer.devices=2", "trainer.micro_batch_size=1"],
    "fsdp": ["trainer.strategy=fsdp", "trainer.devices=2", "trainer.micro_batch_size=4"],
    "fsdp-accumulated": [
        "trainer.strategy=fsdp", "trainer.devices=2", "trainer.micro_batch_size=2",
        "trainer.activation_checkpointing=selective",
    ],
    "fsdp-compiled": [
        "trainer.strategy=fsdp", "trainer.devices=2", "trainer.micro_batch_size=2", "trainer.compile=true",
        "trainer.activation_checkpointing=selective",
    ],
    "hsdp": [
        "trainer.strategy=hsdp", "trainer.devices=4", "trainer.dp_replicate=2", "trainer.micro_batch_size=1",
        "trainer.activation_checkpointing=full",
    ],
}  # fmt: skip
#: What others have in them.
SLOWER = ("ddp-accumulated", "fsdp-accumulated")


@pytest.fixture(scope="module")
def settings(corpus: Path, cache: Path) -> tuple[str, ...]:
    return (
        *TINY,
        f"data.path={corpus}",
        f"paths.cache={cache}",
        "trainer.max_steps=50",
        "lr=1e-3",  # above, the run of this seed has a moment that makes rounding visible
        "clip.max_grad_norm=null",
        "clip.z_thresh=0.8",
    )


@pytest.fixture(scope="module")
def runs(settings, tmp_path_factory) -> Path:
    """Where each mode is run, with the run of one process beside them."""
    folder = tmp_path_factory.mktemp("modes")
    done = train(*settings, "name=one", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / "main" / name / "metrics.jsonl").read_text().splitlines()]


def assert_same(folder: Path, name: str) -> None:
    one, other = rows(folder, "one"), rows(folder, name)
    assert [row["step"] for row in other] == list(range(1, 51))
    assert 5 <= sum(row["clipped"] for row in one) <= 45
    assert [row["clipped"] for row in other] == [row["clipped"] for row in one]
    for ours, theirs in zip(other, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-3)
    results = [json.loads((folder / "runs" / "main" / which / "result.json").read_text()) for which in ("one", name)]
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], abs=1e-4)


@pytest.mark.parametrize("mode", [SLOW(mode) if mode in SLOWER else mode for mode in MODES])
def test_every_mode_has_the_curve_and_the_decisions_of_one_process(mode, runs, settings):
    done = train(*settings, *MODES[mode], f"name={mode}", cwd=runs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluating on") == 1 and done.stderr == ""
    assert_same(runs, mode)
    if mode == "hsdp":
        exported = script("export_hf.py", f"run=runs/main/{mode}", "out=there", cwd=runs)
        assert exported.returncode == 0, exported.stderr
        theirs = AutoModelForCausalLM.from_pretrained(runs / "there", dtype=torch.float32).state_dict()
        own = weights(max((runs / "runs" / "main" / "one" / "checkpoints").glob("*.ckpt")))
        assert theirs.keys() == own.keys()
        assert all(torch.allclose(theirs[name], own[name], atol=2e-3) for name in own)


def test_a_killed_run_goes_on_with_another_number_of_processes(runs, settings):
    """kill -9 of one of two processes ends the other; four go on, started by torchrun."""
    settings = (
        *settings, "trainer.strategy=fsdp", "trainer.micro_batch_size=2", "trainer.checkpoint_every=5", "name=killed"
    )  # fmt: skip
    job = subprocess.Popen(train_command(*settings, "trainer.devices=2"), cwd=runs, stderr=subprocess.PIPE, text=True)
    checkpoints = runs / "runs" / "main" / "killed" / "checkpoints"
    while job.poll() is None and not (checkpoints / "step-00000015.ckpt").exists():
        time.sleep(0.01)
    processes = ranks(job)
    os.kill(processes["1"], signal.SIGKILL)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 1
    assert said.splitlines()[-1] == "process 1 of the run was killed by SIGKILL; run the same command to resume"
    assert not Path(f"/proc/{processes['0']}").exists()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    on = [*command, str(CHECKOUT / "train.py"), *settings, "trainer.devices=4"]
    done = subprocess.run(on, cwd=runs, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("continuing") == 1, done.stderr
    assert_same(runs, "killed")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["trainer.devices=2"], "trainer.strategy=single is not possible with trainer.nodes=1 and trainer.devices=2"),
        (["trainer.strategy=ddp", "trainer.devices=3", "trainer.micro_batch_size=2"],
         "trainer.micro_batch_size=2 is not allowed: 3 processes x 2 = 6 sequences at once must divide "
         "trainer.global_batch_size=8"),
        (["trainer.strategy=hsdp", "trainer.devices=4", "trainer.micro_batch_size=1", "trainer.dp_replicate=3"],
         "trainer.dp_replicate=3 is not allowed: it must divide the 4 processes"),
        (["trainer.strategy=ddp", "trainer.dp_replicate=2"], "trainer.dp_replicate=2 is not possible with trainer"),
        (["trainer.strategy=hsdp", "trainer.devices=2", "trainer.micro_batch_size=4"],
         "trainer.dp_replicate=1 is not possible with trainer.strategy=hsdp: it must be from 2"),
        (["trainer=fsdp"], "trainer.accelerator=gpu is not possible: torch sees no GPU here"),
        (["trainer.strategy=ddp", "trainer.nodes=2", "trainer.micro_batch_size=1"], "trainer.nodes=2 is more than"),
        (["trainer.activation_checkpointing=some"], "trainer.activation_checkpointing=some is not allowed"),
    ],
)  # fmt: skip
def test_impossible_splits_are_refused_with_the_arithmetic(given, said, settings, tmp_path):
    if "trainer=fsdp" in given and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = train(*settings, *given, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [SLOW("tied"), "from a folder"])
def test_sharded_runs_start_from_the_weights_of_one_process(how, runs, settings, tmp_path):
    given = [*settings, "trainer.max_steps=6"]
    if how == "tied":
        given += ["model.tie_word_embeddings=true"]
    else:
        config = model_config(composed(*settings))
        torch.manual_seed(5)
        export(Llama(config).state_dict(), config, tmp_path / "start")
        given += ["model.init_from=start", f"data.tokenizer={runs}/runs/main/one/tokenizer"]
    for name, mode in (("one", []), ("sharded", MODES["fsdp"])):
        done = train(*given, *mode, f"name={name}", cwd=tmp_path)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    one, sharded = (rows(tmp_path, name) for name in ("one", "sharded"))
    assert [row["loss"] for row in sharded] == pytest.approx([row["loss"] for row in one], abs=1e-5)
    if how == "tied":
        stored = weights(max((tmp_path / "runs" / "main" / "sharded" / "checkpoints").iterdir()))
        assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])


def damage(checkpoint: Path, what: str) -> None:
    """Spoil a sharded checkpoint."""
    part = max(checkpoint.glob("*.distcp"))
    if what == "a part is gone":
        part.unlink()
        return
    file = {"the index is cut": checkpoint / ".metadata", "a bit of the index": checkpoint / ".metadata"}.get(
        what, part
    )
    data = bytearray(file.read_bytes())
    if "bit" in what:
        data[len(data) // 2] ^= 1
    else:
        del data[-200:]
    file.write_bytes(data)


def test_sharded_checkpoints_are_the_weights_and_damaged_ones_are_passed_over(runs, settings, tmp_path):
    given = (
        *settings,
        *MODES["fsdp"],
        "trainer.max_steps=10",
        "trainer.checkpoint_every=2",
        "trainer.keep_last=5",
    )
    done = train(*given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs" / "main").iterdir()
    result = json.loads((path / "result.json").read_text())
    (path / "result.json").unlink()
    checkpoints = sorted((path / "checkpoints").iterdir())
    assert [c.name for c in checkpoints] == [f"step-{step:08d}.ckpt" for step in range(2, 11, 2)]
    assert all(c.is_dir() and is_valid(c) and len(list(c.glob("*.distcp"))) == 2 for c in checkpoints)
    shapes = {name: tensor.shape for name, tensor in Llama(model_config(composed(*settings))).state_dict().items()}
    assert {name: tensor.shape for name, tensor in weights(checkpoints[0]).items()} == shapes
    for checkpoint, what in zip(
        checkpoints[1:], ("a part is cut", "a part is gone", "the index is cut", "a bit of a part"), strict=True
    ):
        damage(checkpoint, what)
        assert not is_valid(checkpoint), what
    done = train(*given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is damaged") == 4 and "after step 2 of 10" in done.stdout
    assert json.loads((path / "result.json").read_text())["test_loss"] == result["test_loss"]
    damage(checkpoints[0], "a bit of the index")
    assert not is_valid(checkpoints[0])
    refused = script("export_hf.py", f"run={path}", "step=2", "out=there", cwd=tmp_path)
    assert refused.returncode == 2 and "step=2 is damaged" in refused.stderr and not (tmp_path / "there").exists()
