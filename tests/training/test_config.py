"""Every option composes and makes its parts; every mistake is one sentence, before anything is written."""

import os
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from tests.conftest import CHECKOUT, train
from training.config.checks import check, clipping_strategy, run_name
from zclip import ZClip

CONFIGS = CHECKOUT / "configs"
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
OPTIONS = sorted(
    (file.parent.relative_to(CONFIGS).as_posix(), file.stem)
    for file in CONFIGS.rglob("*.yaml")
    if file.parent.name not in ("configs", "paper")
)


def composed(*overrides: str):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def test_the_promised_options_are_there():
    promised = {
        "clip": {"none", "fixed", "autoclip", "zclip", "zclip_mean", "zclip_max"},
        "model": {"micro", "60m", "150m", "350m", "1b", "7b", "hf"}, "data": {"sotu", "smollm"},
        "trainer": {"cpu", "gpu", "ddp", "fsdp", "hsdp"}, "optim": {"adamw"}, "logger": {"jsonl", "wandb"},
        "scale": {"main", "micro", "proxy", "paper"}, "experiment": {"main", "paper"},
    }  # fmt: skip
    for group, names in promised.items():
        assert names <= {name for g, name in OPTIONS if g == group}


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_composes(group, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg = composed(f"{group}={name}")
    if name == "smollm":  # from the hub, which may be out of reach: here from local files instead
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "a.txt").write_text("some text " * 100)
        for source in (cfg.data.sources.cosmopedia, cfg.data.sources.fineweb_edu):
            source.hub, source.path = None, str(tmp_path / "texts")
    refused = {
        ("trainer", "gpu"): "torch sees no GPU" if not torch.cuda.is_available() else None,
        ("trainer", "ddp"): "torch sees (no|. GPU)" if torch.cuda.device_count() < 8 else None,
        ("trainer", "fsdp"): "torch sees (no|. GPU)" if torch.cuda.device_count() < 8 else None,
        ("trainer", "hsdp"): "torch sees (no|. GPU)" if torch.cuda.device_count() < 8 else None,
        ("model", "7b"): "which take 105 GiB" if MEMORY < 105 * 2**30 else None,
        ("model", "hf"): "model.init_from=null is not possible with model=hf",
        ("scale", "proxy"): "torch sees no GPU" if not torch.cuda.is_available() else "",
        ("scale", "paper"): "torch sees (no|. GPU)",
    }
    if said := refused.get((group, name)):
        with pytest.raises(Exception, match=said):
            check(cfg)
    else:
        check(cfg)
    assert {path.name for path in tmp_path.iterdir()} <= {"texts"}
    if group == "clip" or (group == "model" and name != "hf"):
        assert name in run_name(cfg)


def test_the_default_clipper_is_the_papers():
    zclip = clipping_strategy(composed())
    assert isinstance(zclip, ZClip)
    assert zclip.config() == {
        "alpha": 0.97, "z_thresh": 2.5, "max_grad_norm": 1.0, "eps": 1e-6, "warmup_steps": 25, "mode": "zscore",
        "clip_option": "adaptive_scaling", "clip_factor": 1.0, "skip_update_on_spike": False, "recovery_window": 40,
    }  # fmt: skip


def test_the_name_comes_from_what_changes_the_numbers():
    name = run_name(composed())
    assert name == run_name(composed("trainer.log_every=1", "paths.runs=elsewhere", "logger=wandb"))
    names = {
        run_name(composed(*o))
        for o in (
            [],
            ["lr=1e-3"],
            ["seed=1"],
            ["clip.alpha=0.9"],
            ["clip=fixed"],
            ["data.sequence_length=64"],
        )
    }
    assert len(names) == 6
    assert run_name(composed("lr=0.003")) == name
    assert run_name(composed("name=mine")) == "mine"


BAD = {
    "clip=zclop": "clip=zclop is not known: it must be one of adagc, agc, autoclip, fixed, none, ",
    "model=2b": "model=2b is not known: it must be one of 150m, 1b, 350m, 60m, 7b, hf, micro",
    "lr=-1": "lr=-1 is not allowed: it must be a number above 0",
    "lr=fast": "lr=fast is not allowed: it must be a number above 0",
    "seed=1.5": "seed=1.5 is not allowed: it must be an integer from 0",
    "clip.alpha=1.5": "clip.alpha=1.5 is not allowed: it must be a number from 0 to below 1",
    "clip.alpha=abc": "clip.alpha=abc is not allowed: it must be a number from 0 to below 1",
    "clip.alhpa=0.9": "clip.alhpa=0.9 is not possible: there is no key clip.alhpa (the nearest is clip.alpha)",
    "data.path=/nope": "data.sources.text.path=/nope does not exist: it must be a file, a folder or a pattern of",
    "data.sequence_length=100000000": "data.sequence_length=100000000 is longer than the text",
    "data.vocab_size=8192": "data.vocab_size=8192 is larger than the model's vocabulary: it has 8,192 ids, and",
    "model.num_attention_heads=5": "model.num_attention_heads=5 is not allowed",
    "trainer.micro_batch_size=5": "trainer.micro_batch_size=5 is not allowed: 1 process x 5 = 5 sequences at once must",
    "paths.runs=/dev/null/runs": "paths.runs=/dev/null/runs cannot be written",
    "name=../x": "name=../x is not allowed",
    "lr": "lr is not allowed: settings are given as KEY=VALUE",
    "lr=1e-3,3e-3": "lr=1e-3,3e-3 is several values: add -m",
    "lr=inf": "lr=inf is not allowed",
    "clip=null": "clip=null is not allowed: a group takes the name of one of its options",
    "clip.warmup_steps=9999999999999999999999": "clip.warmup_steps=9999999999999999999999 is not allowed",
    "clip.z_thresh=inf": "clip.z_thresh=inf is not allowed",
    "+clip.foo=1": "clip.foo=1 means nothing to ZClip: it has alpha, z_thresh",
    "+clip.on_nonfinite=ignore": "clip.on_nonfinite=ignore is not allowed: it must be one of skip, zero, raise",
    "clip._target_=os.path.join": "clip._target_=os.path.join",
    "~clip.name": "clip.name=null is not allowed",
    "clip.name=../../esc": "clip.name=../../esc is not allowed",
    "model.name=/tmp/abs": "model.name=/tmp/abs is not allowed",
    "~model.vocab_size": "model.vocab_size",
    "model.intermediate_size=100000000000": "model.name=micro has",
    "+optim.foo=1": "optim.foo=1 means nothing",
    "+foo=1": "foo=1 means nothing",
    "data.path=": "data.path= is not allowed",
    "data.sources.text.path=x data.path=y": "data.path=y means nothing to the sources text",
    "data.corruption.kind=evil": "data.corruption.kind=evil is not allowed: it must be one of random, repeat",
    "data.corruption.steps=[0]": "data.corruption.steps=[0] is not allowed: it must be a list of different steps",
    "data.corruption.steps=[301]": "data.corruption.steps=[301] is not allowed: step 301 is after the last",
    "model.vocab_size=100": "data.vocab_size=100 is not allowed: it must be at least 257",
    "data.sequence_length=512": "data.sequence_length=512 is longer than the model's context",
    "logger=wandb": "logger=wandb needs to know who you are",
}


@pytest.mark.parametrize("override", BAD)
def test_a_mistake_is_one_sentence_and_leaves_nothing(override, tmp_path):
    online = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "NETRC": "/nowhere"}
    done = train(*override.split(" "), cwd=tmp_path, env=online)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert BAD[override] in line
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("clip=none,fixed", "lr=1e-3,-1"), "lr=-1 is not allowed"),
        (("name=x", "lr=1e-3,3e-3"), "name=x would be shared by the jobs"),
        (("data.path=/nope", "seed=0,1"), "data.sources.text.path=/nope does not exist"),
        (("lr=glob(*)",), "makes no job"),
        (("lr=1e-3,0.001",), "two jobs of the sweep are the same run"),
    ],
)
def test_a_sweep_with_one_bad_job_starts_none(overrides, said, tmp_path):
    done = train("-m", *overrides, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_hydra_full_error_shows_the_traceback(tmp_path):
    done = train("lr=-1", cwd=tmp_path, env={"HYDRA_FULL_ERROR": "1"})
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "UserError: lr=-1 is not allowed" in done.stderr


def test_text_that_holds_fewer_tokens_than_bytes(tmp_path):
    """Found only after tokenizing: the tokens stay, for shorter sequences, and no run is begun."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "ab":
        (texts / f"{name}.txt").write_text(f"{name} short text " * 50)
    settings = ("data.sequence_length=600", "model.max_position_embeddings=600", "model.vocab_size=512")
    done = train("data.path=texts", *settings, cwd=tmp_path)
    assert done.returncode == 2
    assert "data.sequence_length=600 is longer than the text: the " in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "texts"]


def test_a_name_that_is_taken(tmp_path: Path, corpus, cache):
    from tests.conftest import TINY

    settings = ("name=mine", f"data.path={corpus}", f"paths.cache={cache}", *TINY, "trainer.max_steps=2")
    assert train(*settings, cwd=tmp_path).returncode == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    done = train(*settings, "lr=1e-4", cwd=tmp_path)
    assert done.returncode == 2
    assert "name=mine is taken" in done.stderr and "lr=0.0001 (there: 0.003)" in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
