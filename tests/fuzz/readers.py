"""Every reader of the project: what it is given, and how what it accepts is then used, as the programs do."""

import contextlib
import csv
import io
import json
import os
import random
import runpy
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from common.console import make_console
from common.errors import RunError, UserError
from common.settings import parse
from data import ShuffledDataset, TokenDataset, Tokens, load_tokenizer, open_tokens, prepare, unigram_entropy
from data.prepare import PART_TOKENS
from data.tokenizer import tokenizer_identity
from evaluation.response_cache import ResponseCache
from evaluation.scores import Scores, score_key
from evaluation.table import print_scores
from experiments.paper.collect import ExpectedRun, Key, collect
from experiments.paper.render import as_csv, fill_table, latex, markdown
from experiments.paper.tables_and_figures import STRATEGIES as SPECS
from experiments.paper.tables_and_figures import TABLES
from experiments.run.plot import draw_run
from experiments.run.read import read_run
from experiments.run.summary import summarise, table
from models.hugging_face import check_weights, config_of, load
from models.llama import Llama
from tests.fuzz.bases import STRATEGIES, corpus_of, take_steps
from tests.fuzz.mutations import VALUES, Mutator, digest_of, plant_module
from tests.helpers import CHECKOUT
from tests.scripts.loading import load_script
from training.checkpoint.format import fingerprint, is_valid, load_full, load_model_state, saved_config
from training.checkpoint.load import RunCheckpoint
from training.checkpoint.resume import prepare_start
from training.checkpoint.saved_config import check_same_run, config_of_run
from training.config.compose import read_config, saved_identity
from training.launch.cli import CANNOT_WRITE
from training.run_dir import RunDir
from zclip.replay import main as replay

RUN = Path("runs", "main", "run")
RUN_FILES = ("config.yaml", "environment.json", "metrics.jsonl", "val_metrics.jsonl", "result.json", "rewinds.json",
             "job.json", "task_scores.json", "failure.txt")  # fmt: skip
#: Longest sentence that a reader of files may answer with; a command line may be as long as it likes.
LONGEST_SENTENCE = 2500


class Refused(Exception):
    """A program has refused its input with a sentence on stderr."""


class Outcome(str):
    """`accepted`, `refused`, or what failed."""

    @property
    def failed(self) -> bool:
        """Whether the reader neither accepted nor refused its input."""
        return self not in ("accepted", "refused")


@dataclass(frozen=True)
class Attempt:
    """What became of one input: its outcome, what was changed, and the sentence or the traceback."""

    outcome: Outcome
    change: str
    detail: str


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
        read: called with the folder of the changed files, the folder of the bases, and a generator.
        base: folder of the bases that is copied; empty if the reader has no files.
        files: patterns of the files that are changed.
        made: files that the reader makes.
        refusals: errors that are a sentence for the user.
        share: inputs, relative to other readers.
        in_process: whether it can be called in a process that goes on; programs can not.
    """

    read: Callable[[Path, Path, random.Random], object]
    base: str = ""
    files: Sequence[str] = ("**/*",)
    made: Sequence[str] = ()
    refusals: tuple[type[Exception], ...] = (UserError, RunError)
    share: float = 1.0
    in_process: bool = True


def attempt(reader: Reader, bases: Path, folder: Path, seed: str, number: int) -> Attempt:
    """Change a copy of a reader's base in `folder`, which must not exist, and let the reader read and use it.

    The input with the number 0 is not changed, and must be accepted.
    """
    rng = random.Random(f"{seed} {number}")
    work, outside = folder / "work" / "reader", folder / "outside"
    outside.mkdir(parents=True)
    (outside / "precious.txt").write_text("precious\n" * 10)
    change = ""
    if reader.base:
        base = bases / reader.base
        if reader.base == "texts":
            base = rng.choice(sorted(base.iterdir()))
            work /= base.name
        shutil.copytree(base, work)
        files = sorted({file for pattern in reader.files for file in work.glob(pattern)})
        made = [work / name for name in reader.made]
        change = Mutator(rng, outside).mutate(work, files, made) if number else ""
    else:
        work.mkdir(parents=True)
    plant_module(work, outside / "executed")
    before = digest_of(outside)
    sys.path.insert(0, str(work))
    try:
        attempted = _attempt(reader, work, bases, rng, change)
    finally:
        sys.path.remove(str(work))
        sys.modules.pop("planted_module", None)
    if digest_of(outside) != before:
        names = ", ".join(sorted(path.name for path in outside.iterdir()))
        outcome = "code was executed" if (outside / "executed").exists() else "a file outside was written"
        return Attempt(Outcome(outcome), change, f"{names}\n{attempted.detail}")
    if reader.base and not number and attempted.outcome != "accepted":
        return Attempt(Outcome(f"{attempted.outcome}, though unchanged"), change, attempted.detail)
    return attempted


def _attempt(reader: Reader, work: Path, bases: Path, rng: random.Random, change: str) -> Attempt:
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), np.errstate(all="ignore"):
            more = reader.read(work, bases, rng)
    except (*reader.refusals, Refused) as error:
        sentence = str(error)
        if not sentence.strip():
            return Attempt(Outcome("no sentence"), change, traceback.format_exc())
        if reader.base and len(sentence) > LONGEST_SENTENCE:
            return Attempt(Outcome("a long sentence"), change, f"{len(sentence)} characters: {sentence[:500]}")
        return Attempt(Outcome("refused"), change, sentence)
    except OSError as error:
        if error.errno in CANNOT_WRITE and UserError in reader.refusals:  # the programs report it in a sentence
            return Attempt(Outcome("refused"), change, str(error))
        return Attempt(Outcome(type(error).__name__), change, traceback.format_exc())
    except BaseException as error:
        return Attempt(Outcome(type(error).__name__), change, traceback.format_exc()[-6000:])
    if "\x1b" in output.getvalue():
        return Attempt(Outcome("a command to the terminal"), change, repr(output.getvalue()))
    return Attempt(Outcome("accepted"), change, f"{more or ''}\n{output.getvalue()[-2000:]}")


def run_program(program: str, *arguments: str, cwd: Path) -> None:
    """Run a program of the checkout in this process, which is to end afterwards; raise `Refused` for status 2 and 3."""
    os.chdir(cwd)
    sys.argv = [str(CHECKOUT / program), *arguments]
    sys.path.insert(0, str(CHECKOUT / Path(program).parent))
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    print(out.getvalue())
    if "Traceback" in err.getvalue() or status not in (0, 2, 3):
        raise AssertionError(f"status {status}: {err.getvalue()[-6000:]}")
    if status:
        raise Refused(err.getvalue().strip())
    if "\x1b" in err.getvalue():
        raise AssertionError(repr(err.getvalue()))


# Run folders.


def _status(folder: Path, bases: Path, rng: random.Random) -> None:
    with_queue(folder)
    run_program("scripts/status.py", "folder=runs/main", cwd=folder)


def with_queue(folder: Path) -> None:
    """Let `squeue` be a program that lists one job."""
    squeue = folder / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho 123 RUNNING\n")
    squeue.chmod(0o755)
    os.environ["PATH"] = f"{squeue.parent}{os.pathsep}{os.environ['PATH']}"


def _resume(folder: Path, bases: Path, rng: random.Random) -> None:
    run_program("train.py", f"resume={RUN}", cwd=folder)


def _same_command(folder: Path, bases: Path, rng: random.Random) -> None:
    command = json.loads((bases / "stopped" / RUN / "environment.json").read_text())["starts"][-1]["command"]
    run_program("train.py", *command[1:], cwd=folder)


def _fork(folder: Path, bases: Path, rng: random.Random) -> None:
    command = json.loads((bases / "stopped" / RUN / "environment.json").read_text())["starts"][-1]["command"]
    others = [word for word in command[1:] if not word.startswith("name=")]
    run_program("train.py", *others, "name=forked", f"fork_from={RUN}@16", "lr=1e-4", cwd=folder)


def _export(folder: Path, bases: Path, rng: random.Random) -> None:
    run_program("scripts/export_hf.py", f"run={RUN}", "out=out", cwd=folder)
    config = config_of(folder / "out")
    model = Llama(config)
    load(model, folder / "out")


def _run_dir(folder: Path, bases: Path, rng: random.Random) -> None:
    run_dir, config, tokens = RunDir(folder / RUN), *_whole(bases)
    config_of_run(run_dir)
    check_same_run(run_dir, config)
    run_dir.read_result()
    run_dir.data_folder(), run_dir.slurm_job(), run_dir.failure_reason(), run_dir.max_steps()
    with run_dir.acquire(config, tokens):
        start = prepare_start(run_dir, None, print)
        assert start.step in (0, 8, 16)
        json.dumps(run_dir.metrics_rows(), allow_nan=False)
        json.dumps(run_dir.val_metrics(), allow_nan=False)
        run_dir.write_rewinds([])
        run_dir.write_slurm_job("5")


@cache
def _whole(bases: Path) -> tuple[Any, Tokens]:
    """Return the configuration and the tokens of the run that the bases are copies of."""
    config = read_config(bases / "finished" / RUN / "config.yaml")
    name = RunDir(bases / "finished" / RUN).data_folder()
    assert name is not None
    return config, open_tokens(Path(config.paths.cache, name))


def _read_run(folder: Path, bases: Path, rng: random.Random) -> None:
    run = read_run(folder / RUN)
    run.environment, run.score("hellaswag")
    summary = summarise(run)
    json.dumps(summary, allow_nan=True)
    if run.result:
        make_console().print(table(run.result, "result"))
    if rng.random() < 0.3:
        draw_run(run)


def _tables(folder: Path, bases: Path, rng: random.Random) -> None:
    collection = collect(_expected(bases, folder), saved_identity)
    filled = fill_table(TABLES["table3"], collection)
    texts = {"md": markdown(filled), "tex": latex(filled), "csv": as_csv(filled)}
    assert "\\input{" not in texts["tex"] and "\\write18" not in texts["tex"], texts["tex"]
    assert "<script>" not in texts["md"] and "\x1b" not in "".join(texts.values()), texts["md"]
    assert all(len(line.replace(r"\|", "").split("|")) > 2 for line in texts["md"].splitlines() if line.startswith("|"))
    list(csv.reader(texts["csv"].splitlines(), strict=True))
    "".join(texts.values()).encode()
    console = make_console()
    for warning in collection.warnings:
        console.print(warning)
    if rng.random() < 0.2:
        import experiments.paper.report as reports
        from experiments.paper.claims import judge_claims

        verdicts = judge_claims(collection)
        page = reports.report(collection, verdicts, [TABLES["table3"]], {}, [], "micro", [], "made")
        page += reports.verdicts_markdown(collection, verdicts, "micro")
        assert "<script>planted" not in page
        page.encode()


@cache
def _expected_runs(bases: Path) -> dict[Key, tuple[Path, Any]]:
    folders = (bases / "tables").glob("runs/paper-micro/*/config.yaml")
    configs = {file.parent.name: yaml.safe_load(file.read_text()) for file in folders}
    return {
        (spec, seed): (Path("runs", "paper-micro", name), saved_identity(config))
        for name, config in configs.items()
        for spec in SPECS.values()
        for seed in (0, 1)
        if config["seed"] == seed and config["clip"]["name"] == spec.clip
    }


def _expected(bases: Path, folder: Path) -> dict[Key, ExpectedRun]:
    return {key: ExpectedRun(folder / path, identity) for key, (path, identity) in _expected_runs(bases).items()}


def _scores(folder: Path, bases: Path, rng: random.Random) -> None:
    scores = Scores(folder / "task_scores.json")
    scores.find(score_key("hellaswag", 0, 100, 0, 24, "float32"))
    print_scores([{"run": "run", **score} for score in scores.all], make_console())
    print_scores([{"run": str(i), **score} for i, score in enumerate(scores.all)], make_console())
    cached = ResponseCache(scores.response_cache_path(24, "float32"), "m")
    for response in cached.responses.values():
        assert isinstance(response, str | float | tuple), response
    cached.add({"d" * 32: 1.0})
    scores.remove_after(30)
    scores.remove_after(8)
    scores.add(score_key("hellaswag", 0, 100, 0, 24, "float32"), {"items": 5, "acc": 0.1})


# Checkpoints.


def _checkpoint(folder: Path, bases: Path, rng: random.Random) -> None:
    path = folder / RUN / "checkpoints" / "step-00000016.ckpt"
    saved_config(path)
    checkpoint = RunCheckpoint(folder / RUN, 16, print)
    assert is_valid(path)
    fingerprint(path)
    load_evaluated(folder / RUN)
    checkpoint.tokenizer()
    state = load_model_state(path)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    load_full(path)


@cache
def evaluate_config() -> dict[str, Any]:
    """Return the settings of scripts/evaluate.py."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
        return OmegaConf.to_container(compose("evaluate", []), resolve=True)  # type: ignore[return-value]


def load_evaluated(run: Path) -> None:
    """Load the model of a run as scripts/evaluate.py does."""
    evaluate = load_script("evaluate")
    settings = {**evaluate_config(), "run": str(run), "device": "cpu"}
    with contextlib.ExitStack() as stack:
        (model,) = evaluate.run_models(parse(evaluate.EvaluateConfig, settings), make_console(), [], stack)
        model.fingerprint()
        with evaluate.skip_failures(model.title, 1, make_console(), []):
            model.load()


# Models, tokenizers, tokens and texts.


def _model(folder: Path, bases: Path, rng: random.Random) -> None:
    config = config_of(folder)
    if config.parameters > 1e8:
        raise Refused("too large for this test")
    check_weights(folder, config)
    model = Llama(config)
    load(model, folder)
    model(torch.zeros((1, min(4, config.max_position_embeddings)), dtype=torch.long))


def _tokenizer(folder: Path, bases: Path, rng: random.Random) -> None:
    tokenizer_identity(str(folder))
    tokenizer = load_tokenizer(str(folder))
    (ids,) = tokenizer.encode(["Fellow citizens: 東京 <|endoftext|> \x00"])
    assert ids[-1] == tokenizer.end and ids.max() < tokenizer.size, (ids, tokenizer.end, tokenizer.size)
    tokenizer.tokenizer.decode(ids.tolist())
    (folder / "saved").mkdir()
    tokenizer.save(folder / "saved")
    assert load_tokenizer(str(folder / "saved")).encode(["a b"])[0].tolist() == tokenizer.encode(["a b"])[0].tolist()


def _open_tokens(folder: Path, bases: Path, rng: random.Random) -> None:
    tokens = open_tokens(folder, rng.choice((None, False)))
    use_tokens(tokens)


def use_tokens(tokens: Tokens) -> None:
    """Read tokens as training and the evaluation do."""
    for array in (tokens.train, tokens.test):
        dataset = TokenDataset(array, 16)
        if len(dataset):
            batch = ShuffledDataset(dataset, 0).take(0, min(4, len(dataset)))
            assert not batch.is_floating_point()
            assert int(batch.to(torch.int64).max()) < tokens.facts["vocab_size"], "a token outside the vocabulary"
    read = tokens.test.read(1, min(200, len(tokens.test)))
    unigram_entropy(read)
    assert tokens.held_out_bytes(1, min(200, len(tokens.test))) >= 0
    load_tokenizer(str(tokens.folder))


def _prepared(folder: Path, bases: Path, rng: random.Random) -> None:
    corpus = corpus_of(bases / "texts" / "-jsonl")
    cache = folder / "cache"
    cache.mkdir()
    target = corpus.folder(cache)
    target.mkdir()
    for file in [*folder.iterdir()]:
        if file.name not in ("cache", "planted_module.py"):
            file.rename(target / file.name)
    corpus.check(cache, 16)
    use_tokens(prepare(corpus, cache, 16, make_console(), 300 if rng.random() < 0.5 else PART_TOKENS))


def _texts(folder: Path, bases: Path, rng: random.Random) -> None:
    cache = folder.parent / "cache"
    (folder / "planted_module.py").unlink()
    corpus = corpus_of(folder)
    corpus.check(cache, 16)
    corpus.estimated_bytes()
    use_tokens(prepare(corpus, cache, 16, make_console()))


# The clipper.


def _state(folder: Path, bases: Path, rng: random.Random) -> None:
    def is_changed(file: Path) -> bool:
        return not file.is_file() or file.read_bytes() != (bases / "states" / file.name).read_bytes()

    changed = [name for name in STRATEGIES if is_changed(folder / f"{name}.pt")]
    name = rng.choice(changed or list(STRATEGIES))
    try:
        assert (folder / f"{name}.pt").is_file()
        state = torch.load(folder / f"{name}.pt", weights_only=True)
    except Exception as error:
        raise Refused("torch cannot load it") from error
    strategy = STRATEGIES[name]()
    strategy.load_state_dict(state)
    for _ in range(3):
        assert np.isfinite(take_steps(strategy, 2)), f"the norm after clipping is not finite: {strategy.telemetry}"
    assert all(not v.is_floating_point() or not v.isnan().any() for v in strategy.state.values()), strategy.state
    again = STRATEGIES[name]()
    again.load_state_dict(strategy.state_dict())


def _replay(folder: Path, bases: Path, rng: random.Random) -> None:
    clip = rng.choice(("zclip", "zclip", "fixed", "autoclip", "skip_step", "none"))
    for file in sorted(folder.glob("trace*")):
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            status = replay(
                ["replay", str(file), f"clip={clip}", f"out={rng.choice((*['none'] * 9, folder / 'a.png'))}"]
            )
        if status:
            raise Refused(err.getvalue())


# Command lines.

COMMANDS = (
    "clip=zclip", "lr=1e-3", "data.path=texts", "name=run-1", "resume=runs/main/run", "fork_from=runs/main/run@16",
    "trainer.devices=2", "+x=1", "~clip", "clip.alpha=0.9", "data.corruption.steps=[1,2]", "model=hf", "model=nano",
    "model.init_from=model", "experiment=table3", "hydra.verbose=true", "eval.tasks=[hellaswag,winogrande]", "seed=1",
    "paths.runs=runs", "data.sources.books={path: a, weight: 3}", "trainer.strategy=fsdp", "trainer.max_steps=10",
    "data.tokenizer=tokenizer", "clip._target_=zclip.ZClip", "hydra/launcher=local", "eval.num_fewshot=[0,5]",
    "data.name='a b'", "--cfg=job", "-m", "--config-dir=.", "data.mode=stream", "optim.betas=[0.9,0.95]",
    "trainer=fsdp", "hardware.memory_gib=80", "logger=wandb", "logger=jsonl", "model.qk_norm=true",
    "data.max_tokens=1e6",
)  # fmt: skip
#: What is put anywhere into an argument, and values that it gets instead.
PIECES = (
    "'", '"', "[", "]", "{", "}", "${", "${lr}", "${oc.env:HOME}", "${x}", ",", "=", ":", "\\", "\n", "\x1b[31m", "@",
    "|", "(", ")", " ", "~", "+", "++", "%", "#", "é", "\udc80", "null", "NaN", "1e999", "-", "/", "../", "*",
    "glob(*)", "choice(1,2)", "range(1,3)", "int(", "!!", "[[[[", "9" * 5000, "a" * 300, "[" * 2000, "???", "<b>",
)  # fmt: skip
SIMPLE = (
    "null",
    "true",
    "-1",
    "0",
    "1.5",
    "1e-3",
    "[]",
    "{}",
    "[null]",
    "1e30",
    "{a: 1}",
    "inf",
    "",
    "a",
    "2",
    "[1]",
    "1,2",
)
PROGRAMS = (
    *["train.py"] * 5, "scripts/evaluate.py", "scripts/export_hf.py", "scripts/status.py",
    "scripts/train_tokenizer.py", "scripts/make_tables.py", "scripts/prepare_data.py",
)  # fmt: skip


def _command_line(folder: Path, bases: Path, rng: random.Random) -> str:
    texts = [value for value in VALUES if isinstance(value, str) and "\x00" not in value and "\ud800" not in value]
    arguments = rng.sample(COMMANDS, rng.choice((1, 1, 2, 3)))
    position = rng.randrange(len(arguments))
    key, equals, value = arguments[position].partition("=")
    place = rng.randrange(len(value) + 1)
    arguments[position] = rng.choice((
        f"{key}={rng.choice(texts)[:1000]}", f"{key}={value[:place]}{rng.choice(PIECES)}{value[place:]}",
        f"{key}{rng.choice(PIECES)}{equals}{value}", f"{rng.choice(PIECES)}{key}{equals}{value}", f"{key}.x={value}",
        *[f"{key}={rng.choice(SIMPLE)}"] * 4, f"{key}{equals}{value}", f"{key.upper()}={value}", key,
        f"{key[:-1]}={value}", value,
    ))  # fmt: skip
    program = rng.choice(PROGRAMS)
    if program == "train.py":
        arguments.append(rng.choice(("print_run_dir=true", "plan=true")))
    if program in ("scripts/prepare_data.py", "scripts/train_tokenizer.py"):
        arguments.insert(0, "data.path=text")  # not all of the default text
    shutil.copytree(bases / "texts" / "-jsonl", folder / "text")
    shutil.copytree(bases / "tokenizer", folder / "tokenizer")
    shutil.copytree(bases / "model", folder / "model")
    shutil.copytree(bases / "stopped" / "runs", folder / "runs")
    called = json.dumps([program, *arguments])
    try:
        run_program(program, *arguments, cwd=folder)
    except Refused as error:
        raise Refused(str(error)) from None
    except BaseException as error:
        raise AssertionError(called) from error
    return called


#: Files that a run makes in its folder.
MADE = [
    str(RUN / name)
    for name in (".lock", "plots", "plots/run.png", "failure.txt", "result.json", ".task_scores.json.lock", "wandb",
                 "checkpoints/step-00000024.ckpt", "checkpoints/.saving-x-step-00000024.ckpt", "val_metrics.jsonl")
]  # fmt: skip
EVERYTHING = [str(RUN / "*"), str(RUN / "**/*")]
RECORDS = [str(RUN / name) for name in RUN_FILES]
CHECKPOINT = RUN / "checkpoints" / "step-00000016.ckpt"

READERS = {
    "status": Reader(_status, "finished", RECORDS, share=1.5, in_process=False),
    "run folder": Reader(_run_dir, "stopped", EVERYTHING, MADE, share=1.5),
    "run, read": Reader(
        _read_run, "finished", RECORDS, refusals=(UserError, RunError, ValueError, FileNotFoundError), share=1.5
    ),
    "tables": Reader(_tables, "tables", ["runs/paper-micro/*/*"], share=1.5),
    "scores": Reader(_scores, "scores", ["*", ".task*"], [".task_scores.json.lock"], share=1.5),
    "resume": Reader(_resume, "stopped", EVERYTHING, MADE, in_process=False),
    "same command": Reader(_same_command, "stopped", EVERYTHING, MADE, share=0.5, in_process=False),
    "fork": Reader(_fork, "stopped", EVERYTHING, share=0.5, in_process=False),
    "checkpoint": Reader(_checkpoint, "stopped", [str(CHECKPOINT)], share=2),
    "sharded checkpoint": Reader(
        _checkpoint, "sharded", [str(CHECKPOINT), str(CHECKPOINT / "*"), str(CHECKPOINT / ".metadata")], share=2
    ),
    "export": Reader(_export, "sharded", EVERYTHING, share=0.5, in_process=False),
    "model": Reader(_model, "model", share=1.5),
    "model with index": Reader(_model, "indexed"),
    "tokenizer": Reader(_tokenizer, "tokenizer", share=1.5),
    "tokens": Reader(_open_tokens, "tokens", share=1.5),
    "tokens, prepared": Reader(_prepared, "tokens"),
    "tokens, journal": Reader(_prepared, "journal"),
    "texts": Reader(_texts, "texts", share=3),
    "clipper state": Reader(_state, "states", refusals=(ValueError,), share=2),
    "replay": Reader(_replay, "traces", refusals=(), share=1.5),
    "command line": Reader(_command_line, share=3, in_process=False),
}
