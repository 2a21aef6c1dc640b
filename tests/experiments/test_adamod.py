"""AdaMod against a transcription of the paper's equations in float64, and where it is AdamW."""

import math

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from experiments.labs.adamod import AdaMod

SETTINGS = {"lr": 0.05, "betas": (0.8, 0.95), "beta3": 0.9, "eps": 1e-4, "weight_decay": 0.1}


def transcription(weights, gradients, lr, betas, beta3, eps, weight_decay):
    """Return weights, of float64, after steps with gradients, and how often the mean of the rates was the bound."""
    m, v, s = (np.zeros_like(weights) for _ in range(3))
    bounded = 0
    for t, g in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        eta = lr / (np.sqrt(v_hat) + eps)
        s = beta3 * s + (1 - beta3) * eta
        bounded += int((s < eta).sum())
        weights = weights - lr * weight_decay * weights - np.minimum(eta, s) * m_hat
    return weights, bounded


def shrinking(steps, shape=(3, 4)):
    """Return gradients that shrink a hundredfold and grow again, so that the rates outgrow their mean and fall."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) * 10 ** (-2 * math.sin(math.pi * t / steps)) for t in range(steps)]


def trained(optimizer_class, weights, gradients, dtype=torch.float64, **settings):
    parameter = torch.nn.Parameter(torch.tensor(weights, dtype=dtype))
    optimizer = optimizer_class([parameter], **settings)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient).to(dtype)
        optimizer.step()
    return parameter.detach().double().numpy(), optimizer


def test_steps_are_those_of_the_paper():
    weights, gradients = np.random.default_rng(1).normal(size=(3, 4)), shrinking(60)
    expected, bounded = transcription(weights, gradients, **SETTINGS)
    assert 100 < bounded < 60 * 12 - 50, "the mean of the rates is the bound in some steps, and not in others"
    found, optimizer = trained(AdaMod, weights, gradients, **SETTINGS)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    (state,) = optimizer.state.values()
    assert set(state) == {"step", "exp_avg", "exp_avg_sq", "mean_rate"} and state["step"] == 60
    single, _ = trained(AdaMod, weights, gradients, torch.float32, **SETTINGS)
    np.testing.assert_allclose(single, expected, rtol=1e-4)


def test_without_memory_it_is_adamw():
    weights, gradients = np.random.default_rng(1).normal(size=(3, 4)), shrinking(40)
    shared = {key: value for key, value in SETTINGS.items() if key != "beta3"}
    found, _ = trained(AdaMod, weights, gradients, beta3=0.0, **shared)
    expected, _ = trained(torch.optim.AdamW, weights, gradients, **shared)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    other, _ = trained(AdaMod, weights, gradients, **SETTINGS)
    assert np.abs(other - expected).max() > 1e-2


def test_parameter_without_a_gradient_stays():
    still, moved = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = AdaMod([still, moved], weight_decay=0.1)
    moved.grad = torch.ones(2)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(still, torch.ones(2)) and (moved < 1).all() and still not in optimizer.state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) is not allowed: it must be two numbers from 0 to below 1"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\) is not allowed: it must be two numbers from 0 to below 1"),
        ({"beta3": 1.0}, "beta3=1.0 is not allowed: it must be a number from 0 to below 1"),
        ({"eps": -1.0}, "eps=-1.0 is not allowed: it must be a number from 0"),
        ({"lr": math.nan}, "lr=nan is not allowed: it must be a number from 0"),
    ],
)
def test_arguments_out_of_their_range_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        AdaMod([torch.nn.Parameter(torch.ones(1))], **arguments)
