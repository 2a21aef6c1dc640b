"""The commands and the Python code of the documents run as they are written, on small input.

Commands are the lines of `sh` blocks, and what is spelled out as a command in a text, a docstring or a comment. A fast
test parses each as its program does: settings are composed and checked. In a slow one, the commands of a document run
in their order in one folder, which has the files that they name. Overrides are added that make runs short. Sweeps and
runs on GPUs are planned (`plan=true`). `HUB` lists what needs the Hugging Face hub.
"""

import ast
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import pytest
import torch
import zstandard
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.run import get_args_parser as torchrun_parser

from common.console import make_console
from common.settings import Values, parse
from common.text import overrides_dict
from experiments.labs.declaration import LABS
from experiments.run.summary import table
from experiments.suites import SUITES
from models.hugging_face import export
from tests.helpers import CHECKOUT, TINY, compose_config, copy_run, make
from tests.process_pool import run, run_ranks
from tests.scripts.loading import load_script
from training.checkpoint.load import RunCheckpoint
from training.config.checks import check, check_batch
from training.config.identity import run_path
from training.launch.cli import options_first
from zclip import ClippingStrategy
from zclip.replay import main as replay

DOCUMENTS = sorted([*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md")])
#: Files whose docstrings and comments name commands.
SOURCES = sorted(
    path
    for pattern in ("*.py", "Makefile", "scripts/**/*", "configs/**/*", "[a-z]*/**/*.py", "experiments/results/**/*.md")
    for path in CHECKOUT.glob(pattern)
    if path.is_file() and path.suffix != ".pyc" and not {"tests", "mutants"} & {*path.relative_to(CHECKOUT).parts}
)
#: How a command begins.
COMMAND = re.compile(
    r"(\.venv/bin/)?python3? |make [a-z]|train\.py [a-z-]+=|sbatch |torchrun |srun |scancel |pip install|wandb "
)
#: Commands of which only the configuration is composed: their data are on the hub.
HUB = ("data=smollm", "eval.tasks=[arc_easy,piqa]")
#: Programs that read the runs of the paper's experiments.
READ_PAPER_RUNS = {"scripts/make_tables.py", "scripts/make_figures.py", "scripts/make_report.py"}
#: Programs that download for minutes: their settings are parsed, and tests/scripts/ runs what can be.
DOWNLOADS = {"scripts/gpu_carry.py"}
#: Targets of make that run no program of the checkout on the reader's files.
OTHER_TARGETS = {"test", "test-all", "lint", "format", "setup", "slurm", "mutants", "faults", "fuzz", "reference"}
OTHER_TARGETS |= {"docs", "wheel", "help", "help-all", "gpu-carry"}
#: Commands of other programs than ours.
OTHER_PROGRAMS = ("pip install ", "docker ", "apptainer ", "wandb login", "wandb sync", "scancel --signal=USR1")
GPU = ("trainer=fsdp", "trainer=hsdp", "trainer=ddp", "trainer=gpu", "scale=proxy", "scale=proxy_short")
#: What is written instead of `...` in code.
FILLED = {"TrainingArguments(...,": "TrainingArguments(output_dir='out',", "Trainer(..., args": "Trainer(model, args"}
#: What is written instead of words in capitals, which stand for the reader's own.
PLACEHOLDERS = {
    "run=...": "run=runs/main/NAME", "FILE": "runs/main/NAME/metrics.jsonl", "step=N": "step=8",
    "path=FILES": "path=texts", "metrics.jsonl": "runs/main/NAME/metrics.jsonl",
    "trainer.devices=N": "trainer.devices=1",
    "data.path=FOLDER": "data.path=texts", "data.tokenizer=FOLDER": "data.tokenizer=my-tokenizer",
    "published=FOLDER": "published=texts",
}  # fmt: skip


def blocks(document: Path, language: str) -> list[str]:
    """Return the code blocks of a document in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.M | re.S)


def is_variable(word: str) -> bool:
    """Whether a word before a command sets an environment variable, as `WANDB_MODE=offline`."""
    return re.fullmatch(r"[A-Z][A-Z_]*=.*", word) is not None


def variables(words: Sequence[str]) -> dict[str, str]:
    """Return the environment variables that are set before a command."""
    return dict(word.split("=", 1) for word in itertools.takewhile(is_variable, words))


def commands(document: Path) -> list[list[str]]:
    """Return the words of each command in the code blocks of a document."""
    lines = "\n".join(blocks(document, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def spelled_commands(file: Path) -> Iterator[list[str]]:
    """Yield the words of each command in the sentences of a document, or in the docstrings and comments of a file."""
    text = file.read_text()
    if file.suffix == ".md":
        text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    quoted = r"`([^`]+)`" if file.suffix == ".md" else r"`([^`\n]+)`"
    spans = [" ".join(span.split()) for span in re.findall(quoted, text)]
    if file.suffix == ".py":
        docstrings = [
            ast.get_docstring(node) or ""
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        ]
        lines = "\n".join(docstrings).replace("\\\n", " ").splitlines()
        spans += [line.strip() for line in lines if line.startswith("    ")]
    elif file.suffix != ".md":
        spans += [line.strip().lstrip("# ") for line in text.splitlines() if line.lstrip().startswith("#")]
    for span in spans:
        if COMMAND.match(span):
            for command in span.split(" && "):
                yield list(filled(shlex.split(command)))


def filled(words: Sequence[str]) -> Iterator[str]:
    """Yield the words of a command with all that is optional (`[word]`), and without those that stand for any."""
    for word in words:
        if re.fullmatch(r"\[[a-z._]+=.*\]|\[[a-z]\S*\]", word):
            word = word[1:-1]
        if "KEY=" in word or word in ("...", "...]", "JOB", "OVERRIDE"):
            continue
        yield PLACEHOLDERS.get(word, word)


def programs(words: Sequence[str]) -> Iterator[list[str]]:
    """Yield the programs of the checkout that a command runs, each with its arguments."""
    words = [*itertools.dropwhile(is_variable, words)]
    if words[0] == "make":
        listing = make("--dry-run", *words[1:])
        found = [shlex.split(line)[1:] for line in listing.splitlines() if "/python " in line]
        found = [program for program in found if program[0] == "train.py" or program[0].startswith("scripts/")]
        assert found or {*words[1:]} & OTHER_TARGETS, listing
        yield from found
    elif any(word.endswith("train.sbatch") for word in words):
        (start,) = (i for i, word in enumerate(words) if word.endswith("train.sbatch"))
        yield ["train.py", *words[start + 1 :]]
    elif words[0] == "torchrun":
        settings = [word for word in words[words.index("train.py") + 1 :] if word != "..."]
        yield ["train.py", *settings, *(["plan=true"] if "..." in words else [])]
    elif words[0] == "train.py":
        yield list(words)
    elif not any(shlex.join(words).startswith(command) for command in OTHER_PROGRAMS):
        assert words[0] in ("python", ".venv/bin/python"), f"which test runs {shlex.join(words)}?"
        yield list(words[1:])


def shortened(program: str, arguments: list[str], data: dict[str, Path]) -> list[str]:
    """Return the arguments with overrides that make the program end after seconds."""
    given = {argument.partition("=")[0] for argument in arguments}
    if program == "train.py":
        if "-m" in arguments:
            arguments = ["seed=0" if argument == "seed=0,1,2" else argument for argument in arguments]
        if "resume" in given or "--cfg" in given or "plan" in given:
            return arguments
        if "-m" in arguments or any(argument in GPU for argument in arguments):
            return [*arguments, "plan=true"]
        added = [a for a in TINY if not a.startswith("trainer.max_steps")]
        forks = any("/NAME@250" in argument for argument in arguments)  # the run of the fixture, which has a step 8
        arguments = [argument.replace("/NAME@250", "/NAME@8") for argument in arguments]
        added += [f"trainer.max_steps={12 if forks else 4}", f"paths.cache={data['cache']}"]
        added += [f"data.path={data['corpus']}"] if not {"data", "data.path"} & given else []
        added += ["eval.limit=4", f"eval.data_dir={data['sets']}"]
        added += [] if forks else ["model.max_position_embeddings=128"]
        fixed = {"clip.warmup_steps", *(("model",) if "model" in given else ())}
    elif program == "scripts/evaluate.py":
        arguments = [argument for argument in arguments if not argument.startswith("eval.limit=")]
        given -= {"eval.limit", "eval"}
        added, fixed = ["eval.limit=4", f"eval.data_dir={data['sets']}"], set()
    elif program == "scripts/gpu_check.py":
        added, fixed = ["dry_run=true", "only=environment"], set()
    else:
        return arguments
    keys = given | fixed
    return arguments + [a for a in added if not {a.partition("=")[0], a.partition(".")[0]} & keys]


@pytest.fixture
def files(finished_run: Path, corpus: Path, tmp_path: Path) -> Path:
    """A reader's folder with the texts and runs that the documents name."""
    copy_run(finished_run, tmp_path).rename(tmp_path / "runs" / "main" / "NAME")
    copy_run(finished_run, tmp_path / "paper").rename(tmp_path / "runs" / "paper-micro")
    (tmp_path / "runs" / "first-look").mkdir()
    for name in ("A", "B"):
        copy_run(finished_run, tmp_path / name).rename(tmp_path / "runs" / "first-look" / name)
    (tmp_path / "texts").mkdir()
    rows = [{"text": file.read_text()[:20_000]} for file in sorted(corpus.glob("*.txt"))]
    datasets.Dataset.from_list(rows).to_json(tmp_path / "texts" / "speeches.jsonl.xz", compression="xz")
    return tmp_path


@pytest.fixture
def reader(files: Path, corpus: Path, cache: Path, sets: Path) -> tuple[Path, dict[str, Path]]:
    """The folder of `files`, and where the tests' data are."""
    return files, {"corpus": corpus, "cache": cache, "sets": sets}


class Parsed(Exception):
    """Ends a script after its settings are parsed."""


def parse_settings(program: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the command line of a script as it does; raise what it would report."""

    def parse_only(section, values):
        parse(section, values)
        raise Parsed

    module = load_script(Path(program).stem)
    settings = [argument for argument in options_first(arguments) if not argument.startswith("-")]
    (name,) = re.findall(r"_entry\.run\(main(?:, \"(\S+)\")?\)", (CHECKOUT / program).read_text())
    if name:
        file = CHECKOUT / "configs" / name
        with initialize_config_dir(str(file.parent), version_base="1.3"):
            composed = compose(file.name, overrides=settings)
    else:
        composed = OmegaConf.from_cli(settings)
    values = Values(OmegaConf.to_container(composed, resolve=True), overrides_dict(settings))
    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(module, "parse", parse_only)
        module.main(values)


def check_training(arguments: Sequence[str]) -> None:
    """Compose and check the configuration of train.py, of a sweep the one with the first value of each setting."""
    options = get_args_parser().parse_args(options_first(arguments))
    overrides = options.overrides
    if options.multirun:
        suites = {suite for o in overrides if o.startswith("experiment=") for suite in o[11:].strip("[]").split(",")}
        assert suites <= {*SUITES, *LABS, "first_look"}, arguments
        if declared := suites & {*SUITES}:
            base = f"experiment={SUITES[declared.pop()].base}"
            overrides = [base if override.startswith("experiment=") else override for override in overrides]
        overrides = [re.sub(r"=([^,\[]*),.*", r"=\1", override) for override in overrides]
    planned = "plan=true" in overrides
    if not planned and ("hydra/launcher=slurm" in overrides or any(argument in GPU for argument in arguments)):
        check_batch(compose_config(*overrides).trainer)
        overrides = [*overrides, "plan=true"]
    config = compose_config(*overrides)
    if config.fork_from and not planned:
        assert int(config.fork_from.rpartition("@")[2]) < config.trainer.max_steps, "no step is left after the fork"
    if not (options.cfg or config.resume or any(hub in arguments for hub in HUB)):
        check(config, run_path(config))


def check_command(words: Sequence[str], checked: set[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command as its programs do, without running them, unless it is among the checked ones."""
    if words[0] == "torchrun":
        torchrun_parser().parse_args([word for word in words[1:] if word != "..."])
    for program, *arguments in programs(words):
        if (program, *arguments) in checked:
            continue
        checked.add((program, *arguments))
        if program == "train.py":
            check_training(arguments)
        elif program == "-m" and arguments[:2] == ["zclip", "replay"]:
            assert replay([*(a for a in arguments[1:] if not a.startswith("out=")), "out=none"]) == 0, words
        elif program == "-m":
            assert importlib.util.find_spec(arguments[0]), words
        elif program == "scripts/bench_worker.py" or program.startswith(
            ("docs/", "examples/")
        ):  # they take no settings
            assert (CHECKOUT / program).is_file()
        else:
            parse_settings(program, arguments, monkeypatch)


WITH_COMMANDS = pytest.mark.parametrize("document", [d for d in DOCUMENTS if commands(d)], ids=lambda d: d.name)


def test_every_command_is_accepted_by_its_program(files, monkeypatch):
    """Each is of a known program, whose settings can be composed and checked."""
    monkeypatch.chdir(files)
    shutil.copytree(files / "runs" / "main" / "NAME" / "tokenizer", files / "my-tokenizer")
    checkpoint = RunCheckpoint(files / "runs" / "main" / "NAME", None, print)
    export(checkpoint.model_state(), checkpoint.config, files / "my-model", 0)
    shutil.copytree(files / "my-tokenizer", files / "my-model", dirs_exist_ok=True)
    shutil.copytree(files / "runs" / "main" / "NAME", files / "runs" / "main" / "my-run")
    found = [(d, words) for d in DOCUMENTS for words in commands(d)]
    found += [(file, words) for file in [*DOCUMENTS, *SOURCES] for words in spelled_commands(file)]
    assert len(found) > 60
    checked: set[tuple[str, ...]] = set()
    for words in dict.fromkeys(tuple(words) for _, words in found):
        try:
            with monkeypatch.context() as patch:
                for name, value in variables(words).items():
                    patch.setenv(name, value)
                check_command(words, checked, monkeypatch)
        except Exception as error:
            where = {str(file.relative_to(CHECKOUT)) for file, other in found if tuple(other) == words}
            raise AssertionError(f"{', '.join(sorted(where))}: {shlex.join(words)}") from error


@pytest.mark.slow
@WITH_COMMANDS
def test_commands_of_document_run(document, reader):
    folder, data = reader
    without_runs = set()
    for words in commands(document):
        for program, *arguments in programs(words):
            if program in DOWNLOADS or any(hub in word for word in arguments for hub in HUB):
                continue
            if program in without_runs:
                continue
            arguments = shortened(program, arguments, data)
            (*_, devices) = (1, *(int(a.partition("=")[2]) for a in arguments if a.startswith("trainer.devices=")))
            if program == "-m":
                command, env = [sys.executable, program, *arguments], {**os.environ, "PYTHONPATH": str(CHECKOUT)}
                done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
            elif devices > 1:
                done = run_ranks(program, *arguments, processes=devices, cwd=folder)
            else:
                done = run(program, *arguments, cwd=folder, env=variables(words))
            if program in READ_PAPER_RUNS and "has no finished run of scale=micro" in done.stderr:
                without_runs.add(program)  # the sweeps that train them were planned only
                continue
            assert done.returncode == 0, f"{shlex.join(words)}: {done.stdout[-1000:]}{done.stderr}"


class Loss(nn.Module):
    """A model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch).square().mean()


def detach_all(names: dict[str, object]) -> None:
    """Detach all strategies among the names of a document's code."""
    for value in names.values():
        if isinstance(value, ClippingStrategy):
            value.detach()


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if "zclip" in "".join(blocks(d, "python"))], ids=lambda d: d.name
)
def test_code_of_document_runs(document, tmp_path, monkeypatch):
    """The blocks share their names, and find a model, an optimizer, batches and the libraries' modules.

    Each block is a way of its own to clip: a strategy that an earlier one has attached is detached.
    """
    import accelerate
    import lightning
    import transformers

    monkeypatch.chdir(tmp_path)
    model = Loss()
    names = {
        "__name__": "document",
        "torch": torch, "lightning": lightning, "transformers": transformers, "accelerator": accelerate.Accelerator(),
        "model": model, "optimizer": torch.optim.AdamW(model.parameters()), "batches": torch.randn(30, 8, 4),
    }  # fmt: skip
    for block in blocks(document, "python"):
        for placeholder, value in FILLED.items():
            block = block.replace(placeholder, value)
        detach_all(names)
        names["loss"] = model(torch.randn(8, 4))
        exec(compile(block, document.name, "exec"), names)  # what the reader would run
    strategies = [value for value in names.values() if isinstance(value, ClippingStrategy)]
    written = [
        value for value in names.values()
        if isinstance(value, type) and issubclass(value, ClippingStrategy) and value.__module__ == "document"
    ]  # fmt: skip
    detach_all(names)
    for strategy in [*strategies, *(strategy_class() for strategy_class in written)]:
        names["optimizer"].zero_grad()
        model(torch.randn(8, 4)).backward()
        assert strategy.step(model, optimizer=names["optimizer"]) > 0, strategy
        assert strategy.read_telemetry()["grad_norm"] > 0, strategy


def test_yaml_of_document_is_a_configuration(tmp_path, corpus):
    """`data=mine` of the page on texts, with its files."""
    (block,) = blocks(CHECKOUT / "docs" / "how-to" / "text-and-tokens.md", "yaml")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(block)
    texts = tmp_path / "texts"
    (texts / "books").mkdir(parents=True)
    rows = [{"text": file.read_text()} for file in sorted(corpus.glob("*.txt"))]
    datasets.Dataset.from_list(rows[::2]).to_parquet(texts / "books" / "a.parquet")
    lines = "".join(json.dumps({"body": row["text"]}) + "\n" for row in rows[1::2])
    (texts / "notes.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    done = run("train.py", f"--config-dir={tmp_path}", "data=mine", *TINY, "trainer.max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_result_in_the_tutorial_is_printed_as_a_run_prints_it(capsys):
    shares = {"data": 0.2, "forward_backward": 98.2, "clip": 0.8, "optimizer": 0.8}
    result = {
        "test_loss": 5.3627, "test_tokens": 128_000, "test_bits_per_byte": 1.798, "unigram_entropy": 6.523, "spikes": 0,
        "spike_definition": "5 robust sigma over the last 50 steps", "clipped_share": 0.037, "steps": 300,
        "clipped_by_z": 1, "tokens_per_second": 7536.0, "parameters": 3.34e6, "saving_seconds": 0.25,
        "step_seconds": {phase: 0.00272 * share for phase, share in shares.items()}, "peak_memory_gib": 1.0,
    }  # fmt: skip
    make_console(width=80).print(table(result, title="result"), soft_wrap=False)
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert printed in (CHECKOUT / "docs" / "tutorials" / "first-run.md").read_text()
