"""The paper's optimizer and schedule (Table 1), and what the progress display and metrics say."""

import io
import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console

from tests.conftest import CHECKOUT
from training.config import model_config, settings_of
from training.module import PretrainingModule
from training.progress import ProgressDisplay


@pytest.fixture(scope="module")
def module() -> PretrainingModule:
    with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=["model.num_hidden_layers=1", "lr=1e-3"])
    return PretrainingModule(model_config(cfg), lr=cfg.lr, steps=1000, **settings_of(cfg.optim))


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
        row = {"step": step, "loss": 5.4321, "grad_norm": 0.765, "z": 3.21, "clipped": 1.0, "tokens_per_second": 7654.0}
        display(row)
    display.close()
    for shown in ("20/20", "5.432", "0.765", "+3.2", "clipped", "7,654 tok/s", "left"):
        assert shown in out.getvalue()
