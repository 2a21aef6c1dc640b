"""The commands and the Python code of README.md and docs/ run as they are written, on small input.

The commands of a document run in their order in one folder, which has the files that they name. Overrides are added
that make runs short. Sweeps and runs on GPUs are planned (`plan=true`). `HUB` lists what needs the Hugging Face hub.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import pytest
import torch
import zstandard
from hydra import compose, initialize_config_dir
from torch import nn

from experiments.paper.tables_and_figures import SUITES
from tests.helpers import CHECKOUT, TINY, compose_config, copy_run, make
from tests.process_pool import run, run_ranks
from zclip import ClippingStrategy

DOCUMENTS = sorted([CHECKOUT / "README.md", *(CHECKOUT / "docs").rglob("*.md")])
#: Commands of which only the configuration is composed: their data are on the hub.
HUB = ("data=smollm", "eval.tasks=[arc_easy,piqa]")
#: Programs that read the runs of the paper's experiments.
READ_PAPER_RUNS = {"scripts/make_tables.py", "scripts/make_figures.py", "scripts/make_report.py"}
#: Targets of make that run no program of the checkout on the reader's files.
OTHER_TARGETS = {"test", "test-all", "lint", "format"}
GPU = ("trainer=fsdp", "trainer=hsdp", "trainer=ddp", "trainer=gpu")
#: What is written instead of `...` in code.
FILLED = {"TrainingArguments(...,": "TrainingArguments(output_dir='out',", "Trainer(..., args": "Trainer(model, args"}


def blocks(document: Path, language: str) -> list[str]:
    """Return the code blocks of a document in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.M | re.S)


def commands(document: Path) -> list[list[str]]:
    """Return the words of each command in a document."""
    lines = "\n".join(blocks(document, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def programs(words: Sequence[str]) -> Iterator[list[str]]:
    """Yield the programs of the checkout that a command runs, each with its arguments."""
    if words[0] == "make":
        listing = make("--dry-run", *words[1:])
        found = [shlex.split(line)[1:] for line in listing.splitlines() if "/python " in line]
        found = [program for program in found if program[0] == "train.py" or program[0].startswith("scripts/")]
        assert found or {*words[1:]} <= OTHER_TARGETS, listing
        yield from found
    elif any(word.endswith("train.sbatch") for word in words):
        (start,) = (i for i, word in enumerate(words) if word.endswith("train.sbatch"))
        yield ["train.py", *words[start + 1 :], "plan=true"]
    elif words[0] == "torchrun":
        yield ["train.py", *(word for word in words[words.index("train.py") + 1 :] if word != "..."), "plan=true"]
    else:
        assert words[0] in ("python", ".venv/bin/python"), words
        yield list(words[1:])


def shortened(program: str, arguments: list[str], data: dict[str, Path]) -> list[str]:
    """Return the arguments with overrides that make the program end after seconds."""
    given = {argument.partition("=")[0] for argument in arguments}
    if program == "train.py":
        if "resume" in given or "--cfg" in given or "plan" in given:
            return arguments
        if "-m" in arguments or any(argument in GPU for argument in arguments):
            return [*("seed=0" if a == "seed=0,1,2" else a for a in arguments), "plan=true"]
        added = [a for a in TINY if not a.startswith("trainer.max_steps")]
        added += ["trainer.max_steps=4", f"paths.cache={data['cache']}"]
        added += [f"data.path={data['corpus']}"] if not {"data", "data.path"} & given else []
        added += ["eval.limit=4", f"eval.data_dir={data['sets']}", "model.max_position_embeddings=128"]
        fixed = {"clip.warmup_steps", *(("model",) if "model" in given else ())}
    elif program == "scripts/evaluate.py":
        arguments = [argument for argument in arguments if not argument.startswith("eval.limit=")]
        given -= {"eval.limit"}
        added, fixed = ["eval.limit=4", f"eval.data_dir={data['sets']}"], set()
    else:
        return arguments
    keys = given | fixed
    return arguments + [a for a in added if not {a.partition("=")[0], a.partition(".")[0]} & keys]


@pytest.fixture
def reader(finished_run: Path, corpus: Path, cache: Path, sets: Path, tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    """A reader's folder with the texts and runs that the documents name, and where the tests' data are."""
    copy_run(finished_run, tmp_path).rename(tmp_path / "runs" / "main" / "NAME")
    copy_run(finished_run, tmp_path / "paper").rename(tmp_path / "runs" / "paper-micro")
    (tmp_path / "texts").mkdir()
    rows = [{"text": file.read_text()[:20_000]} for file in sorted(corpus.glob("*.txt"))]
    datasets.Dataset.from_list(rows).to_json(tmp_path / "texts" / "speeches.jsonl.xz", compression="xz")
    return tmp_path, {"corpus": corpus, "cache": cache, "sets": sets}


WITH_COMMANDS = pytest.mark.parametrize("document", [d for d in DOCUMENTS if commands(d)], ids=lambda d: d.name)


@WITH_COMMANDS
def test_commands_of_document_name_programs_and_settings(document):
    """Each program exists; a configuration is composed of each command's overrides, with the first value of a sweep."""
    for words in commands(document):
        for program, *arguments in programs(words):
            overrides = [argument for argument in arguments if not argument.startswith("-") and argument != "zclip"]
            if "-m" in arguments:
                suites = {
                    suite for o in overrides if o.startswith("experiment=") for suite in o[11:].strip("[]").split(",")
                }
                assert suites <= {*SUITES}, words
                overrides = ["experiment=paper" if o.startswith("experiment=") else o for o in overrides]
                overrides = [re.sub(r"=([^,\[]*),.*", r"=\1", override) for override in overrides]
            try:
                if "model=hf" in arguments:
                    continue  # the folder does not exist
                if program == "train.py":
                    compose_config(*(o for o in overrides if o != "job"))
                elif program == "scripts/evaluate.py":
                    with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
                        compose("evaluate", overrides=overrides)
                else:
                    assert program == "-m" or (CHECKOUT / program).is_file(), program
            except Exception as error:
                raise AssertionError(shlex.join(words)) from error


@pytest.mark.slow
@WITH_COMMANDS
def test_commands_of_document_run(document, reader):
    folder, data = reader
    for words in commands(document):
        for program, *arguments in programs(words):
            if any(hub in word for word in arguments for hub in HUB):
                continue
            arguments = shortened(program, arguments, data)
            (*_, devices) = (1, *(int(a.partition("=")[2]) for a in arguments if a.startswith("trainer.devices=")))
            if program == "-m":
                command, env = [sys.executable, program, *arguments], {**os.environ, "PYTHONPATH": str(CHECKOUT)}
                done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
            elif devices > 1:
                done = run_ranks(program, *arguments, processes=devices, cwd=folder)
            else:
                done = run(program, *arguments, cwd=folder)
            if program in READ_PAPER_RUNS and "has no finished run of scale=micro" in done.stderr:
                continue  # the sweeps that train them were planned only
            assert done.returncode == 0, f"{shlex.join(words)}: {done.stdout[-1000:]}{done.stderr}"


class Loss(nn.Module):
    """A model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch).square().mean()


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")], ids=lambda d: d.name)
def test_code_of_document_runs(document, tmp_path, monkeypatch):
    """The blocks share their names, and find a model, an optimizer, batches and the libraries' modules."""
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
        names["loss"] = model(torch.randn(8, 4))
        exec(compile(block, document.name, "exec"), names)  # what the reader would run
    strategies = [value for value in names.values() if isinstance(value, ClippingStrategy)]
    written = [value for value in names.values() if getattr(value, "__module__", None) == "document"]
    assert strategies and written
    for strategy in [*strategies, *(strategy_class() for strategy_class in written)]:
        model(torch.randn(8, 4)).backward()
        assert strategy.step(model, optimizer=names["optimizer"]) > 0, strategy
        assert strategy.read_telemetry()["grad_norm"] > 0, strategy


def test_yaml_of_document_is_a_configuration(tmp_path, corpus):
    """`data=mine` of the README, with its files."""
    (block,) = blocks(CHECKOUT / "README.md", "yaml")
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
