"""The loss that a closure returns counts, whatever type of number it is."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.zclip.reference_loop import batch, build_model
from zclip import SkipStep


@pytest.mark.parametrize("value", [3, np.int8(3), np.float16(3), np.float32(3), np.float64(3), Fraction(3)], ids=repr)
def test_loss_of_a_closure_is_a_number_of_any_type(value):
    model, strategy = build_model(), SkipStep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    strategy.attach(optimizer)
    model(batch(0)).square().mean().backward()
    assert optimizer.step(lambda: value) is value
    assert int(strategy.state["loss_count"]) == 1 and strategy.state["losses"][0] == 3
    for no_loss in (True, np.bool_(True), None, "3"):
        optimizer.step(lambda no_loss=no_loss: no_loss)
    assert int(strategy.state["loss_count"]) == 1 and int(strategy.state["norm_count"]) == 5
