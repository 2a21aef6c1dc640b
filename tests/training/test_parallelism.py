"""Every parallelism gives the losses and clipping decisions of one process: real processes, connected by gloo."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import UserError
from models import Llama
from models.hugging_face import export
from tests.helpers import (
    CHECKOUT,
    FSDP,
    SLOW,
    compose_config,
    copy_run,
    ranks,
    read_jsonl,
    script,
    start,
    train,
    train_to_end,
)
from tests.process_pool import run
from training.checkpoint.format import is_valid, load_model_state
from training.config.checks import check
from training.config.identity import run_path

#: Overrides of each mode. The global batch has 8 sequences.
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
#: Modes that have the parts of all others, except replication, compilation, and full checkpointing of activations.
FAST = ("ddp-streamed", "fsdp-accumulated")


@pytest.fixture(scope="module")
def settings(tiny: tuple[str, ...]) -> tuple[str, ...]:
    return (
        *tiny,
        "trainer.max_steps=50",
        "lr=1e-3",  # with a higher one, rounding becomes visible in a run of this seed
        "clip.max_grad_norm=null",
        "clip.z_thresh=0.8",
    )


@pytest.fixture(scope="module")
def runs(settings, once) -> Path:
    """Return the folder of the runs of all modes, with the run of one process."""
    return once("modes", lambda folder: train_to_end(*settings, "name=one", cwd=folder))


def processes(mode: str) -> int:
    return next(
        (int(override.removeprefix("trainer.devices=")) for override in MODES[mode] if "devices" in override), 1
    )


def rows(folder: Path, name: str) -> list[dict]:
    return read_jsonl(folder / "runs" / "main" / name / "metrics.jsonl")


def assert_same_run(folder: Path, name: str) -> None:
    one, other = rows(folder, "one"), rows(folder, name)
    assert [row["step"] for row in other] == list(range(1, 51))
    assert 5 <= sum(row["clipped"] for row in one) <= 45
    assert [row["clipped"] for row in other] == [row["clipped"] for row in one]
    for row, reference in zip(other, one, strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], abs=1e-4)
        assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=2e-3)
    results = [json.loads((folder / "runs" / "main" / run / "result.json").read_text()) for run in ("one", name)]
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], abs=1e-4)


@pytest.mark.parametrize("mode", [mode if mode in FAST else SLOW(mode) for mode in MODES])
def test_every_mode_has_the_losses_and_clipping_decisions_of_one_process(mode, runs, settings):
    done = train(*settings, *MODES[mode], f"name={mode}", cwd=runs, processes=processes(mode))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluating on") == 1 and done.stderr == ""
    assert_same_run(runs, mode)
    if mode == "hsdp":
        exported = script("export_hf.py", f"run=runs/main/{mode}", "out=exported", cwd=runs)
        assert exported.returncode == 0, exported.stderr
        weights = AutoModelForCausalLM.from_pretrained(runs / "exported", dtype=torch.float32).state_dict()
        reference = load_model_state(max((runs / "runs" / "main" / "one" / "checkpoints").glob("*.ckpt")))
        assert weights.keys() == reference.keys()
        assert all(torch.allclose(weights[name], reference[name], atol=2e-3) for name in reference)


#: train.py whose ranks do not train: each writes its arguments, and rank 0 a result.
RANKS_WRITE = """
import os
import shutil
import sys
from pathlib import Path

if "RANK" in os.environ:
    Path("rank-" + os.environ["RANK"]).write_text("\\n".join(sys.argv[1:]))
    if os.environ["RANK"] == "0":
        Path("runs/main/x").mkdir(parents=True)
        shutil.copy(os.environ["RESULT"], "runs/main/x")
else:
    program = Path(os.environ["PYTHONPATH"], "train.py")
    exec(compile(program.read_text(), program, "exec"))
"""


def test_run_on_two_processes_starts_them_with_its_settings_and_shows_their_result(tiny, finished_run, tmp_path):
    (tmp_path / "ranks_write.py").write_text(RANKS_WRITE)
    settings = (*tiny, *FSDP, "name=x")
    env = {"PYTHONPATH": str(CHECKOUT), "RESULT": str(finished_run / "result.json")}
    done = run(str(tmp_path / "ranks_write.py"), *settings, cwd=tmp_path, env=env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert [(tmp_path / f"rank-{rank}").read_text().splitlines() for rank in (0, 1)] == [list(settings)] * 2
    loss = json.loads((finished_run / "result.json").read_text())["test_loss"]
    assert f"{loss:.3f} nats/token" in done.stdout


def test_run_resumes_on_another_number_of_processes(sharded_run, tiny, tmp_path):
    path = copy_run(sharded_run, tmp_path)
    (path / "result.json").unlink()
    for step in (24, 32, 40):
        shutil.rmtree(path / "checkpoints" / f"step-{step:08d}.ckpt")
    settings = (*tiny, *FSDP, "trainer.devices=1")
    done = train(*settings, cwd=tmp_path)
    assert done.returncode == 0 and "continuing" in done.stdout, done.stdout + done.stderr
    assert "after step 16 of 40" in done.stdout
    two, one = (read_jsonl(run / "metrics.jsonl") for run in (sharded_run, path))
    assert two[:16] == one[:16] and [row["step"] for row in one] == list(range(1, 41))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], abs=1e-4)


def test_resume_needs_no_other_setting_than_the_number_of_processes(sharded_run, checked, refusal, tmp_path):
    run = copy_run(sharded_run, tmp_path)
    (run / "result.json").unlink()  # a finished run is only shown
    resumed, _ = checked(f"resume={run}", "trainer.nodes=2", "trainer.devices=1")
    assert (resumed.trainer.strategy, resumed.trainer.world_size) == ("fsdp", 2)
    assert "3 processes x 4 = 12 sequences at once must divide" in refusal(f"resume={run}", "trainer.devices=3")


@pytest.mark.slow
def test_killed_run_resumes_on_another_number_of_processes(runs, settings):
    """SIGKILL of one of two processes ends the other. Four processes resume, started by torchrun."""
    settings = (
        *settings, "trainer.strategy=fsdp", "trainer.micro_batch_size=2", "trainer.checkpoint_every=5", "name=killed"
    )  # fmt: skip
    job = start(*settings, "trainer.devices=2", cwd=runs)
    checkpoints = runs / "runs" / "main" / "killed" / "checkpoints"
    while job.poll() is None and not (checkpoints / "step-00000015.ckpt").exists():
        time.sleep(0.01)
    processes = ranks(job)
    os.kill(processes["1"], signal.SIGKILL)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 1
    assert err.splitlines()[-1] == "process 1 of the run was killed by SIGKILL; run the same command to resume"
    assert not Path(f"/proc/{processes['0']}").exists()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command = [*torchrun, str(CHECKOUT / "train.py"), *settings, "trainer.devices=4"]
    done = subprocess.run(command, cwd=runs, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("continuing") == 1, done.stderr
    assert_same_run(runs, "killed")


@pytest.mark.parametrize(
    ("overrides", "message"),
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
        (["trainer.activation_checkpointing=some"], "trainer.activation_checkpointing=some is not allowed"),
    ],
)  # fmt: skip
def test_impossible_splits_are_refused_with_the_arithmetic(overrides, message, settings):
    if "trainer=fsdp" in overrides and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError) as error:
        config = compose_config(*settings, *overrides)
        check(config, run_path(config))
    (line,) = str(error.value).splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.strategy=ddp", "trainer.devices=3", "trainer.micro_batch_size=2"], "= 6 sequences at once must di"),
        (["trainer.strategy=ddp", "trainer.nodes=2", "trainer.micro_batch_size=1"], "trainer.nodes=2 is more than"),
    ],
)
def test_train_refuses_what_this_machine_cannot_run_in_one_sentence(overrides, message, settings, tmp_path):
    done = train(*settings, *overrides, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("initial", ["tied", "from a folder"])
def test_sharded_run_starts_from_the_weights_of_one_process(initial, runs, settings, tmp_path):
    overrides = [*settings, "trainer.max_steps=6"]
    if initial == "tied":
        overrides += ["model.tie_word_embeddings=true"]
    else:
        config = compose_config(*settings).model.llama
        torch.manual_seed(5)
        export(Llama(config).state_dict(), config, tmp_path / "start")
        overrides += ["model.init_from=start", f"data.tokenizer={runs}/runs/main/one/tokenizer"]
    for name, mode in (("one", []), ("sharded", MODES["fsdp"])):
        done = train(*overrides, *mode, f"name={name}", cwd=tmp_path, processes=2 if mode else 1)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    one, sharded = (rows(tmp_path, name) for name in ("one", "sharded"))
    assert [row["loss"] for row in sharded] == pytest.approx([row["loss"] for row in one], abs=1e-5)
    if initial == "tied":
        stored = load_model_state(max((tmp_path / "runs" / "main" / "sharded" / "checkpoints").iterdir()))
        assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])


def damage(checkpoint: Path, how: str) -> None:
    """Damage a sharded checkpoint."""
    shard = max(checkpoint.glob("*.distcp"))
    if how == "shard missing":
        shard.unlink()
        return
    file = checkpoint / ".metadata" if "index" in how else shard
    data = bytearray(file.read_bytes())
    if "bit" in how:
        data[len(data) // 2] ^= 1
    else:
        del data[-200:]
    file.write_bytes(data)


def test_sharded_checkpoints_hold_the_weights_and_damaged_ones_are_skipped(sharded_run, tiny, tmp_path):
    path = copy_run(sharded_run, tmp_path)
    result = json.loads((path / "result.json").read_text())
    (path / "result.json").unlink()
    checkpoints = sorted((path / "checkpoints").iterdir())
    assert [c.name for c in checkpoints] == [f"step-{step:08d}.ckpt" for step in range(8, 41, 8)]
    assert all(c.is_dir() and is_valid(c) and len(list(c.glob("*.distcp"))) == 2 for c in checkpoints)
    shapes = {name: tensor.shape for name, tensor in Llama(compose_config(*tiny).model.llama).state_dict().items()}
    assert {name: tensor.shape for name, tensor in load_model_state(checkpoints[0]).items()} == shapes
    kinds = ("shard cut", "shard missing", "index cut", "bit of a shard")
    for checkpoint, how in zip(checkpoints[1:], kinds, strict=True):
        damage(checkpoint, how)
        assert not is_valid(checkpoint), how
    settings = ("trainer.checkpoint_every=8", "trainer.keep_last=9")
    done = train(*tiny, *FSDP, *settings, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is damaged") == 4 and "after step 8 of 40" in done.stdout
    assert json.loads((path / "result.json").read_text())["test_loss"] == result["test_loss"]
    damage(checkpoints[0], "bit of the index")
    assert not is_valid(checkpoints[0])
    refused = script("export_hf.py", f"run={path}", "step=8", "out=exported", cwd=tmp_path)
    assert refused.returncode == 2 and "step=8 is damaged" in refused.stderr and not (tmp_path / "exported").exists()
