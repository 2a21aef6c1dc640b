"""The benchmarks of clipping, data and scoring run to their end. Their numbers decide nothing here."""

import math
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import zclip
import zclip.updates
from tests.helpers import script
from tests.scripts.loading import load_script
from tests.zclip.every_strategy import CLASSES


def run_once(contenders: dict[str, Callable[[], object]], *arguments: object) -> dict[str, float]:
    """Run each contender once, and return 1, 2, ... as their seconds."""
    for contender in contenders.values():
        contender()
    return {name: float(number) for number, name in enumerate(contenders, 1)}


def test_contenders_take_turns_and_have_medians(monkeypatch):
    bench, now, turns = load_script("_bench"), [0.0], []
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def contender(name: str, *seconds: float):
        durations = iter(seconds)

        def run() -> None:
            turns.append(name)
            now[0] += next(durations)

        return run

    contenders = {"a": contender("a", 900, 1, 5, 2), "b": contender("b", 900, 3, 3, 4)}
    assert bench.median_seconds(contenders, rounds=3, warm_up=1) == {"a": 2, "b": 3}
    assert turns == ["a", "b"] * 4


def test_clock_of_the_process_stops_while_it_waits(monkeypatch):
    bench = load_script("_bench")
    monkeypatch.setattr(bench, "time", SimpleNamespace(process_time=iter([1.0, 1.5]).__next__))
    assert bench.median_seconds({"a": lambda: None}, rounds=1, warm_up=0, cpu_time=True) == {"a": 0.5}


def test_shapes_have_about_the_parameters_of_the_setting():
    shapes = load_script("bench_clip").llama_shapes
    for parameters in (100e6, 1e9):
        assert sum(map(math.prod, shapes(parameters))) == pytest.approx(parameters, rel=0.05)
    assert len(load_script("bench_clip").small_shapes(7)) == 7
    decision = load_script("bench_clip").ClipAlways().decide(torch.tensor(2.0), {})
    assert 1.9 < float(decision.target) < 2.0


def test_strategies_of_the_benchmark_are_all_of_the_library_and_clip_where_they_should():
    bench_clip = load_script("bench_clip")
    model = torch.nn.ModuleList(bench_clip.Weight(shape, "cpu") for shape in [(4, 3), (5,)])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    calm = bench_clip.calm_strategies(norm, bench_clip.without_last(model))
    assert {type(strategy).__name__ for strategy in calm.values()} | {"GradientStabilizer"} == {
        strategy.__name__ for strategy in CLASSES
    }
    for name, strategy in calm.items():
        for _ in range(3):
            strategy.step(model)
            assert strategy.read_telemetry()["clipped"] == 0, name
    methods = bench_clip.clipping_methods(model, optimizer)
    for method in methods.values():
        method()
    for name, method in methods.items():
        before = [p.grad.clone() for p in model.parameters()]
        method()
        changed = [not torch.equal(b, p.grad) for b, p in zip(before, model.parameters(), strict=True)]
        expected = {
            "norm pass (the floor)": [False, False],
            "norm, and a grad_scale of 1": [False, False],
            "accurate norm, and a grad_scale of 1": [False, False],
            "norm, and AdamW(foreach=True)": [False, False],
            "norm, and scaled chunks in the cache": [False, False],
            "one coefficient, all but one tensor": [True, False],
        }
        assert changed == expected.get(name, [True, True]), name


def test_fused_steps_on_scaled_chunks_are_the_step_on_scaled_gradients(monkeypatch):
    bench_clip = load_script("bench_clip")
    monkeypatch.setattr(bench_clip, "CHUNK", 10)
    monkeypatch.setattr(bench_clip, "FACTOR", 0.5)
    models = []
    for scale in (1.0, 0.5):
        torch.manual_seed(0)
        model = torch.nn.ModuleList(bench_clip.Weight(shape, "cpu") for shape in [(4, 7), (5,), (3,)])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad.mul_(scale)
            if scale < 1:  # the other takes a step that is not counted
                optimizer.state[parameter]["step"].sub_(1)
        optimizer.step() if scale < 1 else bench_clip.step_on_chunks(model, optimizer)()
        models.append(model)
    for chunked, whole in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-8)


@pytest.mark.filterwarnings("error")
def test_a_scope_of_the_benchmark_leaves_out_a_parameter_and_no_rule_over_updates_acts():
    bench_clip = load_script("bench_clip")
    model = torch.nn.ModuleList(bench_clip.Weight(shape, "cpu") for shape in [(4, 3), (5,)])
    scoped = bench_clip.calm_strategies(1.0, bench_clip.without_last(model))["ZClip, all but one tensor"]
    scoped.step(model)
    assert float(scoped.telemetry["other_norm"]) == pytest.approx(float(model[1].weight.grad.norm()))
    rules = bench_clip.update_rules()
    assert {type(rule).__name__ for rule in rules} == {
        name
        for name, value in vars(zclip.updates).items()
        if name in zclip.updates.__all__ and isinstance(value, type) and issubclass(value, zclip.updates.OptimizerRule)
    } - {"OptimizerRule", "UpdateRule"}
    for rule in rules:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        rule.attach(optimizer)
        for _ in range(30):
            optimizer.step()
            assert rule.read_telemetry()["update_clipped"] == 0, type(rule).__name__
        rule.detach()


#: A package in the place of the published one.
PUBLISHED = """
class ZClip:
    steps = 0

    def step(self, model):
        assert all(p.grad is not None for p in model.parameters())
        ZClip.steps += 1
"""


def test_published_package_is_imported_from_its_folder_only(tmp_path, monkeypatch, capsys):
    (tmp_path / "zclip.py").write_text(PUBLISHED)
    bench_clip, ours = load_script("bench_clip"), zclip.ZClip
    monkeypatch.setattr(bench_clip, "median_seconds", run_once)
    bench_clip.main({"params": 1e5, "tensors": 4, "device": "cpu", "published": str(tmp_path)})
    out = capsys.readouterr().out
    assert re.search(r"│ norm pass \(the floor\) +│ +1000.0 │ +1.000 │ +0.500 │", out), out
    assert re.search(r"│ published zclip +│ +23000.0 │ +23.000 │ +11.500 │", out), out
    model = torch.nn.Linear(2, 2)
    model(torch.ones(2)).sum().backward()
    step = bench_clip.published_step(str(tmp_path), model)
    for _ in range(3):
        step()
    from zclip import ZClip

    assert ZClip is ours is bench_clip.ZClip and str(tmp_path) not in sys.path


def test_clipping_is_compared_with_the_norm_pass_and_torch(tmp_path):
    done = script("bench_clip.py", "params=1e5", "tensors=4", "rounds=1", "device=cpu", "clock=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"│ ([\w ,()-]+?) +│ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │", done.stdout)
    names = [row[0] for row in rows]
    calm = names.index("norm pass (the floor)", 1)
    assert names == 2 * names[: len(names) // 2] and names[calm : calm + 2] == names[:2]
    assert names[1] == "clip_grad_norm_" and len(names[:calm]) == 22
    assert {"ZClip", "AdaGC", "ZClip, attached", "GradientStabilizer", "one coefficient, fused"} < {*names}
    assert "UserWarning" not in done.stderr
    assert (
        rows[0][2] == rows[1][3] == "1.000"
        and "fp32 parameters in 4 tensors, every step is clipped; CPU" in done.stdout
    )
    assert not [*tmp_path.iterdir()]


def test_data_is_opened_read_and_tokenized(tmp_path, monkeypatch, capsys):
    """With parts of a million tokens; real ones have 67."""
    bench_data = load_script("bench_data")
    monkeypatch.setattr(bench_data, "PART_TOKENS", 1 << 20)
    monkeypatch.setattr(bench_data, "median_seconds", run_once)
    monkeypatch.chdir(tmp_path)
    bench_data.main({"megabytes": 0.05, "tokens": 40e6})
    out = capsys.readouterr().out
    assert "a folder of 40,000,000 tokens, 39 parts" in out, out
    for row in ("opening it", "shuffled batches, two parts", "sequential copy", "tokens prepared", "datasets.map"):
        assert re.search(rf"│ {row} +│ +[\d,.]+ │", out), out
    assert re.search(r"│ tokens prepared +│ +[\d.]+ │ +3.00 │ +4.00 │", out), out
    assert re.search(r"│ tokenizers.encode_batch │ +[\d.]+ │ +1.00 │ +1.33 │", out), out
    assert re.search(r"│ shuffled batches, two parts +│ +26,227,200 │ +3.00 │", out), out
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_scoring_is_compared_with_lm_eval(finished_run, sets, tmp_path):
    settings = (f"run={finished_run}", f"data_dir={sets}", "tasks=[winogrande]", "limit=8", "rounds=1")
    done = script("bench_eval.py", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"│ winogrande │ +[\d.]+ │ +[\d.]+ │ +\d+ │ +0.\d{4} │", done.stdout), done.stdout
    assert "8 items, " in done.stdout and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bench_clip.py", "round=3", "round=3 is not possible: there is no key round (the nearest is rounds)"),
        ("bench_eval.py", "run=nowhere", "run=nowhere is not a run folder: it must be one"),
        (
            "bench_eval.py",
            "run=nowhere data_dir=nowhere",
            "data_dir=nowhere does not exist: it must be a folder with the validation sets of the tasks",
        ),
    ],
)
def test_mistakes_are_one_sentence(name, settings, message, tmp_path):
    done = script(name, *settings.split(), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"{name}: error: {message}"), done.stderr
    assert len(done.stderr.splitlines()) == 1 and not [*tmp_path.iterdir()]
