"""Training speed compared with other frameworks, on the same model and batches.

    make bench-train ARGS="rounds=5 only=ours,bare"

Contenders are `train.py` with ZClip, metrics and all; our model in a bare loop; transformers' LlamaForCausalLM in the
same loop; litgpt's GPT in litgpt's loop. Each runs eager and compiled, in a process of its own (bench_worker.py). They
take turns of `steps` optimizer steps. Prints median speeds, the ratio of speeds in each round, and the model's FLOP/s
relative to those of a matrix product, which is timed between the rounds.

On a GPU the defaults are model=1b length=2048 batch=8 in bf16 mixed precision. One process at a time holds the
memory.
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from pydantic import BeforeValidator, Field, model_validator
from rich.console import Console
from rich.progress import Progress

from common.console import make_console
from common.errors import ConfigError, UserError
from common.settings import Allowed, Count, Settings, parse
from data import BatchShare, TrainLoader
from scripts._bench import DEVICE, GPU, device_name, median_seconds, numbers_table
from training.config.checks import check
from training.config.compose import CONFIGS, load_config
from training.config.identity import run_path
from training.monitor.metrics import peak_tokens_per_second
from training.run import prepare_tokens, training_sequences
from training.runtime.hardware import flops_per_token

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


class BenchTrainConfig(Settings):
    """Settings of the command line."""

    model: str = "1b" if GPU else "micro"
    """Option of configs/model."""
    length: Count = 2048 if GPU else 128
    """Tokens per sequence."""
    batch: Count = 8 if GPU else 16
    """Sequences per optimizer step."""
    steps: Annotated[int, Field(ge=1, multiple_of=LOG_EVERY), Allowed(f"a multiple of {LOG_EVERY}")] = 20 if GPU else 5
    """Optimizer steps per round."""
    rounds: Count = 5 if GPU else 25
    """Rounds of each contender."""
    only: Annotated[
        tuple[Literal["ours", "bare", "transformers", "litgpt"], ...],
        BeforeValidator(lambda names: tuple(str(names).split(","))),
        Allowed(f"some of {', '.join(CONTENDERS)}, with commas"),
    ] = ("ours", "bare", "transformers", "litgpt")
    """Contenders that run."""
    compile: bool | None = None
    """Whether the models are compiled; null: both."""
    peers: str | None = None
    """Interpreter that has the peers' packages, or none to omit the peers; null: it is made in cache/peers."""

    @model_validator(mode="after")
    def _check(self) -> "BenchTrainConfig":
        if not self.contenders:
            raise ConfigError("only", ",".join(self.only), problem="is not possible with peers=none: they are peers")
        return self

    @property
    def contenders(self) -> list[str]:
        """Names of the contenders that run."""
        return [name for name in self.only if self.peers != "none" or name not in PEERS]


class Contender:
    """A process that trains, round by round."""

    def __init__(self, name: str, compiled: bool, python: str, spec: dict[str, Any]) -> None:
        self.name, self.compiled = name, compiled
        self.label = f"{name}{'-compiled' if compiled else ''}"
        self.log = Path(spec["folder"], f"{self.label}.log")
        spec_file = self.log.with_suffix(".json")
        overrides = [*spec["overrides"], f"name={self.label}"]
        spec_file.write_text(json.dumps(spec | {"compile": compiled, "overrides": overrides}))
        self.command = [python, str(WORKER), name, str(spec_file)]
        self.process: subprocess.Popen[str] | None = None
        self.rounds: list[dict[str, float]] = []
        self.failure = ""

    def run_round(self) -> None:
        """Train for a round, after the warm-up of a new process."""
        if self.process is None:
            with self.log.open("w") as log:
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
            if not self._read_report():
                return
        print(file=self.process.stdin, flush=True)
        if report := self._read_report():
            self.rounds.append(report)
        if GPU:
            self.end()  # one process at a time holds the memory

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


def main(values: _entry.Values) -> None:
    """Run the benchmark and print its tables."""
    config = parse(BenchTrainConfig, values)
    console = make_console(soft_wrap=False, width=110)
    with tempfile.TemporaryDirectory() as temporary:
        spec = specification(config, Path(temporary), console)
        pythons = dict.fromkeys(config.contenders, sys.executable)
        if peers := set(PEERS) & pythons.keys():
            pythons |= dict.fromkeys(peers, config.peers or peers_python(console))
        contenders = [
            Contender(name, compiled, python, spec)
            for compiled in ([False, True] if config.compile is None else [config.compile])
            for name, python in pythons.items()
        ]
        rate = run_rounds(contenders, config.rounds)
    print_results(config, spec, contenders, rate, console)


def run_rounds(contenders: list[Contender], rounds: int) -> float:
    """Let the contenders take turns, each beginning in turn; return the median FLOP/s of a matrix product."""
    rates = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=rounds * len(contenders))
        try:
            for turn in range(rounds):
                rates.append(matmul_rate())
                first = turn % len(contenders)
                for contender in contenders[first:] + contenders[:first]:
                    progress.update(bar, description=contender.label, advance=1)
                    if not contender.failure:
                        contender.run_round()
        finally:
            for contender in contenders:
                contender.end()
    return statistics.median(rates)


def specification(
    config: BenchTrainConfig, folder: Path, console: Console, extra: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what a contender needs to know; the batches of the run are written to the folder.

    `extra` are overrides of our run.
    """
    overrides = [
        f"model={config.model}", f"trainer={'gpu' if GPU else 'cpu'}", f"data.sequence_length={config.length}",
        f"trainer.global_batch_size={config.batch}", f"trainer.micro_batch_size={config.batch}",
        "trainer.max_steps=100000", "trainer.checkpoint_every=100000", f"trainer.log_every={LOG_EVERY}",
        "optim.warmup_fraction=0", f"paths.runs={folder}", *extra,
    ]  # fmt: skip
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        run = load_config(compose("train", overrides=overrides))
    check(run, run_path(run))
    tokens = prepare_tokens(run, console)
    sequences = training_sequences(run, tokens)
    loader = TrainLoader(sequences, tokens.fingerprint, 50, BatchShare(config.batch, config.batch))
    np.save(folder / "batches.npy", np.stack([batch.tokens.numpy() for batch in loader]).astype(np.int32))
    return config.model_dump(include={"steps", "batch", "length"}) | {
        "device": DEVICE,
        "lr": run.lr,
        "log_every": LOG_EVERY,
        "folder": str(folder),
        "model": run.model.shape,
        "parameters": run.model.parameters,
        "overrides": overrides,
        "flops": flops_per_token(run.model, config.length),
        "peak": peak_tokens_per_second(run),
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
                f"pip cannot install {' '.join(packages)}: give a Python that has them as peers=PYTHON, or peers=none"
            )
        installed.write_text("\n".join(packages))
    return str(python)


def matmul_rate() -> float:
    """Return the FLOP/s of a large matrix product, in the dtype of the training."""
    n = 8192 if GPU else 1024
    x = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16 if GPU else torch.float32)
    return 2 * n**3 / median_seconds({"product": lambda: x @ x}, rounds=10)["product"]


def print_results(
    config: BenchTrainConfig, spec: dict[str, Any], contenders: list[Contender], rate: float, console: Console
) -> None:
    """Print a table of the eager contenders, and one of the compiled ones; `rate` is that of a matrix product."""
    tokens = config.steps * config.batch * config.length
    setup = f"{spec['parameters'] / 1e6:.1f}M parameters, {config.batch} x {config.length} tokens, {device_name()}"
    for compiled in (False, True):
        group = [contender for contender in contenders if contender.compiled == compiled]
        if not group:
            continue
        first = {"ours": "train.py"}.get(group[0].name, group[0].name)
        title = f"{setup}, torch {torch.__version__}, {'compiled' if compiled else 'eager'}"
        columns = ("", "tokens/s", f"{first} over it (rounds)", "of matmul", *(["MFU"] if spec["peak"] else []))
        table = numbers_table(title, *columns, "GiB", "loss")
        for contender in group:
            if contender.failure:
                table.add_row(CONTENDERS[contender.name], contender.failure)
                continue
            speed = tokens / statistics.median(r["seconds"] for r in contender.rounds)
            ratios = [r["seconds"] / o["seconds"] for r, o in zip(contender.rounds, group[0].rounds, strict=False)]
            compared = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"
            table.add_row(
                CONTENDERS[contender.name],
                f"{speed:,.0f}",
                compared,
                f"{speed * spec['flops'] / rate:.0%}",
                *([f"{speed / spec['peak']:.1%}"] if spec["peak"] else []),
                f"{contender.rounds[-1]['memory'] / 2**30:.1f}",
                f"{contender.rounds[-1]['loss']:.2f}",
            )
        console.print(table)
    console.print(f"matrix product: {rate / 1e12:.2f}e12 FLOP/s; model: {spec['flops'] / 1e9:.3f}e9 FLOPs per token")


if __name__ == "__main__":
    _entry.run(main)
