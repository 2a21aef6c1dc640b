"""The paper's optimizer and schedule (Table 1), the step timer, and the progress display."""

import io
import math

import pytest
import torch
from rich.console import Console

from tests.helpers import compose_config
from training.module import PretrainingModule
from training.monitor.progress import ProgressDisplay
from training.monitor.step_timer import STEP_PHASES, TIMED_PHASES, StepTimer, seconds


@pytest.fixture(scope="module")
def module() -> PretrainingModule:
    config = compose_config("model.num_hidden_layers=1", "lr=1e-3", "trainer.max_steps=1000")
    module = PretrainingModule(config, fresh=True)
    module.configure_model()
    return module


def test_optimizer_is_that_of_table_1(module):
    optimizer = module.configure_optimizers()["optimizer"]
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    expected = {"betas": [0.9, 0.999], "eps": 1e-7, "weight_decay": 0.01, "fused": True, "initial_lr": 1e-3}
    assert {key: list(group[key]) if key == "betas" else group[key] for key in expected} == expected
    assert sum(p.numel() for p in group["params"]) == sum(p.numel() for p in module.parameters())


def test_amsgrad_is_a_setting_of_the_optimizer():
    for value in (False, True):
        config = compose_config("model=pico", f"optim.amsgrad={str(value).lower()}")
        module = PretrainingModule(config, fresh=True)
        (group,) = module.configure_optimizers()["optimizer"].param_groups
        assert group["amsgrad"] is value


def test_learning_rate_rises_linearly_and_falls_as_a_cosine_to_a_tenth(module):
    factor = module.lr_factor
    assert module.warmup_steps == 40
    assert [factor(s) for s in range(40)] == pytest.approx([(s + 1) / 40 for s in range(40)])
    assert factor(40) == pytest.approx(1)
    assert factor(40 + 480) == pytest.approx(0.55)
    assert factor(1000) == pytest.approx(0.1)
    for s in range(41, 1000):
        assert factor(s) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * (s - 40) / 960)))
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]
    for s in range(60):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * factor(s))
        optimizer.step()
        schedule["scheduler"].step()


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_display_shows_each_number(terminal):
    out = io.StringIO()
    with ProgressDisplay(20, 0, Console(file=out, force_terminal=terminal, width=100)) as display:
        for step in (10, 20):
            display(
                step,
                {"step": step, "loss": 5.4321, "grad_norm": 0.765, "z": 3.21, "clipped": 1.0, "mfu": 0.4,
                 "tokens_per_second": 7654.0, "peak_memory_gib": 12.34, "data_seconds": 0.2,
                 "forward_backward_seconds": 1.8}
            )  # fmt: skip
    texts = ["20/20", "5.432", "0.765", "+3.2", "clipped", "7,654 tok/s", "40.0% MFU", "left"]
    for text in texts + ([] if terminal else ["12.3 GiB", "data 10% fwd+bwd 90%"]):
        assert text in out.getvalue()


def work_on(device: str) -> None:
    x = torch.randn(500, 500, device=device)
    for _ in range(4):
        x = x @ x / 40


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_step_timer_sums_the_time_of_each_phase(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    timer = StepTimer(torch.device(device))
    timer.record("data")
    for phase in ("forward_backward", "saving", "clip", "forward_backward"):
        work_on(device)
        timer.record(phase)
    timings = timer.pop()
    timer.record("optimizer")
    if device == "cuda":
        torch.cuda.synchronize()
    times = seconds(timings)
    assert [start for _, start, _ in timings[1:]] == [end for _, _, end in timings[:-1]], "no time is counted twice"
    assert list(times) == list(TIMED_PHASES)
    assert min(times["forward_backward"], times["clip"]) > 0 == times["optimizer"]
    assert times["forward_backward"] == sum(seconds([timings[i]])["forward_backward"] for i in (1, 4))
    saving = seconds([timings[2]])
    assert sum(saving[phase] for phase in STEP_PHASES) == 0 < saving["saving"], "saving is not part of a step"
    assert [phase for phase, _, _ in timer.pop()] == ["optimizer"] and not timer.pop()
