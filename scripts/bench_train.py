"""Training speed compared with other frameworks, on the same model and batches.

    python scripts/bench_train.py [--model micro] [--batch 16] [--length 128] ...
    make bench-train ARGS="--rounds 5 --only ours bare"

Contenders are `train.py` with ZClip, metrics and all; our model in a bare loop; transformers' LlamaForCausalLM in the
same loop; litgpt's GPT in litgpt's loop. Each runs eager and compiled, in a process of its own (bench_worker.py). They
take turns of `--steps` optimizer steps. Prints median speeds, the ratio of speeds in each round, and the model's FLOP/s
relative to those of a matrix product, which is timed between the rounds.

On a GPU the defaults are --model 1b --length 2048 --batch 8 in bf16 mixed precision. One process at a time holds the
memory.
"""

import _entry  # first: it finds the checkout and installs the signal handlers

# isort: split

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from common.arguments import ArgumentParser, count
from common.errors import ConfigError, UserError
from data import TrainLoader
from training.config.checks import check
from training.config.compose import CONFIGS, load_config
from training.run import peak_tokens_per_second, prepare_tokens, training_sequences
from training.runtime.hardware import flops_per_token

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LOG_EVERY = 5
CONTENDERS = {
    "ours": "train.py, ZClip",
    "bare": "our model, bare loop",
    "transformers": "transformers, bare loop",
    "litgpt": "litgpt, its loop",
}

#: Contenders that need packages which this project does not depend on.
PEERS = ("transformers", "litgpt")
PEER_PACKAGES = ("transformers==5.3.0", "litgpt==0.5.13")
WORKER = Path(__file__).with_name("bench_worker.py")


class Contender:
    """A process that trains, round by round.

    Args:
        name: key of `CONTENDERS`.
        compiled: whether the model is compiled.
        python: interpreter of the process.
        spec: see `specification`.
        folder: for its files.
    """

    def __init__(self, name: str, compiled: bool, python: str, spec: dict[str, Any], folder: Path) -> None:
        self.name, self.compiled, self.python = name, compiled, python
        self.label = f"{name}{'-compiled' if compiled else ''}"
        self.spec = folder / f"{self.label}.json"
        self.log = folder / f"{self.label}.log"
        overrides = [*spec["overrides"], f"name={self.label}"]
        self.spec.write_text(json.dumps(spec | {"compile": compiled, "overrides": overrides}))
        self.process: subprocess.Popen[str] | None = None
        self.rounds: list[dict[str, float]] = []
        self.failure = ""

    def run_round(self, keep: bool) -> None:
        """Train for a round, after the warm-up of a new process. The process ends unless `keep` is true."""
        if self.process is None:
            with self.log.open("w") as log:
                self.process = subprocess.Popen(
                    [self.python, str(WORKER), self.name, str(self.spec)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                )  # fmt: skip
            if not self._read_report():
                return
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        if report := self._read_report():
            self.rounds.append(report)
        if not keep:
            self.end()

    def end(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _read_report(self) -> dict[str, float] | None:
        """Return the next report of the process; `None` if it failed, with the reason in `failure`."""
        assert self.process is not None and self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        lines = self.log.read_text().strip().splitlines()
        out_of_memory = any("out of memory" in line for line in lines)
        self.failure = "out of memory" if out_of_memory else (lines or ["killed"])[-1]
        self.end()
        return None


def parse_options() -> argparse.Namespace:
    """Return the options of the command line.

    Raises:
        UserError: one is not allowed.
    """
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model", default="1b" if GPU else "micro", help="option of configs/model (default: %(default)s)")
    add("--length", type=count, default=2048 if GPU else 128, help="tokens per sequence (default: %(default)s)")
    add("--batch", type=count, default=8 if GPU else 16, help="sequences per step (default: %(default)s)")
    add("--steps", type=count, default=20 if GPU else 5,
        help=f"steps per round, a multiple of {LOG_EVERY} (default: %(default)s)")  # fmt: skip
    add("--rounds", type=count, default=5 if GPU else 25, help="rounds (default: %(default)s)")
    add("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders (default: all)")
    add("--compile", choices=("false", "true", "both"), default="both", help="compiled or not (default: both)")
    add("--peers", metavar="PYTHON",
        help="interpreter that has transformers and litgpt, or none (default: made in cache/peers)")  # fmt: skip
    options = parser.parse_args()
    if options.steps % LOG_EVERY:
        raise ConfigError("--steps", options.steps, f"a multiple of {LOG_EVERY}")
    if options.peers == "none":
        options.only = [name for name in options.only if name not in PEERS]
        if not options.only:
            raise UserError("--peers=none is not possible with --only transformers litgpt: these are the peers")
    return options


def main() -> None:
    """Run the benchmark and print its tables."""
    options = parse_options()
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spec = specification(options, folder, console)
        python = sys.executable
        if set(PEERS) & set(options.only):
            python = options.peers or peers_python(console)
        contenders = [
            Contender(name, compiled, python if name in PEERS else sys.executable, spec, folder)
            for compiled in {"false": [False], "true": [True], "both": [False, True]}[options.compile]
            for name in options.only
        ]
        matmul_rate = run_rounds(contenders, options.rounds)
    print_results(options, spec, contenders, matmul_rate, console)


def run_rounds(contenders: list[Contender], rounds: int) -> float:
    """Let the contenders take turns, each beginning in turn; return the median FLOP/s of a matrix product."""
    rates = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=rounds * len(contenders))
        try:
            for turn in range(rounds):
                rates.append(time_matmul())
                first = turn % len(contenders)
                for contender in contenders[first:] + contenders[:first]:
                    progress.update(bar, description=contender.label, advance=1)
                    if not contender.failure:
                        contender.run_round(keep=not GPU)
        finally:
            for contender in contenders:
                contender.end()
    return statistics.median(rates)


def specification(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Return what a contender needs to know; the batches of the run are written to the folder."""
    overrides = [
        f"model={options.model}", f"trainer={'gpu' if GPU else 'cpu'}", f"data.sequence_length={options.length}",
        f"trainer.global_batch_size={options.batch}", f"trainer.micro_batch_size={options.batch}",
        "trainer.max_steps=100000", "trainer.checkpoint_every=100000", f"trainer.log_every={LOG_EVERY}",
        "optim.warmup_fraction=0", f"paths.runs={folder}",
    ]  # fmt: skip
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = load_config(compose("train", overrides=overrides))
    check(config)
    tokens = prepare_tokens(config, console)
    sequences = training_sequences(config, tokens)
    loader = TrainLoader(sequences, tokens.fingerprint, 50, options.batch, options.batch)
    np.save(folder / "batches.npy", np.stack([batch.tokens.numpy() for batch in loader]).astype(np.int32))
    return {
        "device": DEVICE,
        "steps": options.steps,
        "batch": options.batch,
        "length": options.length,
        "lr": config.lr,
        "log_every": LOG_EVERY,
        "batches": str(folder / "batches.npy"),
        "folder": str(folder),
        "model": config.model.shape,
        "parameters": config.model.parameters,
        "overrides": overrides,
        "flops": flops_per_token(config.model, options.length),
        "peak": peak_tokens_per_second(config),
    }


def peers_python(console: Console) -> str:
    """Return the interpreter of an environment with the peers' packages, which is made if need be."""
    folder = Path("cache") / "peers"
    python = folder / "bin" / "python"
    packages = [f"torch=={torch.__version__.split('+')[0]}", "numpy", *PEER_PACKAGES]
    installed = folder / "made"
    if not installed.exists() or installed.read_text().splitlines() != packages:
        console.print(f"making an environment for {', '.join(PEER_PACKAGES)} in {folder}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        if subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=False).returncode:
            raise UserError(
                f"pip cannot install {' '.join(packages)} in {folder}: use --peers with a Python that has them, or none"
            )
        installed.write_text("\n".join(packages))
    return str(python)


def time_matmul() -> float:
    """Return the FLOP/s of a large matrix product, in the dtype of the training."""
    n = 8192 if GPU else 1024
    x = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16 if GPU else torch.float32)
    times = []
    for _ in range(10):
        if GPU:
            torch.cuda.synchronize()
        start = time.perf_counter()
        x @ x
        if GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(times)


def print_results(
    options: argparse.Namespace, spec: dict[str, Any], contenders: list[Contender], matmul_rate: float, console: Console
) -> None:
    """Print a table of the eager contenders, and one of the compiled ones.

    Args:
        options: of the command line.
        spec: see `specification`.
        contenders: with their rounds.
        matmul_rate: FLOP/s of a matrix product.
        console: prints the tables.
    """
    tokens = options.steps * options.batch * options.length
    device = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    setup = f"{spec['parameters'] / 1e6:.1f}M parameters, {options.batch} x {options.length} tokens, {device}"
    for compiled in (False, True):
        group = [contender for contender in contenders if contender.compiled == compiled]
        if not group:
            continue
        title = f"{setup}, torch {torch.__version__}, {'compiled' if compiled else 'eager'}"
        table = Table(title=title, title_justify="left")
        first = {"ours": "train.py"}.get(group[0].name, group[0].name)
        columns = ("", "tokens/s", f"{first} over it (rounds)", "of matmul", *(["MFU"] if spec["peak"] else []))
        for column in (*columns, "GiB", "loss"):
            table.add_column(column, justify="right" if column else "left")
        reference = group[0].rounds
        for contender in group:
            if contender.failure:
                table.add_row(CONTENDERS[contender.name], contender.failure)
                continue
            speed = tokens / statistics.median(r["seconds"] for r in contender.rounds)
            ratios = [r["seconds"] / o["seconds"] for r, o in zip(contender.rounds, reference, strict=False)]
            compared = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"
            table.add_row(
                CONTENDERS[contender.name],
                f"{speed:,.0f}",
                compared,
                f"{speed * spec['flops'] / matmul_rate:.0%}",
                *([f"{speed / spec['peak']:.1%}"] if spec["peak"] else []),
                f"{contender.rounds[-1]['memory'] / 2**30:.1f}",
                f"{contender.rounds[-1]['loss']:.2f}",
            )
        console.print(table)
    console.print(
        f"matrix product: {matmul_rate / 1e12:.2f}e12 FLOP/s; model: {spec['flops'] / 1e9:.3f}e9 FLOPs per token"
    )


if __name__ == "__main__":
    _entry.run(main)
