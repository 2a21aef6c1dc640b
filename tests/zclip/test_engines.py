"""The code of the pages on Megatron and torchtitan clips as a plain loop, in the packages that pip has.

The slow tests download them, and are skipped if that fails. The fast one has a stand-in for Megatron's function.
"""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.helpers import Once
from tests.zclip.engine_packages import code_of, install, run_ranks, skip_without
from tests.zclip.reference_loop import STEPS, batch, build_model, train_plain
from tests.zclip.torchtitan_rank import NAN_STEP, batch_of
from zclip import ZClip

MEGATRON = "megatron-core==0.16.1"
#: What torchtitan imports, of what torch and the test packages do not bring.
TORCHTITAN = ("torchtitan==0.3.0", "spmd_types==0.2.3", "tyro", "docstring_parser")


@pytest.fixture(scope="session")
def megatron(once: Once) -> Path:
    """A folder with megatron-core."""
    return skip_without(once("megatron", lambda folder: install(folder, MEGATRON)), MEGATRON)


@pytest.fixture(scope="session")
def torchtitan(once: Once) -> Path:
    """A folder with torchtitan."""
    return skip_without(once("torchtitan", lambda folder: install(folder, *TORCHTITAN)), TORCHTITAN[0])


def assert_close(weights, model, rtol: float = 1e-5) -> None:
    for weight, parameter in zip(weights, model.parameters(), strict=True):
        torch.testing.assert_close(weight, parameter.detach(), rtol=rtol, atol=1e-6)


@pytest.mark.slow
def test_megatron_optimizers_clip_as_a_plain_loop(megatron, tmp_path):
    run_ranks("tests.zclip.megatron_rank", [megatron], tmp_path, world=1)
    model = build_model()
    expected = train_plain(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert expected.state["count"] == STEPS
    results = torch.load(tmp_path / "megatron.pt")
    assert results.keys() == {False, True}
    for result in results.values():
        assert sum(row["spike"] for row in result["telemetry"]) > 0
        last = expected.read_telemetry()
        assert result["telemetry"][-1] == pytest.approx(last, rel=1e-4), "each step is observed once"
        assert_close(result["weights"], model)
        assert result["raised"] == "the gradient norm is nan"


def plain_loop(way: str) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """Train in one process; where the strategy skips a step, the recipe has zero gradients."""
    model, policy = build_model(), "zero" if way == "recipe" else "skip"
    strategy, telemetry = ZClip(warmup_steps=5, z_thresh=2.0, on_nonfinite=policy), []
    weights, biases = ([p for n, p in model.named_parameters() if n.endswith(kind)] for kind in ("weight", "bias"))
    optimizers = [torch.optim.Adam(biases, lr=0.01, foreach=False), torch.optim.AdamW(weights, lr=0.01, foreach=False)]
    for step in range(STEPS):
        model.zero_grad()
        model(batch_of(way, step)).square().mean().backward()
        strategy.step(weights if way == "scope" else model, optimizer=optimizers)
        for optimizer in optimizers:
            optimizer.step()
        telemetry.append(strategy.read_telemetry())
    return model, telemetry


@pytest.mark.slow
def test_torchtitan_clips_as_a_plain_loop(torchtitan, tmp_path):
    run_ranks("tests.zclip.torchtitan_rank", [torchtitan], tmp_path, world=2)
    for rank in range(2):
        results = torch.load(tmp_path / f"rank-{rank}.pt")
        assert results.keys() == {"recipe", "attached", "scope"}
        for way, result in results.items():
            model, telemetry = plain_loop(way)
            assert telemetry[NAN_STEP]["nonfinite"] == (way != "scope") and any(
                row["clipped"] for row in telemetry[10:]
            )
            for row, expected in zip(result["telemetry"], telemetry, strict=True):
                row.pop("other_norm", None)
                assert row == pytest.approx(expected, rel=1e-4, nan_ok=True), way
            assert_close(result["weights"], model, rtol=1e-4)


@pytest.fixture
def function(monkeypatch):
    """A module with a stand-in for Megatron's `clip_grad_by_total_norm_fp32`, with its arguments and its equation."""

    def clip_grad_by_total_norm_fp32(parameters, max_norm, total_norm, use_decoupled_grad=False):
        assert isinstance(total_norm, float) and not use_decoupled_grad
        factor = max_norm / (total_norm + 1.0e-6)
        if factor < 1.0:
            for parameter in parameters:
                parameter.grad.mul_(factor)

    modules = {name: ModuleType(name) for name in ("megatron", "megatron.core", "megatron.core.optimizer")}
    module = modules["megatron.core.optimizer"].optimizer = ModuleType("megatron.core.optimizer.optimizer")
    module.clip_grad_by_total_norm_fp32 = clip_grad_by_total_norm_fp32
    for name, stand_in in modules.items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    return module


def test_code_for_megatron_clips_by_its_norm(function):
    """Two optimizers are given the same norm, which is observed once."""
    names: dict = {}
    exec(compile(code_of("megatron.md"), "megatron.md", "exec"), names)
    names["zclip"] = strategy = ZClip(warmup_steps=5, z_thresh=2.0)
    model, expected = build_model(), build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = train_plain(expected, torch.optim.SGD(expected.parameters(), lr=0.1))
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        for part in (model[0], model[2]):
            function.clip_grad_by_total_norm_fp32([*part.parameters()], max_norm=1.0, total_norm=norm)
        optimizer.step()
    assert_close([p.detach() for p in expected.parameters()], model)
    assert strategy.read_telemetry() == pytest.approx(reference.read_telemetry(), rel=1e-4)
    assert strategy.state["count"] == STEPS
