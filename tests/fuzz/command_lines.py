"""Command lines with a change in them, for the programs of the project."""

import json
import random
import shutil
from pathlib import Path

from tests.fuzz.attempts import Refused, run_program
from tests.fuzz.mutations import VALUES

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


def run_command_line(folder: Path, bases: Path, rng: random.Random) -> str:
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
