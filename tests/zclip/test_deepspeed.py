"""A strategy attached to DeepSpeed's engine clips as in a plain loop, with ZeRO 1, 2 and 3 on two processes.

The test downloads DeepSpeed with pip, and is skipped if that fails.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers import CHECKOUT, Once
from tests.process_pool import rank_environments
from tests.zclip.deepspeed_rank import NAN_STEP, batch_with_nan
from tests.zclip.reference_loop import STEPS, build_model
from zclip import ZClip
from zclip.integrations.deepspeed import EngineAttachment

VERSION = "0.19.8"
#: What it imports, of what torch and the test packages do not bring.
NEEDS = ("einops", "hjson", "msgpack", "ninja", "psutil", "py-cpuinfo")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--retries", "1"]


def download(folder: Path) -> None:
    for command in (
        ["install", "--no-deps", "--target", str(folder), *NEEDS],
        ["download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), f"deepspeed=={VERSION}"],
    ):
        done = subprocess.run([*PIP, *command], capture_output=True, text=True, timeout=300)
        if done.returncode:
            (folder / "error").write_text(str(done.stderr.strip().splitlines()[-1:]))
            return
    with tarfile.open(folder / f"deepspeed-{VERSION}.tar.gz") as archive:
        archive.extractall(folder, filter="data")


@pytest.fixture(scope="session")
def packages(once: Once) -> Path:
    """A folder with DeepSpeed's source and what it needs."""
    folder = once("deepspeed", download)
    if (folder / "error").exists():
        pytest.skip(f"deepspeed {VERSION} cannot be downloaded: {(folder / 'error').read_text()}")
    return folder


def plain_loop() -> tuple[torch.nn.Module, list[dict[str, float]]]:
    model, strategy = build_model(), ZClip(warmup_steps=5, z_thresh=2.0)
    optimizer, telemetry = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch_with_nan(step)).square().mean().backward()
        strategy.step(model)
        optimizer.step()
        telemetry.append(strategy.read_telemetry())
    return model, telemetry


@pytest.mark.slow
def test_engine_clips_as_a_plain_loop(packages, tmp_path):
    path = os.pathsep.join(map(str, (packages / f"deepspeed-{VERSION}", packages, CHECKOUT)))
    command = [sys.executable, "-m", "tests.zclip.deepspeed_rank", str(tmp_path)]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **rank, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}, cwd=CHECKOUT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in rank_environments(2, store.port)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)[-5000:]
    model, telemetry = plain_loop()
    assert any(row["spike"] for row in telemetry) and telemetry[NAN_STEP]["nonfinite"] == 1
    for rank in range(2):
        for stage, result in torch.load(tmp_path / f"rank-{rank}.pt").items():
            for step, (row, expected) in enumerate(zip(result["telemetry"], telemetry, strict=True)):
                if step == NAN_STEP:
                    assert row == result["telemetry"][step - 1], "DeepSpeed skips the step, and does not say so"
                else:
                    expected["nonfinite"] = 0.0
                    assert row == pytest.approx(expected, rel=1e-4, nan_ok=True), f"ZeRO {stage}"
            for weight, parameter in zip(result["weights"], model.parameters(), strict=True):
                torch.testing.assert_close(weight, parameter.detach(), rtol=1e-5, atol=1e-6)
            assert result["own"] == 1.0, "DeepSpeed's own clipping is there again"
            one_norm = "is not possible in DeepSpeed's engine: it gives one norm of all parameters"
            assert result["refusals"][:3] == [f"AdaGC {one_norm}", f"AGC {one_norm}", f"a scope {one_norm}"]
            assert result["refusals"][3].startswith("a strategy is attached to this engine already: detach()")


class DeepSpeedZeroOptimizer:
    """Stands in for that of ZeRO 1 and 2, with a loss scale as in fp16, which DeepSpeed trains on GPUs only."""

    loss_scale = 1024.0
    clip_grad = 1.0

    def unscale_and_clip_grads(self, group, total_norm):
        assert self.clip_grad == 0.0
        for gradient in group:
            gradient.mul_(1 / self.loss_scale)


def test_loss_scale_is_divided_out_and_groups_share_a_decision():
    zero, norms = DeepSpeedZeroOptimizer(), []

    def observe(norm):
        norms.append(float(norm))
        return torch.tensor(0.5) if norm.isfinite() else torch.tensor(0.0)

    attachment = EngineAttachment(zero, observe)
    for total_norm, expected in ((torch.tensor(2048.0), 0.5), (torch.tensor(-1.0), 0.0)):
        groups = [[torch.full((3,), 1024.0)] for _ in range(2)]
        for group in groups:
            zero.unscale_and_clip_grads(group, total_norm)
        assert all(torch.equal(gradient, torch.full((3,), expected)) for (gradient,) in groups)
    assert norms == pytest.approx([2.0, float("nan")], nan_ok=True) and zero.clip_grad == 1.0
    attachment.remove()
    assert "unscale_and_clip_grads" not in vars(zero)


def test_engine_without_zero_is_refused():
    class Engine:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)

    with pytest.raises(ValueError, match=r"^attach\(\) needs a DeepSpeed engine with ZeRO stage 1, 2 or 3; this"):
        EngineAttachment(Engine(), lambda norm: norm)
