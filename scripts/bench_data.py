"""What the data costs: `python scripts/bench_data.py [path=FILES] [megabytes=24] [rounds=5] [tokens=50e9]`.

Three tables, each with the ratio to its peer, contenders taking turns in one process:

- opening a set of `tokens` tokens (sparse files, of the parts that a preparation makes) and finding step 11,000;
- reading shuffled batches of 2,049 tokens against a sequential copy of as many bytes in memory;
- tokenizing a text into prepared tokens, reading and writing included, and into a stream of shuffled batches, against
  `tokenizers.encode_batch` on the same text in memory, and against `datasets.map` with transformers' AutoTokenizer of
  the same tokenizer.

`path` is what `data.path` takes; without it the text is the embedded corpus, repeated.
"""

import json
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import (
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

DEFAULTS = {"path": None, "megabytes": 24, "rounds": 5, "tokens": 50e9}
SEQUENCE, BATCH = 2048, 64
QUIET = Console(quiet=True)


def main() -> None:
    """Run the benchmarks and print their tables."""
    cfg = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli(sys.argv[1:]))
    unknown = cfg.keys() - DEFAULTS.keys()
    if unknown:
        sys.exit(f"bench_data.py: error: {min(unknown)} means nothing: it must be one of {', '.join(DEFAULTS)}")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        for bench in (opening, reading, tokenizing):  # memory is measured before the others need it
            Console().print(bench(cfg, Path(folder)))


def in_turns(contenders: dict[str, Callable[[], None]], rounds: int, what: str) -> dict[str, float]:
    """Return the median seconds of each contender, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in track(range(rounds + 1), description=what, console=Console(stderr=True)):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def tokenizing(cfg: OmegaConf, folder: Path) -> Table:
    """Compare tokenizing."""
    texts: list[str] = []
    size, wanted = 0, cfg.megabytes * 1e6
    while size < wanted:
        for document in Mixture([Source(name="text", path=cfg.path)]):
            texts.append(document.text)
            size += len(document.text.encode())
            if size >= wanted:
                break
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    source = (Source(name="text", path=str(file)),)
    encoder = corpus_tokenizer(Corpus(source, vocab_size=32_768), QUIET)
    (folder / "tokenizer").mkdir()
    encoder.save(folder / "tokenizer")

    def ours() -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        prepare(Corpus(source, tokenizer=str(folder / "tokenizer")), folder / "cache", 1)

    def stream() -> None:
        corpus = Corpus(source, tokenizer=str(folder / "tokenizer"), streamed=True)
        streamed = StreamingDataset(corpus, encoder, corpus.val_fraction, SEQUENCE, seed=0, block_tokens=8_000_000)
        for first in range(0, sequences, BATCH):
            streamed.take(first, min(BATCH, sequences - first))
        streamed.close()

    def bare() -> None:
        encoder.tokenizer.encode_batch(texts, add_special_tokens=False)

    def mapped() -> None:
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "datasets"))
        tokens = rows.map(
            lambda batch: tokenizer(batch["text"], return_attention_mask=False),
            batched=True,
            remove_columns=rows.column_names,
            load_from_cache_file=False,
        )
        assert len(tokens) == len(texts)

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ours()
    (folder_made,) = (folder / "cache").glob("tokens-*")
    sequences = len(TokenDataset(open_tokens(folder_made).train, SEQUENCE))  # of one epoch
    contenders = {
        "tokens prepared": ours,
        "an epoch streamed": stream,
        "tokenizers.encode_batch": bare,
        "datasets.map": mapped,
    }
    medians = in_turns(contenders, int(cfg.rounds), "tokenizing")
    table = Table(f"tokenizing {size / 1e6:.0f} MB", "MB/s", "over encode_batch", "over datasets.map")
    for name, seconds in medians.items():
        ratios = (medians[peer] / seconds for peer in ("tokenizers.encode_batch", "datasets.map"))
        table.add_row(name, f"{size / 1e6 / seconds:.1f}", *(f"{ratio:.2f}" for ratio in ratios))
    return table


def reading(cfg: OmegaConf, folder: Path) -> Table:
    """Compare reading."""
    parts, batches = 2, 200
    for i in range(parts):
        np.save(folder / f"{i}.npy", np.random.default_rng(i).integers(0, 65_536, PART_TOKENS, dtype=np.uint16))
    files = [folder / f"{i}.npy" for i in range(parts)]
    sequences = TokenDataset(TokenArray(files, [PART_TOKENS] * parts, np.uint16), SEQUENCE)
    one_part = TokenDataset(TokenArray(files[:1], [PART_TOKENS], np.uint16), SEQUENCE)
    whole = sequences.tokens.read(0, len(sequences.tokens))
    tokens = batches * BATCH * (SEQUENCE + 1)

    def batches_of(source: TokenDataset) -> Callable[[], None]:
        loader = iter(TrainLoader(ShuffledDataset(source, seed=0), "", 10**6, BATCH, BATCH))
        return lambda: [next(loader) for _ in range(batches)] and None

    def copying() -> None:
        _ = [whole[i * BATCH * (SEQUENCE + 1) :][: BATCH * (SEQUENCE + 1)].copy() for i in range(batches)]

    contenders = {
        "shuffled batches, two parts": batches_of(sequences),
        "shuffled batches, one part": batches_of(one_part),
        "sequential copy": copying,
    }
    medians = in_turns(contenders, int(cfg.rounds), "reading")
    table = Table(f"reading {batches} batches of {BATCH} x {SEQUENCE + 1}", "tokens/s", "over the copy")
    for name, seconds in medians.items():
        table.add_row(name, f"{tokens / seconds:,.0f}", f"{medians['sequential copy'] / seconds:.2f}")
    return table


def opening(cfg: OmegaConf, folder: Path) -> Table:
    """Open a set too large to make, and find a late step of the paper's run in it."""
    tokens = int(cfg.tokens)
    lengths = [PART_TOKENS] * (tokens // PART_TOKENS) + [tokens % PART_TOKENS]
    facts: dict = {"dtype": "uint16", "fingerprint": "sparse", "files": {}}
    sparse = folder / "sparse"
    sparse.mkdir()
    for split, parts in (("train", lengths), ("test", lengths[-1:])):
        described = []
        for i, length in enumerate(parts):
            file = sparse / f"{split}-{i:05}.npy"
            with file.open("wb") as out:
                header = {"descr": "<u2", "fortran_order": False, "shape": (length,)}
                np.lib.format.write_array_header_1_0(out, header)
                out.truncate(out.tell() + 2 * length)
            described.append({"file": file.name, "tokens": length})
            facts["files"][file.name] = {"bytes": file.stat().st_size, "sha256": ""}
        facts[split] = {"parts": described}
    (sparse / "tokens.json").write_text(dump_with_checksum(facts))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    opened = open_tokens(sparse)
    sequences = TokenDataset(opened.train, SEQUENCE)
    opened_in, grown = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    start = time.perf_counter()
    step, global_batch = 11_000, 2048
    positions = np.arange(step * global_batch, step * global_batch + BATCH)
    sequences.batch(order(positions, len(sequences), seed=0))
    table = Table(f"a set of {tokens:,} tokens, {len(lengths)} parts", "seconds", "MB of memory more")
    table.add_row("opening it", f"{opened_in:.3f}", f"{grown / 1024:.0f}")
    table.add_row(f"first {BATCH} sequences of step {step:,}", f"{time.perf_counter() - start:.3f}", "")
    return table


if __name__ == "__main__":
    main()
