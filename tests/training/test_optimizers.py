"""Runs with other optimizers than AdamW: names, messages, memory, checkpoints, and the bits to which they resume."""

import copy
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError, UserError
from models import Llama
from tests.helpers import (
    CHECKOUT,
    FSDP,
    SLOW,
    compose_config,
    copy_run,
    final_state,
    interrupted,
    only_run,
    read_jsonl,
    same,
    train_to_end,
)
from training.checkpoint.fork import find_fork_source
from training.checkpoint.state import find_problem
from training.config.checks import check
from training.config.compose import read_config, to_yaml
from training.config.identity import identity, run_name
from training.config.optimizer import (
    check_optimizer,
    make_optimizer,
    small_optimizer,
    state_bytes,
    state_differences,
)
from training.launch.plan import plan
from training.module import PretrainingModule
from training.muon import MuonAdamW
from training.run_dir import RunDir

ADAMOD = (
    "optim=custom", "optim._target_=experiments.labs.adamod.AdaMod", "optim.name=adamod", "+optim.beta3=0.9",
)  # fmt: skip
OPTIMIZERS = {
    "sgd": ("optim=sgd", "lr=0.3"),
    "nesterov": ("optim=sgd", "lr=0.3", "optim.nesterov=true", "optim.fused=false", "optim.weight_decay=0.01"),
    "plain sgd": ("optim=sgd", "lr=0.3", "optim.momentum=0"),
    "muon": ("optim=muon",),
    "adamod": ADAMOD,
    "torch's": ("optim=custom", "optim._target_=torch.optim.NAdam", "optim.name=nadam"),
}


#: An optimizer whose state has a number that is no tensor.
SIGN_SGD = """
from pathlib import Path
import torch
Path("imported").touch()

class SignSGD(torch.optim.Optimizer):
    def __init__(self, params, lr, share: float = 1.0):
        super().__init__(params, {"lr": lr, "share": share})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                count = self.state[parameter].get("count", 0) + 1
                self.state[parameter]["count"] = count
                parameter.add_(parameter.grad.sign(), alpha=-group["lr"] * group["share"] / count**0.5)
        return loss
"""


def test_runs_with_adamw_are_named_as_before_there_were_others():
    recorded = CHECKOUT / "experiments" / "results" / "runs" / "adam-lag"
    for arm in (("clip=fixed",), ("clip=none", "update=monitor"), ("clip=zclip", "update=brake")):
        name = run_name(compose_config("experiment=adam_lag", *arm))
        assert (recorded / f"{name}.json.xz").is_file()
    adamw = {"name", "betas", "eps", "weight_decay", "fused", "warmup_fraction", "final_lr_fraction", "z_loss"}
    assert identity(compose_config())["optim"].keys() == adamw


def test_runs_with_others_are_named_by_their_settings():
    assert run_name(compose_config("optim=sgd")).startswith("micro-zclip-sgd-lr0.003-seed0-")
    assert run_name(compose_config(*ADAMOD)).startswith("micro-zclip-adamod-lr0.003-seed0-")
    changes = ("optim=sgd", "optim.momentum=0.5"), ("optim=sgd",), ("optim=muon",), ("optim=muon", "optim.ns_steps=6")
    assert len({run_name(compose_config(*change)) for change in (*changes, ADAMOD, (*ADAMOD, "+optim.eps=1e-6"))}) == 6
    one, point = (run_name(compose_config(*ADAMOD, f"optim.beta3={value}")) for value in ("0", "0.0"))
    assert one == point, "a whole number is a number"


REFUSED = {
    "optim=sgd +optim.betas=[0.9,0.99]": "optim.betas=[0.9, 0.99] is not possible with optim.name=sgd, which has "
    "momentum, nesterov, weight_decay, fused; optim=sgd sets them",
    "optim=sgd optim.momentum=1": "optim.momentum=1 is not allowed: it must be a number from 0 to below 1",
    "optim=sgd optim.momentum=null": "optim.momentum is not set: give it as optim.momentum=...",
    "optim=sgd optim.momentum=0 optim.nesterov=true": "optim.nesterov=true is not possible with optim.momentum=0",
    "optim=sgd trainer.strategy=fsdp trainer.devices=2": "optim.fused=true is not possible with trainer.strategy=fsdp: "
    "fused SGD takes no sharded parameters; optim.fused=false does",
    "optim=muon optim.adjust_lr_fn=none": "optim.adjust_lr_fn=none is not allowed: it must be original or match_rms_a",
    "optim=muon optim.ns_steps=0": "optim.ns_steps=0 is not allowed: it must be an integer from 1 to 99",
    "optim=muon optim.betas=[0.9]": "optim.betas=[0.9] is not allowed: it must be two numbers from 0 to below 1",
    "+optim.wieght_decay=1": "optim.wieght_decay=1 is not possible: there is no key optim.wieght_decay (the nearest is",
    "optim._target_=torch.optim.SGD": "optim.name=adamw is not possible with optim._target_=torch.optim.SGD: give both",
    "optim=custom optim._target_=torch.optim": "optim._target_=torch.optim is not allowed: it must be a subclass of",
    "optim=custom optim._target_=nowhere.Lion": "optim._target_=nowhere.Lion cannot be imported",
    "optim=custom optim._target_=torch.optim.Optimizer": "optim._target_=torch.optim.Optimizer takes no step: it must",
    "optim=custom optim._target_=torch.optim.SGD +optim.beta=1": "optim.beta=1 is not an argument of SGD: it has mome",
    "optim=custom optim._target_=torch.optim.SGD +optim.lr=1": "optim.lr=1 is not an argument of SGD: it has momentum",
    "optim=custom optim._target_=torch.optim.Muon": "optim._target_=torch.optim.Muon cannot take a step with its arg",
    "optim=custom optim._target_=torch.optim.LBFGS": "optim._target_=torch.optim.LBFGS cannot take a step with its ar",
    "update=brake optim=muon": "update.name=brake is not possible with optim.name=muon: the update of MuonAdamW is "
    "not known before its step: Adam, AdamW and SGD of torch are supported",
    "update=stable_adamw optim=sgd": "update.name=stable_adamw is not possible with optim.name=sgd: SGD has no second",
    f"update=monitor {' '.join(ADAMOD)}": "update.name=monitor is not possible with optim.name=adamod: the update of",
    f"{' '.join(ADAMOD[:3])} +optim.beta3=1": "optim.beta3=1 is not allowed: it must be a number from 0 to below 1",
    "+clip.scope=group:adamw optim=muon": (
        "clip.scope=group:adamw is not allowed: group:adamw matches none of the optimizer's groups: AdamW, Muon"
    ),
    "+clip.scope=group:Adam optim=muon": "clip.scope=group:Adam is not allowed: group:Adam matches none of the opt",
}


@pytest.mark.parametrize("settings", REFUSED)
def test_impossible_optimizers_are_refused_in_one_sentence(settings, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert REFUSED[settings] in refusal(*settings.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "settings",
    [
        ("update=brake", "optim=sgd"),
        ("optim=muon", "+clip.scope=group:AdamW"),
        ("optim=muon", "+clip.scope=group:Muon"),
    ],
)
def test_possible_combinations_are_not_refused(settings, checked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checked("model=nano", *settings)


def test_muon_trains_the_matrices_of_the_blocks_and_adamw_all_else():
    module = PretrainingModule(compose_config("model=pico", "model.qk_norm=true", "optim=muon", "lr=0.02"), fresh=True)
    module.configure_model()
    optimizer = module.configure_optimizers()["optimizer"]
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    muon, adamw = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    matrices = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-2] for name in muon} == matrices
    assert len(muon) == 7 * module.config.model.num_hidden_layers and muon | adamw == {*names.values()}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= adamw
    assert [group["name"] for group in optimizer.param_groups] == ["Muon", "AdamW"]
    assert optimizer.param_groups[0]["adjust_lr_fn"] == "match_rms_adamw"


def test_steps_of_both_parts_are_those_of_torch_also_after_loading_a_state():
    def weights():
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(2)], [torch.nn.Parameter(torch.randn(5))]

    settings = {"lr": 0.05, "weight_decay": 0.1}
    (ours, rest), (matrices, others) = weights(), weights()
    combined = MuonAdamW(ours, rest, momentum=0.8, betas=(0.8, 0.9), fused=True, **settings)
    muon = torch.optim.Muon(matrices, momentum=0.8, adjust_lr_fn="match_rms_adamw", **settings)
    adamw = torch.optim.AdamW(others, betas=(0.8, 0.9), fused=True, **settings)
    for number in range(6):
        for one, other in zip((*ours, *rest), (*matrices, *others), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        combined.step(), muon.step(), adamw.step()
        assert same([*ours, *rest], [*matrices, *others]), number
        if number == 2:
            saved = combined.state_dict()
            combined = MuonAdamW(ours, rest, momentum=0.8, betas=(0.8, 0.9), fused=True, **settings)
            combined.load_state_dict(saved)


#: Others whose state differs.
PLANNED = {
    **OPTIMIZERS,
    "amsgrad": ("optim.amsgrad=true",),
    "muon without momentum": ("optim=muon", "optim.momentum=0"),
}


@pytest.mark.parametrize("name", PLANNED)
def test_planned_state_is_that_of_a_real_step(name):
    config = compose_config("model=pico", *PLANNED[name])
    model = Llama(config.model.llama)
    optimizer = make_optimizer(config.optim, model.named_parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    values = itertools.chain.from_iterable(state.values() for state in optimizer.state.values())
    found = sum(v.nbytes for v in values if isinstance(v, torch.Tensor) and v.ndim)
    assert state_bytes(config.optim, config.model.llama) == found == plan(config).memory["optimizer"]
    assert found > 0 or name == "plain sgd"


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ((), ("optim=muon",), [("name", "muon", "adamw")]),
        (ADAMOD, (*ADAMOD, "optim._target_=torch.optim.NAdam"), [("_target_", "torch.optim.NAdam", ADAMOD[1][15:])]),
        ((), ("optim.amsgrad=true",), [("amsgrad", True, False)]),
        (("optim=sgd",), ("optim=sgd", "optim.momentum=0"), [("momentum", 0.0, 0.9)]),
        (("optim=sgd",), ("optim=sgd", "optim.momentum=0.5", "optim.weight_decay=1"), []),
        (ADAMOD, (*ADAMOD, "+optim.eps=1e-3", "optim.beta3=0.5"), []),
        (("optim=muon",), ("optim=muon", "optim.momentum=0", "optim.betas=[0.5,0.5]"), []),
    ],
)
def test_optimizers_that_share_a_state_differ_in_nothing(old, new, difference):
    assert [*state_differences(compose_config(*new).optim, compose_config(*old).optim)] == difference


@pytest.mark.parametrize("name", ["muon", *map(SLOW, ("sgd", "nesterov", "plain sgd", "adamod", "torch's"))])
def test_run_resumes_to_the_same_bits(name, tiny, run_in_process, tmp_path):
    settings = (*tiny, *OPTIMIZERS[name], "trainer.checkpoint_every=8", "trainer.keep_last=9")
    (tmp_path / "whole").mkdir()
    train_to_end(*settings, cwd=tmp_path / "whole")
    whole = only_run(tmp_path / "whole")
    interrupted(whole, tmp_path, 24)
    _, output = run_in_process(*settings)
    assert "after step 24 of 40" in output
    (state, rows, loss), (resumed, others, other_loss) = map(final_state, (tmp_path / "whole", tmp_path))
    assert rows == others and loss == other_loss
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5 and any(row["clipped"] for row in rows), "it learns, and clips"
    assert same(state["state_dict"], resumed["state_dict"])
    assert same(state["optimizer_states"], resumed["optimizer_states"])
    assert json.loads((whole / "result.json").read_text())["steps"] == 40

    if name == "muon":
        checkpoint = copy_run(whole, tmp_path / "damaged") / "checkpoints" / "step-00000040.ckpt"
        assert find_problem(checkpoint) is None
        del (state := torch.load(checkpoint, weights_only=True))["optimizer_states"][0]["state"][3]["momentum_buffer"]
        torch.save(state, checkpoint)
        assert "its optimizer: 3.momentum_buffer is missing" in (find_problem(checkpoint) or "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nesterov", "muon", "adamod"])
def test_sharded_run_trains_as_one_process_does_and_resumes(name, tiny, tmp_path):
    settings = (*tiny, *OPTIMIZERS[name], "trainer.checkpoint_every=8", "trainer.keep_last=9")
    for folder in ("one", "whole", "resumed"):
        (tmp_path / folder).mkdir()
    train_to_end(*settings, cwd=tmp_path / "one")
    train_to_end(*settings, *FSDP, cwd=tmp_path / "whole", processes=2)
    one, rows = (read_jsonl(only_run(tmp_path / folder) / "metrics.jsonl") for folder in ("one", "whole"))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in one], rel=1e-4)
    path = interrupted(only_run(tmp_path / "whole"), tmp_path / "resumed", 24)
    assert "after step 24 of 40" in train_to_end(*settings, *FSDP, cwd=tmp_path / "resumed", processes=2)
    assert [row["loss"] for row in read_jsonl(path / "metrics.jsonl")] == [row["loss"] for row in rows]


def test_optimizer_of_your_own_is_imported_only_where_the_command_names_it(tiny, run_in_process, tmp_path, monkeypatch):
    (tmp_path / "my_optimizers.py").write_text(SIGN_SGD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = ("optim=custom", "optim._target_=my_optimizers.SignSGD", "optim.name=sign", "+optim.share=2")
    _, output = run_in_process(*tiny, *own, "name=own", "trainer.checkpoint_every=8", "trainer.keep_last=9")
    folder = tmp_path / "runs" / "main" / "own"
    rows = read_jsonl(folder / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3, output
    resumed = interrupted(folder, tmp_path / "again", 32)
    (tmp_path / "imported").unlink()
    sys.modules.pop("my_optimizers")
    with pytest.raises(UserError, match=r"optim._target_=my_optimizers.SignSGD is not a class of zclip, and not impor"):
        run_in_process(f"resume={resumed}")
    assert find_problem(resumed / "checkpoints" / "step-00000032.ckpt") is None
    with pytest.raises(UserError, match=r"is not possible with optim.name=adamw: that run has optim.name=sign"):
        find_fork_source(compose_config(*tiny, f"fork_from={resumed}@32"), RunDir(tmp_path / "forked"))
    assert not (tmp_path / "imported").exists()
    _, output = run_in_process(f"resume={resumed}", "optim._target_=my_optimizers.SignSGD")
    assert (tmp_path / "imported").exists() and "after step 32 of 40" in output
    assert [row["loss"] for row in read_jsonl(resumed / "metrics.jsonl")] == [row["loss"] for row in rows]


def test_amsgrad_of_ones_own_class_is_in_the_name_whatever_its_value():
    own = ("optim=custom", "optim._target_=torch.optim.AdamW", "optim.name=own")
    names = {
        run_name(compose_config(*own, *more)) for more in ((), ("+optim.amsgrad=false",), ("+optim.amsgrad=true",))
    }
    assert len(names) == 3, "its default is not known"


def test_forks_are_refused_where_ones_own_optimizer_has_other_state():
    own = ("optim=custom", "optim._target_=torch.optim.RMSprop", "optim.name=rms")
    plain, centered, slower = (
        compose_config(*own, *more).optim for more in ((), ("+optim.centered=true",), ("+optim.alpha=0.9",))
    )
    assert [*state_differences(centered, plain)] == [("centered", True, None)]
    assert [*state_differences(slower, plain)] == []


def test_forks_take_settings_of_equal_meaning_for_equal():
    """What a setting means to a class of one's own shows in the state that it makes; the name is a label."""
    own = ("optim=custom", "optim._target_=torch.optim.AdamW", "optim.name=own")
    unset, false, true, renamed = (
        compose_config(*own, *more).optim
        for more in ((), ("+optim.amsgrad=false",), ("+optim.amsgrad=true",), ("optim.name=mine",))
    )
    for one, other in itertools.permutations((unset, false, renamed), 2):
        assert [*state_differences(one, other)] == []
    assert [*state_differences(true, unset)] == [("amsgrad", True, None)]
    assert [*state_differences(false, true)] == [("amsgrad", False, True)]


ADAFACTOR = ("optim=custom", "optim._target_=torch.optim.Adafactor", "optim.name=adafactor")


def test_pair_of_eps_is_passed_on_as_a_tuple_and_stays_in_config_yaml(tmp_path):
    names = set()
    for given, pair in {"[1e-30,1e-3]": (1e-30, 1e-3), "[null,0]": (None, 0.0)}.items():
        config = compose_config(*ADAFACTOR, f"+optim.eps={given}")
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert read_config(tmp_path / "config.yaml").optim.arguments == config.optim.arguments == {"eps": pair}
        check_optimizer(config.optim, None, "none")
        (group,) = small_optimizer(config.optim).param_groups
        assert group["eps"] == pair and isinstance(group["eps"], tuple)
        names.add(run_name(config))
    assert len(names) == 2
    assert [*state_differences(config.optim, compose_config(*ADAFACTOR).optim)] == []


@pytest.mark.parametrize("eps", ["[]", "[-1,1]", "[a,1]", "[true,1]", "[1e400,1]", "[[1],1]", "true", "0"])
def test_bad_values_of_eps_are_named(eps):
    with pytest.raises(
        ConfigError, match=r"^optim\.eps=\S.* is not allowed: it must be a number above 0, or for a class"
    ):
        compose_config(*ADAFACTOR, f"+optim.eps={eps}")
    with pytest.raises(ConfigError, match=r"^optim\.eps=\[1e-07, 1\.0\] is not allowed: it must be a number above 0$"):
        compose_config("optim.eps=[1e-7,1]")


def test_run_with_a_pair_of_eps_resumes_to_the_same_bits(tiny, run_in_process, tmp_path):
    pair = (*tiny, *ADAFACTOR, "+optim.eps=[1e-6,1e-3]", "lr=0.1", "trainer.checkpoint_every=8", "trainer.keep_last=9")
    run_in_process(*pair, "name=whole")
    whole = tmp_path / "runs" / "main" / "whole"
    rows, again = read_jsonl(whole / "metrics.jsonl"), interrupted(whole, tmp_path / "again", 24)
    _, output = run_in_process(f"resume={again}")
    assert "after step 24 of 40" in output and rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert [row["loss"] for row in read_jsonl(again / "metrics.jsonl")] == [row["loss"] for row in rows]


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_fused_steps_without_sharding_are_refused_for_any_name(name):
    own = ("optim=custom", f"optim._target_=torch.optim.{name}", "optim.name=own", "trainer.strategy=fsdp", "plan=true")
    check(compose_config(*own), Path("unused"))
    with pytest.raises(ConfigError, match=rf"optim.fused=true is not possible with .*: fused {name} takes no sharded"):
        check(compose_config(*own, "+optim.fused=true"), Path("unused"))


def test_class_that_passes_on_all_arguments_is_accepted(tmp_path, monkeypatch):
    init = "def __init__(self, *args, **kwargs):\n        super().__init__(*args, **kwargs)"
    thin = f"import torch\nclass Thin(torch.optim.SGD):\n    {init}\n"
    (tmp_path / "thin_optimizer.py").write_text(thin)
    monkeypatch.syspath_prepend(tmp_path)
    own = ("optim=custom", "optim._target_=thin_optimizer.Thin", "optim.name=thin", "+optim.momentum=0.5", "plan=true")
    check(compose_config(*own), Path("unused"))


def test_copy_of_muon_takes_the_same_steps():
    def parameters():
        return [torch.nn.Parameter(torch.eye(4)), torch.nn.Parameter(torch.ones(4))]

    matrix, vector = parameters()
    copied = copy.deepcopy(MuonAdamW([matrix], [vector], lr=0.1))
    for optimizer in (original := MuonAdamW([matrix], [vector], lr=0.1), copied):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    pairs = zip(original.param_groups, copied.param_groups, strict=True)
    assert all(torch.equal(a["params"][0], b["params"][0]) for a, b in pairs)
    assert not torch.equal(vector, torch.ones(4))
