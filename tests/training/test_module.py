"""The paper's optimizer and schedule (Table 1), and what the progress display and metrics say."""

import io
import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console

from models import Llama
from tests.conftest import CHECKOUT
from training.config.checks import model_config, settings_of
from training.module import PretrainingModule
from training.monitor.progress import ProgressDisplay
from training.monitor.step_timer import PARTS, TOLD, StepTimer, seconds


@pytest.fixture(scope="module")
def module() -> PretrainingModule:
    with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=["model.num_hidden_layers=1", "lr=1e-3"])
    return PretrainingModule(Llama(model_config(cfg)), lr=cfg.lr, steps=1000, **settings_of(cfg.optim))


def test_adamw_is_table_1(module):
    made = module.configure_optimizers()
    (group,) = made["optimizer"].param_groups
    assert isinstance(made["optimizer"], torch.optim.AdamW)
    wanted = {"betas": [0.9, 0.999], "eps": 1e-7, "weight_decay": 0.01, "fused": True, "initial_lr": 1e-3}
    assert {key: list(group[key]) if key == "betas" else group[key] for key in wanted} == wanted
    assert sum(p.numel() for p in group["params"]) == sum(p.numel() for p in module.parameters())


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine_to_a_tenth(module):
    factor = module.lr_factor
    assert module.warmup_steps == 40
    assert [factor(s) for s in range(40)] == pytest.approx([(s + 1) / 40 for s in range(40)])
    assert factor(40) == pytest.approx(1)
    assert factor(40 + 480) == pytest.approx(0.55)
    assert factor(1000) == pytest.approx(0.1)
    for s in range(41, 1000):
        assert factor(s) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * (s - 40) / 960)))
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]
    for s in range(60):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * factor(s))
        optimizer.step()
        schedule["scheduler"].step()


@pytest.mark.parametrize("terminal", [False, True])
def test_the_progress_display_shows_each_number(terminal):
    out = io.StringIO()
    display = ProgressDisplay(20, 0, Console(file=out, force_terminal=terminal, width=100))
    for step in (10, 20):
        display(
            {"step": step, "loss": 5.4321, "grad_norm": 0.765, "z": 3.21, "clipped": 1.0, "tokens_per_second": 7654.0,
             "mfu": 0.4, "peak_memory_gib": 12.34, "data_seconds": 0.1, "forward_backward_seconds": 0.9}
        )  # fmt: skip
    display.close()
    wanted = ["20/20", "5.432", "0.765", "+3.2", "clipped", "7,654 tok/s", "40.0% MFU", "left"]
    for shown in wanted + ([] if terminal else ["12.3 GiB", "data 10% fwd+bwd 90%"]):
        assert shown in out.getvalue()


def busy(device: str) -> None:
    x = torch.randn(1500, 1500, device=device)
    for _ in range(4):
        x = x @ x / 40


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_clock_tells_what_time_went_to(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    clock = StepTimer(torch.device(device))
    clock.mark("data")
    for part in ("forward_backward", "saving", "clip", "forward_backward"):
        busy(device)
        clock.mark(part)
    first = clock.lap()
    clock.mark("optimizer")
    if device == "cuda":
        torch.cuda.synchronize()
    spent = seconds(first)
    assert list(spent) == list(TOLD)
    assert min(spent["forward_backward"], spent["clip"]) > 0 == spent["optimizer"]
    assert spent["forward_backward"] == sum(seconds([first[i]])["forward_backward"] for i in (1, 4))
    saving = seconds([first[2]])
    assert sum(saving[part] for part in PARTS) == 0 < saving["saving"], "it is no part of a step"
    assert [part for part, _, _ in clock.lap()] == ["optimizer"] and not clock.lap()
