"""Every option composes and makes its parts; every mistake is one sentence, before anything is written."""

import io
import os
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from common.errors import ConfigError
from common.settings import fields_of
from data import prepare
from tests.data.preparation import corpus_of, write_lines
from tests.helpers import CHECKOUT, compose_config, read_only, train
from training.config.checks import check, check_cache
from training.config.compose import load_config
from training.config.identity import run_name, run_path
from training.config.reference import FOLDER, default_options, first_comment, json_schema, markdown
from training.config.schema import Config
from training.config.strategy import clipping_strategy
from training.launch.plan import plan_table, with_possible_batch
from training.launch.sweep import CheckSweep, Job, print_plans
from training.run_dir import RunDir
from zclip import ZClip

CONFIGS = CHECKOUT / "configs"
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
OPTIONS = sorted(
    (file.parent.relative_to(CONFIGS).as_posix(), file.stem)
    for file in CONFIGS.rglob("*.yaml")
    if file.parent.name not in ("configs", "paper")
)


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def load_and_check(cfg: DictConfig) -> None:
    loaded = load_config(cfg)
    check(loaded, run_path(loaded))


def test_promised_options_exist():
    promised = {
        "clip": {"none", "fixed", "autoclip", "zclip", "zclip_mean", "zclip_max"},
        "model": {"micro", "60m", "150m", "350m", "1b", "7b", "hf"}, "data": {"sotu", "smollm"},
        "trainer": {"cpu", "gpu", "ddp", "fsdp", "hsdp"}, "logger": {"jsonl", "wandb"},
        "optim": {"adamw", "sgd", "muon", "custom"},
        "scale": {"main", "micro", "proxy_short", "proxy", "paper"}, "experiment": {"main", "paper"},
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
        ("optim", "custom"): "optim.name=custom is not allowed: .* or optim._target_ must name a class",
        ("model", "hf"): "model.init_from=null is not possible with model=hf",
        ("scale", "proxy"): "torch sees no GPU" if not torch.cuda.is_available() else "",
        ("scale", "proxy_short"): "torch sees no GPU" if not torch.cuda.is_available() else "",
        ("scale", "paper"): "torch sees (no|. GPU)",
    }
    if message := refused.get((group, name)):
        with pytest.raises(Exception, match=message):
            load_and_check(cfg)
    else:
        load_and_check(cfg)
    assert {path.name for path in tmp_path.iterdir()} <= {"texts"}
    if group == "clip" or (group == "model" and name != "hf"):
        assert name in run_name(load_config(cfg))


def test_default_clipper_is_the_papers():
    zclip = clipping_strategy(compose_config().clip)
    assert isinstance(zclip, ZClip)
    assert zclip.config() == {
        "alpha": 0.97, "z_thresh": 2.5, "max_grad_norm": 1.0, "eps": 1e-6, "warmup_steps": 25, "mode": "zscore",
        "clip_option": "adaptive_scaling", "clip_factor": 1.0, "skip_update_on_spike": False, "recovery_window": 40,
    }  # fmt: skip


def test_run_name_depends_on_settings_that_change_the_result():
    name = run_name(compose_config())
    assert name == run_name(compose_config("trainer.log_every=1", "paths.runs=elsewhere", "logger=wandb"))
    names = {
        run_name(compose_config(*o))
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
    assert run_name(compose_config("lr=0.003")) == name
    assert run_name(compose_config("clip.z_thresh=2")) == run_name(compose_config("clip.z_thresh=2.0"))
    assert run_name(compose_config("data.max_tokens=1000")) == run_name(compose_config("data.max_tokens=1e3"))
    assert run_name(compose_config("name=mine")) == "mine"


BAD = {
    "clip=zclop": "clip=zclop is not known: it must be one of adagc, agc, autoclip, fixed, ",
    "model=2b": "model=2b is not known: it must be one of 150m, 1b, 350m, 60m, 7b, hf, micro",
    "lr=-1": "lr=-1 is not allowed: it must be a number above 0",
    "lr=fast": "lr=fast is not allowed: it must be a number above 0",
    "optim.name=adam": "optim.name=adam is not allowed: it must be one of adamw, sgd, muon, or optim._target_ must",
    "optim.name=sgd": "optim.amsgrad=false is not possible with optim.name=sgd, which has momentum, nesterov, weight_",
    "seed=1.5": "seed=1.5 is not allowed: it must be an integer from 0",
    "clip.alpha=1.5": "clip.alpha=1.5 is not allowed: it must be a number from 0 to below 1",
    "clip.alpha=abc": "clip.alpha=abc is not allowed: it must be a number from 0 to below 1",
    "clip.alhpa=0.9": "clip.alhpa=0.9 is not possible: there is no key clip.alhpa (the nearest is clip.alpha)",
    "data.path=/nope": "data.sources.text.path=/nope does not exist: it must be a file, a folder or a pattern of",
    "data.sequence_length=100000000 model.max_position_embeddings=100000000": (
        "data.sequence_length=100000000 is longer than the text"
    ),
    "data.vocab_size=8192": "data.vocab_size=8192 is larger than the model's vocabulary: it has 8,192 ids, and",
    "model.num_attention_heads=5": "model.num_attention_heads=5 is not allowed",
    "trainer.micro_batch_size=5": "trainer.micro_batch_size=5 is not allowed: 1 process x 5 = 5 sequences at once must",
    "paths.runs=/dev/null/runs": "paths.runs=/dev/null/runs cannot be written",
    "name=../x": "name=../x is not allowed",
    "lr": "lr is not allowed: settings are given as KEY=VALUE",
    "lr=1e-3,3e-3": "lr=1e-3,3e-3 has several values: add -m",
    "lr=inf": "lr=inf is not allowed",
    "clip=null": "clip=null is not allowed: a group takes the name of one of its options",
    "clip.warmup_steps=9999999999999999999999": "clip.warmup_steps=9999999999999999999999 is not allowed",
    "clip.z_thresh=inf": "clip.z_thresh=inf is not allowed",
    "+clip.foo=1": "clip.foo=1 is not an argument of ZClip: it has alpha, z_thresh",
    "+clip.scope=head.*": "clip.scope=head.* is not allowed: head.* matches none of the model's parameters, which are ",
    "+clip.scope=['*.weight','!embed*']": (
        "clip.scope=['*.weight', '!embed*'] is not allowed: !embed* matches none of the model's parameters, which are "
        "model.model.embed_tokens.weight, "
    ),
    "+clip.scope=['*','!*.weight']": "clip.scope=['*', '!*.weight'] has none of the model's parameters, which are",
    "+clip.scope=group:Muon": (
        "clip.scope=group:Muon is not allowed: group:Muon matches none of the optimizer's groups: AdamW"
    ),
    "+clip.scope=[3]": "clip.scope=[3] is not allowed: it must be a pattern of parameter names, or a list of patterns",
    "+clip.on_nonfinite=ignore": "clip.on_nonfinite=ignore is not allowed: it must be one of skip, zero, raise",
    "clip._target_=os.path.join": "clip._target_=os.path.join",
    "~clip.name": "clip.name is not set: give it as clip.name=...",
    "clip.name=../../esc": "clip.name=../../esc is not allowed",
    "model.name=/tmp/abs": "model.name=/tmp/abs is not allowed",
    "~model.vocab_size": "model.vocab_size",
    "model.intermediate_size=1000000000": "model.name=micro has",
    "+optim.foo=1": "optim.foo=1 is not possible: there is no key optim.foo",
    "+foo=1": "foo=1 is not possible: there is no key foo",
    "+trainer.max_stpes=1": "there is no key trainer.max_stpes (the nearest is trainer.max_steps)",
    "data.path=": "data.path= is not allowed",
    "data.sources.text.path=x data.path=y": "data.path=y is not read by any of the sources text",
    "data.corruption.kind=evil": "data.corruption.kind=evil is not allowed: it must be one of random, repeat",
    "data.corruption.steps=[0]": "data.corruption.steps=[0] is not allowed: it must be a list of different steps",
    "data.corruption.steps=[301]": "data.corruption.steps=[301] is not allowed: step 301 is after the last",
    "data.corruption.random_steps=-1": "data.corruption.random_steps=-1 is not allowed: it must be an integer from",
    "data.corruption.random_steps=5 data.corruption.steps=[3]": "data.corruption.random_steps=5 is not allowed with "
    "data.corruption.steps=[3]: steps are listed or drawn",
    "data.corruption.random_steps=5 data.corruption.burst_length=2": "data.corruption.random_steps=5 is not allowed: "
    "it must be a multiple of data.corruption.burst_length=2",
    "data.corruption.random_steps=151": "data.corruption.random_steps=151 is not allowed: from step 1 to the last, "
    "trainer.max_steps=300, at most 150 can be drawn in bursts of 1",
    "data.corruption.random_steps=1 data.corruption.random_first_step=301": "data.corruption.random_steps=1 is not "
    "allowed: from step 301 to the last, trainer.max_steps=300, at most 0 can be drawn",
    "data.corruption.kind=repeated_ngrams data.corruption.steps=[1] data.sequence_length=30": "data.corruption.kind="
    "repeated_ngrams is not possible with data.sequence_length=30: it must be at least 31",
    "data.instance_filter.repetition_max_count=1": "data.instance_filter.repetition_max_count=1 is not allowed: it "
    "must be an integer from 2",
    "data.instance_filter.repetition_min_period=20": "data.instance_filter.repetition_max_period=13 is not allowed: it "
    "must be at least data.instance_filter.repetition_min_period=20",
    "model.vocab_size=100": "data.vocab_size=100 is not allowed: it must be at least 257",
    "data.sequence_length=512": "data.sequence_length=512 is longer than the model's context",
    "trainer.compile=1": "trainer.compile=1 is not allowed: it must be true or false",
    "trainer.keep_every=30": "trainer.keep_every=30 is not allowed: it must be a multiple of trainer.",
    "optim.betas=[0.9]": "optim.betas=[0.9] is not allowed: it must be two numbers from 0 to below 1",
    "hardware.device=X1": "hardware.device=X1 is not allowed: it must be one of H200, H100 PCIe",
    "resume=gone": "resume=gone is not possible: there is no run in that folder",
}


@pytest.mark.parametrize("override", BAD)
def test_mistake_is_one_sentence_and_writes_nothing(override, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert BAD[override] in refusal(*override.split(" "))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("override", ["clip=zclop", "lr=fast", "clip.alhpa=0.9", "data.path=/nope", "resume=gone"])
def test_program_prints_the_sentence_of_a_mistake_with_status_2(override, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = train(override, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", refusal(override) + "\n")
    assert not any(tmp_path.iterdir())


BAD_SWEEPS = [
    (("clip=none,fixed", "lr=1e-3,-1"), "lr=-1 is not allowed"),
    (
        ("name=x", "clip=zclip", "lr=1e-3,3e-3"),
        "name=x would be shared by the jobs with (lr=0.001) and (lr=0.003): omit",
    ),
    (("name=x", "seed=1,1"), "name=x would be shared by two jobs of the same overrides: give each value once"),
    (("data.path=/nope", "seed=0,1"), "data.sources.text.path=/nope does not exist"),
    (("lr=glob(*)",), "makes no job"),
    (("lr=1e-3,0.001",), "two jobs of the sweep are the same run"),
    (("resume=runs/main/x", "seed=0,1"), "resume=runs/main/x is not possible with -m: it continues one run"),
    (
        ("trainer.eval_every=5", "eval.tasks=[last_word]", "eval.num_fewshot=9999", "seed=0,1"),
        "eval.num_fewshot=9999 is not allowed: it must be at most 1,727 for last_word",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_SWEEPS)
def test_sweep_with_one_bad_job_is_refused(overrides, message, tmp_path, monkeypatch, capsys):
    """Hydra calls the check of the sweep before the first job."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", "-m", *overrides])
    monkeypatch.setattr("training.launch.cli.exit_statuses", statuses := [])
    monkeypatch.setattr("training.launch.sweep.exit_statuses", statuses)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        sweep = hydra.compose_config("train", list(overrides), RunMode.MULTIRUN, with_log_configuration=False)
        with pytest.raises(SystemExit) as end:
            CheckSweep().on_multirun_start(sweep)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [("plan=true",), ("print_run_dir=true",), ("name=finished",)])
def test_sweep_that_trains_nothing_loads_no_tasks(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "main" / "finished").mkdir(parents=True)
    (tmp_path / "runs" / "main" / "finished" / "result.json").write_text("{}")
    *tasks, _ = BAD_SWEEPS[-1][0]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        sweep = hydra.compose_config("train", [*tasks, *settings], RunMode.MULTIRUN, with_log_configuration=False)
        CheckSweep().on_multirun_start(sweep)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_sweep_of_slurm_jobs_needs_no_gpu_where_it_is_submitted(tmp_path, monkeypatch, capsys):
    """A login node mostly has none. The batch must still be possible."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.launch.cli.exit_statuses", statuses := [])
    monkeypatch.setattr("training.launch.sweep.exit_statuses", statuses)

    def submitted(*overrides: str) -> None:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            sweep = hydra.compose_config("train", [*overrides], RunMode.MULTIRUN, with_log_configuration=False)
            CheckSweep().on_multirun_start(sweep)

    settings = ("model=1b", "trainer=hsdp", "clip=fixed,zclip", "data.vocab_size=4096")
    submitted("hydra/launcher=slurm", "trainer.global_batch_size=128", *settings)
    for launcher, message in (("slurm", "= 128 sequences at once must divide"), ("local", "torch sees no GPU here")):
        with pytest.raises(SystemExit) as end:
            submitted(f"hydra/launcher={launcher}", *settings)
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_sweep_with_one_bad_job_starts_none(tmp_path):
    overrides, message = BAD_SWEEPS[0]
    done = train("-m", *overrides, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not any(tmp_path.iterdir())


def test_hydra_full_error_shows_the_traceback(tmp_path):
    done = train("lr=-1", cwd=tmp_path, env={"HYDRA_FULL_ERROR": "1"})
    assert done.returncode == 2, done.stderr
    assert "Traceback" in done.stderr and "ConfigError: lr=-1 is not allowed" in done.stderr


def test_text_with_fewer_tokens_than_a_sequence_is_refused_after_tokenizing(run_in_process, tmp_path):
    """The prepared tokens are kept for shorter sequences, and no run is begun."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "ab":
        (texts / f"{name}.txt").write_text(f"{name} short text " * 50)
    settings = ("data.sequence_length=600", "model.max_position_embeddings=600", "model.vocab_size=512")
    with pytest.raises(ConfigError, match=r"^data\.sequence_length=600 is longer than the text: the "):
        run_in_process(f"data.path={texts}", *settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "texts"]


def test_plan_is_made_by_as_many_processes_as_the_configuration_has(refusal, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert refusal("model=micro", "trainer=cpu", "plan=true").endswith("are 1 processes, but 2 were started")


def test_plan_takes_a_batch_that_the_processes_can_share(checked):
    planned, _ = checked("model=1b", "trainer=fsdp", "plan=true")
    out = io.StringIO()
    Console(file=out, width=100).print(plan_table(planned))
    text = " ".join(out.getvalue().split())
    assert "planned for" in text and "trainer.global_batch_size=64" in text, text


@pytest.mark.parametrize("key", ["fork_from", "resume"])
def test_plan_proposes_no_batch_that_the_run_cannot_have(key):
    """The global batch of a fork is that of the other run. A run that is resumed keeps its micro-batch, too."""
    config = compose_config("trainer.strategy=ddp", "trainer.devices=2", "trainer.global_batch_size=8", "plan=true")
    config = config.model_copy(update={key: "runs/main/base@8"})
    sizes = {"micro_batch_size": 8}
    if key == "fork_from":
        possible = with_possible_batch(config).trainer
        assert (possible.global_batch_size, possible.micro_batch_size) == (8, 4)
        sizes = {"micro_batch_size": 4, "devices": 3}
    impossible = config.model_copy(update={"trainer": config.trainer.model_copy(update=sizes)})
    with pytest.raises(ConfigError, match=r"sequences at once must divide trainer\.global_batch_size=8$"):
        plan_table(impossible)


def test_lines_of_a_plan_are_those_of_runs_that_can_start(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    config = compose_config("trainer.strategy=ddp", "trainer.devices=2", "trainer.micro_batch_size=8", "plan=true")
    with pytest.raises(ConfigError, match=r"^trainer\.micro_batch_size=8 is not allowed: 2 processes x 8 = 16 "):
        print_plans([Job(["plan=true"], config, RunDir(tmp_path / "run"))], ())
    assert capsys.readouterr().out == ""


def test_reference_of_settings_is_current():
    assert (FOLDER / "config.md").read_text() == markdown(), "run python -m training.config.reference"
    assert (FOLDER / "config.schema.json").read_text() == json_schema(), "run python -m training.config.reference"


def test_every_setting_has_a_meaning():
    for key, field in fields_of(Config):
        assert field.description, f"{key} has no docstring"


def test_every_option_of_a_group_has_a_meaning():
    for group in default_options():
        files = sorted((CONFIGS / group).glob("*.yaml"))
        assert files, f"the group {group} has no options"
        for file in files:
            assert first_comment(file), f"{file} does not begin with a comment"


def test_prepared_tokens_are_used_from_a_cache_that_cannot_be_written(tmp_path):
    cache, corpus = tmp_path / "cache", corpus_of(write_lines(tmp_path / "text.jsonl", 40))
    cache.mkdir()
    with read_only(cache), pytest.raises(ConfigError, match=rf"^paths\.cache={cache} cannot be written"):
        check_cache(corpus, str(cache))
    prepared = prepare(corpus, cache, 16)
    with read_only(cache):
        check_cache(corpus, str(cache))
        assert prepare(corpus, cache, 16).fingerprint == prepared.fingerprint


def test_tasks_during_training_without_lm_eval_are_a_mistake(tiny, tmp_path, monkeypatch):
    """`make train` does not install it."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    overrides = (*tiny, "trainer.eval_every=10")
    problem = "needs lm-eval, which is not installed: run `make setup`"
    with pytest.raises(ConfigError, match=rf"trainer\.eval_every=10 {problem}"):
        check(compose_config(*overrides), tmp_path / "run")
