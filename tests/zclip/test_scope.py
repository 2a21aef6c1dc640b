"""A strategy with a scope measures, clips and skips the parameters in it, and leaves the others alone."""

import copy

import pytest
import torch

from tests.helpers import same
from tests.zclip.every_strategy import CLASSES, OF_NORMS
from tests.zclip.reference_loop import batch, build_model
from zclip import AGC, AdaGC, FixedNorm, SkipStep, ZClip
from zclip.base import Policy
from zclip.scope import group_names, in_scope
from zclip.updates import SPAM, StableAdamW, UpdateClip

WEIGHTS = ["*.weight"]


def backward(model, step: int = 0) -> None:
    model.zero_grad()
    model(batch(step)).square().mean().backward()


def parts(model) -> tuple[list, list]:
    """Return the weights and the biases of the model."""
    named = list(model.named_parameters())
    return [p for name, p in named if name.endswith("weight")], [p for name, p in named if name.endswith("bias")]


def norm(tensors) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).norm())


@pytest.mark.parametrize(
    ("name", "scope", "inside"),
    [
        ("layers.0.up.weight", "*.weight", True),
        ("layers.0.up.bias", "*.weight", False),
        ("layers.0.up.weight", ["layers.[1-9].*", "layers.0.*"], True),
        ("embed.weight", ["!embed*"], False),
        ("layers.0.up.weight", "!embed*", True),
        ("embed.weight", ["*.weight", "!embed*"], False),
        ("Embed.weight", ["!embed*"], True),
        ("layers.10.up.weight", "layers.1.*", False),
    ],
)
def test_patterns_are_those_of_a_shell(name, scope, inside):
    assert in_scope(name, scope) == inside


@pytest.mark.parametrize("strategy", CLASSES)
def test_help_of_each_strategy_names_every_policy(strategy):
    assert all(f"{name}:" in strategy.__doc__ or f"`{name}`" in strategy.__doc__ for name in Policy.__annotations__)


def test_name_of_a_parameter_is_its_first_one_and_has_the_number_of_its_module():
    first, second = build_model(), build_model()
    for model in (first, second):
        backward(model)
    second.again = second[2]
    gradients = [p.grad for p in (*first.parameters(), second[0].weight, second[0].bias)]
    expected = norm(gradients)
    strategy = FixedNorm(0.01, scope="!1.2*")
    strategy.step(first, second)
    assert strategy.read_telemetry()["grad_norm"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"^scope=again\* has none of the 4 parameters, which are 0\.weight, "):
        FixedNorm(0.01, scope="again*").step(second)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_only_the_scope_is_measured_and_scaled(attached, fused):
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    strategy = FixedNorm(0.01, scope=WEIGHTS)
    backward(model)
    weights, biases = parts(model)
    expected, others = norm(p.grad for p in weights), [p.grad.clone() for p in biases]
    before = copy.deepcopy(model.state_dict())
    if attached:
        strategy.attach(optimizer, model)
    else:
        strategy.step(model, optimizer=optimizer)
    optimizer.step()
    telemetry = strategy.read_telemetry()
    assert telemetry["grad_norm"] == pytest.approx(expected, rel=1e-6)
    assert telemetry["other_norm"] == pytest.approx(norm(others), rel=1e-6)
    assert telemetry["clipped_norm"] == pytest.approx(0.01, rel=1e-3)
    moved = {name: before[name] - value for name, value in model.state_dict().items()}
    assert norm(v for name, v in moved.items() if name.endswith("weight")) == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close([v for name, v in moved.items() if name.endswith("bias")], others)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_norm_that_is_not_finite_concerns_its_scope_only(policy, fused):
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5, fused=fused)
    strategy = ZClip(scope=WEIGHTS, on_nonfinite=policy)
    backward(model)
    strategy.step(model, optimizer=optimizer)
    optimizer.step()
    backward(model, 1)
    model[0].weight.grad[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    strategy.step(model, optimizer=optimizer)
    optimizer.step()
    after = model.state_dict()
    assert strategy.read_telemetry()["nonfinite"] == 1
    assert all(not torch.equal(before[name], after[name]) for name in after if name.endswith("bias"))
    unchanged = [torch.equal(before[name], after[name]) for name in after if name.endswith("weight")]
    assert all(unchanged) if policy == "skip" else not any(unchanged), "decay and moments move them under zero"
    assert all(value.isfinite().all() for value in after.values())
    backward(model, 2)
    model[0].bias.grad[0] = torch.nan
    strategy.step(model, optimizer=optimizer)
    assert strategy.read_telemetry()["nonfinite"] == 1 and strategy.telemetry["other_norm"].isnan()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in parts(model)[0])


@pytest.mark.parametrize("make", [AdaGC, AGC, lambda **policy: SkipStep(window=4, **policy)])
def test_scope_has_the_decisions_of_a_model_without_the_others(make):
    model, expected = build_model(), build_model()
    strategy, reference = make(scope=WEIGHTS), make()
    for step in range(20):
        for each in (model, expected):
            backward(each, step)
        strategy.step(model)
        reference.step(parts(expected)[0])
        assert same([p.grad for p in model.parameters()], [p.grad for p in expected.parameters()])
    assert len(strategy.state_dict().get("names", [0, 0])) == 2


def test_scope_without_names_or_parameters_is_refused():
    model = build_model()
    backward(model)
    with pytest.raises(ValueError, match=r"^scope= needs the names of the parameters: give step\(\) or attach\(\) the"):
        ZClip(scope=WEIGHTS).step(model.parameters())
    message = r"^scope=head\.\* has none of the 4 parameters, which are 0\.weight, 0\.bias, 2\.weight, \.\.\.$"
    with pytest.raises(ValueError, match=message):
        ZClip(scope="head.*").step(model)
    for scope in ([], "", 3, [3], [""], "!", "group:", ["!group:"]):
        with pytest.raises(ValueError, match=r"^scope=\S* is not allowed: it must be a pattern of parameter names, or"):
            ZClip(scope=scope)
        strategy = ZClip()
        with pytest.raises(ValueError, match=r"^scope=\S* is not allowed: it must be a pattern of parameter names, or"):
            strategy.scope = scope


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_gradients_that_are_not_in_the_scope_may_be_sparse_or_complex(kind):
    model = build_model()
    backward(model)
    bias = model[0].bias.detach().clone()
    model[0].bias = torch.nn.Parameter(bias if kind == "sparse" else torch.complex(bias, bias))
    sparse = torch.sparse_coo_tensor([[1, 1, 7]], [1.0, 2.0, 4.0], (9,))
    model[0].bias.grad = sparse if kind == "sparse" else torch.tensor([3.0, 4.0j] + [0.0] * 7)
    model[2].bias.grad = None
    strategy = FixedNorm(0.01, scope=WEIGHTS)
    strategy.step(model)
    assert strategy.read_telemetry()["other_norm"] == 5.0
    assert strategy.read_telemetry()["clipped"] == 1


def test_prepared_statistics_are_those_of_the_first_step():
    model, prepared, strategy = build_model(), AdaGC(scope=WEIGHTS), AdaGC(scope=WEIGHTS)
    prepared.prepare(model)
    backward(model)
    strategy.step(model)
    names, shapes = (strategy.state_dict()[key] for key in ("names", "shapes"))
    assert (prepared.state_dict()["names"], prepared.state_dict()["shapes"]) == (names, shapes)
    assert len(prepared.state["gamma"]) == len(strategy.state["gamma"]) == 2


def test_saved_state_is_that_of_its_scope():
    model = build_model()
    backward(model)
    strategy = ZClip(scope="*.weight")
    strategy.step(model)
    ZClip(scope=WEIGHTS).load_state_dict(strategy.state_dict())
    message = r"^the saved ZClip was made with scope=\['\*\.weight'\], not None: make this one with the same"
    with pytest.raises(ValueError, match=message):
        ZClip().load_state_dict(strategy.state_dict())
    with pytest.raises(ValueError, match=r"made with scope=None, not \['\*\.weight'\]"):
        strategy.load_state_dict(ZClip().state_dict())


def groups_of(model) -> tuple[list[dict], list]:
    """Return groups of the weights, named muon, and of the biases, named adamw, and these biases."""
    weights, biases = parts(model)
    return [{"params": weights, "name": "muon"}, {"params": biases, "name": "adamw"}], biases


@pytest.mark.parametrize(
    "scope", ["group:adamw", "!group:muon", ["group:*", "!group:m*"], ["group:adamw", "!*.weight"]]
)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_group_of_the_optimizer_is_a_scope(attached, fused, scope):
    model = build_model()
    groups, biases = groups_of(model)
    optimizer = torch.optim.SGD(groups, lr=1.0, fused=fused)
    strategy = FixedNorm(0.01, scope=scope)
    backward(model)
    expected, others = norm(p.grad for p in biases), [p.grad.clone() for p in parts(model)[0]]
    before = copy.deepcopy(model.state_dict())
    if attached:
        strategy.attach(optimizer, *[model] * (scope == ["group:adamw", "!*.weight"]))
    else:
        strategy.step(model, optimizer=optimizer)
    optimizer.step()
    telemetry = strategy.read_telemetry()
    assert telemetry["grad_norm"] == pytest.approx(expected, rel=1e-6)
    assert telemetry["other_norm"] == pytest.approx(norm(others), rel=1e-6)
    moved = {name: before[name] - value for name, value in model.state_dict().items()}
    assert norm(v for name, v in moved.items() if name.endswith("bias")) == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close([v for name, v in moved.items() if name.endswith("weight")], others)


def test_group_without_a_name_has_that_of_its_optimizer():
    model = build_model()
    weights, biases = parts(model)
    optimizers = [torch.optim.Muon(weights), torch.optim.AdamW(biases)]
    strategy = FixedNorm(0.01, scope="group:AdamW")
    backward(model)
    expected = norm(p.grad for p in biases)
    strategy.step(model, optimizer=optimizers)
    assert strategy.read_telemetry()["grad_norm"] == pytest.approx(expected, rel=1e-6)
    assert norm(p.grad for p in biases) == pytest.approx(0.01, rel=1e-3)
    message = r"^scope=group:adam has none of the 4 parameters, which are .*; groups are AdamW, Muon$"
    with pytest.raises(ValueError, match=message):
        FixedNorm(0.01, scope="group:adam").step(model, optimizer=optimizers)
    with pytest.raises(
        ValueError, match=r"^scope= names groups of parameters: give step\(\) and prepare\(\) optimizer"
    ):
        strategy.step(model)
    with pytest.raises(ValueError, match=r"^scope= needs the names of the parameters: give step\(\) or attach\(\) the"):
        FixedNorm(0.01, scope=["group:AdamW", "!*.bias"]).step(weights, biases, optimizer=optimizers)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_norm_that_is_not_finite_concerns_its_group_only(policy, fused):
    model = build_model()
    groups, biases = groups_of(model)
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5, fused=fused)
    ZClip(scope="group:adamw", on_nonfinite=policy).attach(optimizer)
    backward(model)
    biases[0].grad[0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    after = model.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in after if name.endswith("weight"))
    unchanged = [torch.equal(before[name], after[name]) for name in after if name.endswith("bias")]
    assert all(unchanged) if policy == "skip" else not any(unchanged), "decay moves them under zero"
    assert all(value.isfinite().all() for value in after.values())


def test_statistics_of_tensors_are_those_of_the_group():
    model, strategy, prepared = build_model(), AdaGC(scope="group:adamw"), AdaGC(scope="group:adamw")
    optimizer = torch.optim.SGD(groups_of(model)[0], lr=0.1)
    prepared.prepare(model, optimizer=optimizer)
    backward(model)
    strategy.step(model, optimizer=optimizer)
    names = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert prepared.state_dict()["names"] == strategy.state_dict()["names"] == names
    with pytest.raises(ValueError, match=r"made with scope=\['group:adamw'\], not None"):
        AdaGC().load_state_dict(strategy.state_dict())


def test_pattern_that_matches_nothing_gives_one_warning():
    model = build_model()
    backward(model)
    groups = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    for scope, pattern, what in (
        (["*.weight", "!emebd*"], "!emebd\\*", "parameter"),
        (["*.weight", "head.*"], "head\\.\\*", "parameter"),
        ("!group:muon", "!group:muon", "group"),
    ):
        strategy = ZClip(scope=scope)
        with pytest.warns(UserWarning, match=rf"^'{pattern}' in scope=.* matches no {what}$") as caught:
            for _ in range(3):
                strategy.step(model, **groups)
        assert len(caught) == 1
        assert strategy.read_telemetry()["grad_norm"] > 0


@pytest.mark.parametrize(
    ("scope", "with_model", "words"),
    [
        ("head.*", True, r"scope=head\.\* has none of the 4 parameters, which are "),
        ("head.*", False, r"scope= needs the names of the parameters: give step\(\) or attach\(\) the module"),
        ("group:adamw", True, r"scope=group:adamw has none of the 4 parameters, which are .*; groups are SGD$"),
    ],
)
def test_scope_without_parameters_is_refused_when_the_strategy_is_attached(scope, with_model, words):
    model, strategy = build_model(), ZClip(scope=scope)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"^{words}"):
        strategy.attach(optimizer, *([model] if with_model else []))
    strategy.scope = "group:SGD"
    strategy.attach(optimizer)


@pytest.mark.parametrize("make", [UpdateClip, SPAM, StableAdamW])
def test_rule_over_updates_has_no_scope(make):
    rule = make()
    words = f"scope=group:a is not possible: {make.__name__} acts on all parameters of its optimizer"
    with pytest.raises(ValueError, match=rf"^{words}$"):
        rule.scope = "group:a"
    assert rule.scope is None and rule.state_dict()["scope"] is None
    rule.scope = None


def test_scope_that_is_assigned_acts_from_the_next_step_and_is_recorded():
    model, strategy = build_model(), ZClip()
    strategy.scope = WEIGHTS
    assert strategy.changes == []
    backward(model)
    strategy.step(model)
    strategy.scope = "*.bias"
    backward(model)
    expected = norm(p.grad for p in parts(model)[1])
    strategy.step(model)
    assert strategy.read_telemetry()["grad_norm"] == pytest.approx(expected, rel=1e-6)
    assert strategy.changes == [{"setting": "scope", "from": ["*.weight"], "to": ["*.bias"]}]
    assert strategy.read_telemetry()["changes"] == 1
    resumed = ZClip(scope=["*.bias"])
    resumed.load_state_dict(strategy.state_dict())
    assert resumed.changes == strategy.changes
    strategy.scope = ["*.bias"]
    assert len(strategy.changes) == 1, "it is the same scope"
    strategy.scope = ["head.*"]
    with pytest.raises(ValueError, match=r"^scope=head\.\* has none of the 4 parameters"):
        strategy.step(model)


def test_scope_that_no_step_has_used_is_not_recorded():
    model, strategy = build_model(), ZClip()
    backward(model)
    strategy.step(model)
    strategy.scope = "head.*"
    strategy.z_thresh = 3.0
    threshold = {"setting": "z_thresh", "from": 2.5, "to": 3.0}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^scope=head\.\* has none of the 4 parameters"):
            strategy.step(model)
        assert strategy.changes == [threshold]
    strategy.scope = "*.weight"
    strategy.scope = "*.bias"
    to_biases = {"setting": "scope", "from": None, "to": ["*.bias"]}
    assert strategy.changes == copy.deepcopy(strategy).changes == [threshold, to_biases]
    strategy.step(model)
    strategy.scope = "*.weight"
    strategy.scope = "*.bias"
    assert strategy.changes == [threshold, to_biases], "steps used no other scope"
    strategy.scope = None
    strategy.step(model)
    strategy.scope = "*.bias"
    assert [change["to"] for change in strategy.changes[2:]] == [None, ["*.bias"]]


def test_statistics_of_tensors_without_names_stay_in_their_scope():
    """They are of positions, which are other tensors in another scope."""
    model = build_model()
    optimizer = torch.optim.SGD(
        [{"params": group, "name": name} for group, name in zip(parts(model), ("x", "y"), strict=True)], lr=0.1
    )
    strategy = AdaGC(scope="group:x")
    backward(model)
    strategy.step(model.parameters(), optimizer=optimizer)
    state = strategy.state_dict()
    words = "the parameters have no names, by which statistics find theirs in another scope"
    with pytest.raises(ValueError, match=rf"^the statistics do not fit scope=\['group:y'\] \(was .*: {words}$"):
        AdaGC(scope="group:y").load_state_dict(state, override=True)
    resumed = AdaGC(scope="group:x")
    resumed.load_state_dict(state)
    for each in (strategy, resumed):
        with pytest.raises(ValueError, match=f"^{words}$"):
            each.scope = "group:y"
        each.scope = ["group:x"]


@pytest.mark.parametrize(("name", "found"), [(None, "SGD"), ("", ""), ("a:b", "a:b"), (3, "3")])
def test_group_has_its_name_or_that_of_the_optimizer(name, found):
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert group_names([torch.optim.SGD([{"params": [parameter], "name": name}])]) == {id(parameter): found}


@pytest.mark.parametrize("make", OF_NORMS.values(), ids=OF_NORMS)
def test_scope_is_refused_where_only_a_norm_is_known(make):
    strategy = make()
    strategy.scope = "*.weight"
    before = strategy.state_dict()
    words = r"^scope=\*\.weight is not possible where only a norm is known: it must be None$"
    with pytest.raises(ValueError, match=words):
        strategy.observe(torch.tensor(1.0))
    assert same(strategy.state_dict(), before)
    strategy.scope = None
    strategy.observe(torch.tensor(1.0))
