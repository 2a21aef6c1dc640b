"""A strategy attached to DeepSpeed's engine clips as in a plain loop, with ZeRO 1, 2 and 3 on two processes.

The test downloads DeepSpeed with pip, and is skipped if that fails.
"""

import tarfile
from pathlib import Path

import pytest
import torch

from tests.helpers import Once
from tests.zclip.deepspeed_rank import NAN_STEP, PRECISIONS, batch_with_nan
from tests.zclip.engine_packages import install, pip, run_ranks, skip_without
from tests.zclip.reference_loop import STEPS, build_model
from zclip import ZClip
from zclip.integrations.deepspeed import EngineAttachment

VERSION = "0.19.8"
#: What it imports, of what torch and the test packages do not bring.
NEEDS = ("einops", "hjson", "msgpack", "ninja", "psutil", "py-cpuinfo")


def download(folder: Path) -> None:
    source = ("download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), f"deepspeed=={VERSION}")
    if install(folder, *NEEDS) and pip(folder, *source):
        with tarfile.open(folder / f"deepspeed-{VERSION}.tar.gz") as archive:
            archive.extractall(folder, filter="data")


@pytest.fixture(scope="session")
def packages(once: Once) -> Path:
    """A folder with DeepSpeed's source and what it needs."""
    return skip_without(once("deepspeed", download), f"deepspeed {VERSION}")


#: Relative tolerances of norms and weights.
TOLERANCES = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.05}


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
    run_ranks("tests.zclip.deepspeed_rank", (packages / f"deepspeed-{VERSION}", packages), tmp_path, world=2)
    model, telemetry = plain_loop()
    assert any(row["spike"] for row in telemetry) and telemetry[NAN_STEP]["nonfinite"] == 1
    for rank in range(2):
        results = torch.load(tmp_path / f"rank-{rank}.pt")
        assert results.keys() == {(precision, stage) for precision in PRECISIONS for stage in (1, 2, 3)}
        for (precision, stage), result in results.items():
            rtol = TOLERANCES[precision]
            for step, (row, expected) in enumerate(zip(result["telemetry"], telemetry, strict=True)):
                if step == NAN_STEP:
                    assert row == result["telemetry"][step - 1], "DeepSpeed skips the step, and does not say so"
                else:
                    expected["nonfinite"] = 0.0
                    seen = (precision, stage, step)
                    assert (row["spike"], row["clipped"]) == (expected["spike"], expected["clipped"]), seen
                    for key in ("grad_norm", "clipped_norm"):
                        assert row[key] == pytest.approx(expected[key], rel=rtol), seen
                    if precision == "fp32":
                        assert row == pytest.approx(expected, rel=1e-4, nan_ok=True), seen
            for weight, parameter in zip(result["weights"], model.parameters(), strict=True):
                torch.testing.assert_close(weight, parameter.detach(), rtol=rtol, atol=rtol / 10)
            assert result["own"] == 1.0, "DeepSpeed's own clipping is there again"
            one_norm = "is not possible in DeepSpeed's engine: it gives one norm of all parameters"
            assert result["refusals"][:3] == [f"AdaGC {one_norm}", f"AGC {one_norm}", f"a scope {one_norm}"]
            assert result["refusals"][3].startswith("a strategy is attached to this engine already: detach()")


class DeepSpeedZeroOptimizer:
    """Stands in for that of ZeRO 1 and 2, with a loss scale as in fp16."""

    loss_scale = 1024.0
    clip_grad = 1.0

    def step(self, groups, total_norm, closure=None):
        for group in groups:
            self.unscale_and_clip_grads(group, total_norm)
        return closure

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


def test_engine_may_give_the_same_norm_in_the_next_step():
    """It may be a constant, or a tensor that the engine fills anew."""
    zero, norms = DeepSpeedZeroOptimizer(), []

    def observe(norm):
        norms.append(float(norm))
        return 1 / (len(norms) * torch.ones(()))

    attachment, total_norm = EngineAttachment(zero, observe), torch.tensor(2048.0)
    for step, number in enumerate((2048.0, 2048.0, 1024.0)):
        groups = [[torch.full((3,), 1024.0)] for _ in range(2)]
        total_norm.fill_(number)
        assert zero.step(groups, total_norm, closure=step) == step
        assert all(torch.equal(gradient, torch.full((3,), 1 / (step + 1))) for (gradient,) in groups)
    assert norms == [2.0, 2.0, 1.0]
    attachment.remove()
    assert vars(zero).keys() == {"clip_grad"}


def test_step_that_others_have_replaced_stays_after_detach():
    zero, calls = DeepSpeedZeroOptimizer(), []

    def replace():
        step = zero.step
        zero.step = lambda *args: (calls.append(1), step(*args))[1]
        return zero.step

    inner = replace()
    attachment = EngineAttachment(zero, lambda norm: norm / norm)
    attachment.remove()
    assert zero.step is inner
    attachment = EngineAttachment(zero, lambda norm: norm / norm)
    outer = replace()
    attachment.remove()
    zero.clip_grad = 0.0
    zero.step([[torch.ones(3)]], torch.tensor(2048.0))
    assert zero.step is outer and len(calls) == 2


def test_engine_without_zero_is_refused():
    class Engine:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)

    with pytest.raises(ValueError, match=r"^attach\(\) needs a DeepSpeed engine with ZeRO stage 1, 2 or 3; this"):
        EngineAttachment(Engine(), lambda norm: norm)


def test_scope_is_refused_while_a_strategy_is_attached_to_an_engine():
    zero = type("DeepSpeedZeroOptimizer", (DeepSpeedZeroOptimizer,), {"__module__": "deepspeed.runtime"})()
    strategy, words = ZClip(), "is not possible in DeepSpeed's engine: it gives one norm of all parameters$"
    strategy.scope = "*"
    with pytest.raises(ValueError, match=f"^a scope {words}"):
        strategy.attach(zero)
    strategy.scope = None
    strategy.attach(zero)
    zero.unscale_and_clip_grads([torch.ones(3)], torch.tensor(2048.0))
    with pytest.raises(ValueError, match=r"^engine\.step\(\) calls the strategy that is attached to it: leave out obs"):
        strategy.observe(torch.tensor(2.0))
    assert strategy.state["count"] == 1
    with pytest.raises(ValueError, match=f"^scope=weight {words}"):
        strategy.scope = "weight"
    assert strategy.scope is None and strategy.changes == []
    strategy.detach()
    strategy.scope = "weight"
