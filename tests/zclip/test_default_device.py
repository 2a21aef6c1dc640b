"""`torch.set_default_device` does not change what the library does: its tensors are where the gradients are."""

import pytest
import torch

from tests.helpers import same
from tests.zclip.every_strategy import OF_NORMS, SHORT
from tests.zclip.reference_loop import assert_same_weights, build_model
from tests.zclip.updates.rules import RULES
from zclip.replay import replay
from zclip.updates import SPAM, StableAdamW, UpdateMonitor

UPDATE_RULES = {
    **{name: make for name, (make, _) in RULES.items()},
    "monitor": UpdateMonitor,
    "stable": StableAdamW,
    "spam": lambda: SPAM(theta=2.0, reset_every=4, reset_warmup_steps=2),
}
X = [torch.randn(8, 5, generator=torch.Generator().manual_seed(step)) * (40 if step == 6 else 1) for step in range(8)]


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.set_default_device(None)


def train(make, device):
    """Return the model and the saved state after eight steps, in the middle of which the state is loaded again."""
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(X[0]).square().mean().backward()
    optimizer.step()  # torch makes its state
    torch.set_default_device(device)
    clipper = make()
    clipper.attach(optimizer)
    for step, x in enumerate(X):

        def closure(x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss.item()

        optimizer.step(closure)
        if step == 4:
            saved = clipper.state_dict()
            clipper.detach()
            clipper = make()
            clipper.load_state_dict(saved)
            clipper.attach(optimizer)
    state = clipper.state_dict()
    torch.set_default_device(None)
    return model, state


@pytest.mark.parametrize("make", [*SHORT.values(), *UPDATE_RULES.values()], ids=[*SHORT, *UPDATE_RULES])
def test_steps_are_the_same_under_another_default_device(make):
    model, state = train(make, "meta")
    expected, expected_state = train(make, None)
    assert_same_weights(model, expected, rtol=0, atol=0)
    assert same(state, expected_state)


@pytest.mark.parametrize("make", OF_NORMS.values(), ids=OF_NORMS)
def test_states_and_replays_are_on_the_cpu_under_another_default_device(make):
    torch.set_default_device("meta")
    state = make().state_dict()
    make().load_state_dict(state)
    assert all(value.is_cpu for value in [*state["state"].values(), *state["counters"].values()])
    assert len(replay(make(), [1.0, 2.0, 90.0], [1.0, 2.0, 3.0], "label").clipped_norms) == 3


@pytest.mark.parametrize("make", UPDATE_RULES.values(), ids=UPDATE_RULES)
def test_update_rule_reads_no_value_from_the_device(make):
    """On the meta device reading any value raises."""
    model = torch.nn.Linear(5, 3, device="meta")
    optimizer = torch.optim.AdamW(model.parameters(), fused=False, capturable=True, foreach=True)
    rule = make()
    rule.attach(optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    rule.before_step(optimizer, None)
    assert all(value.is_meta for value in rule.telemetry.values())
