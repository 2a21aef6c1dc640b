"""Runs with AMSGrad: their names, their checkpoints, and the bits to which they resume."""

import pytest
import torch

from common.settings import parse
from tests.helpers import (
    FSDP,
    compose_config,
    copy_run,
    final_state,
    interrupted,
    only_run,
    read_jsonl,
    same,
    train_to_end,
)
from training.checkpoint.state import find_problem
from training.config.identity import identity, run_name
from training.config.schema import Config

#: The maximum of second moments that forget within ten steps is soon above them.
AMSGRAD = ("optim.amsgrad=true", "optim.betas=[0.9,0.9]", "trainer.checkpoint_every=8", "trainer.keep_last=9")


def test_runs_without_amsgrad_keep_their_names():
    config = compose_config("model=nano")
    assert "amsgrad" not in identity(config)["optim"]
    assert identity(compose_config("optim.amsgrad=true"))["optim"]["amsgrad"] is True
    assert run_name(config) != run_name(compose_config("model=nano", "optim.amsgrad=true"))
    plain = config.model_dump(mode="json", by_alias=True)
    del plain["optim"]["amsgrad"]  # as of a run from before there was the setting
    assert parse(Config, plain) == config


@pytest.mark.slow
def test_run_with_amsgrad_resumes_to_the_same_bits_and_needs_its_maximum(tiny, run_in_process, tmp_path):
    (tmp_path / "whole").mkdir()
    train_to_end(*tiny, *AMSGRAD, cwd=tmp_path / "whole")
    whole = only_run(tmp_path / "whole")
    interrupted(whole, tmp_path, 24)
    _, output = run_in_process(*tiny, *AMSGRAD)
    assert "after step 24 of 40" in output
    (state, rows, loss), (resumed, others, other_loss) = map(final_state, (tmp_path / "whole", tmp_path))
    assert rows == others and loss == other_loss
    assert same(state["state_dict"], resumed["state_dict"])
    assert same(state["optimizer_states"], resumed["optimizer_states"])
    moments = state["optimizer_states"][0]["state"].values()
    assert all((m["max_exp_avg_sq"] >= m["exp_avg_sq"]).all() for m in moments)
    assert any((m["max_exp_avg_sq"] > m["exp_avg_sq"]).any() for m in moments)

    checkpoint = copy_run(whole, tmp_path / "damaged") / "checkpoints" / "step-00000040.ckpt"
    assert find_problem(checkpoint) is None
    state = torch.load(checkpoint, weights_only=True)
    del state["optimizer_states"][0]["state"][3]["max_exp_avg_sq"]
    torch.save(state, checkpoint)
    assert "its optimizer: 3.max_exp_avg_sq is missing" in (find_problem(checkpoint) or "")


@pytest.mark.slow
def test_sharded_run_with_amsgrad_resumes_to_the_same_losses(tiny, tmp_path):
    settings = (*tiny, *AMSGRAD, *FSDP)
    for folder in ("whole", "resumed"):
        (tmp_path / folder).mkdir()
    train_to_end(*settings, cwd=tmp_path / "whole", processes=2)
    path = interrupted(only_run(tmp_path / "whole"), tmp_path / "resumed", 24)
    train_to_end(*settings, cwd=tmp_path / "resumed", processes=2)
    rows, others = (read_jsonl(run / "metrics.jsonl") for run in (only_run(tmp_path / "whole"), path))
    assert [row["loss"] for row in rows] == [row["loss"] for row in others]
