"""How fast training is, beside others: `python scripts/bench_train.py [model=micro] [batch=16] [length=128] ...`.

The same model on the same batches, each contender in a process of its own (bench_worker.py), a round of `steps`
optimizer steps each in turn: `train.py` with ZClip, metrics and all; our model in a bare loop; transformers'
LlamaForCausalLM in the same loop; litgpt's GPT with litgpt's loop. Each as it is and with torch.compile. Prints medians
and the ratio of speeds, round by round, and which share of the rate of a matrix product, measured between the rounds,
the arithmetic of the model makes up.

On a GPU: model=1b length=2048 batch=8 in bf16 mixed precision, and one process at a time has the memory.
`peers` is a Python that has transformers and litgpt, or `none`; by default an environment is made for them in `cache/`.
`only=ours,bare` names contenders, `compile=false` or `true` leaves out half of them; `steps` is a multiple of 5.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.runtime.signals import install_handlers

install_handlers()  # first: what follows takes seconds to load

import json
import statistics
import subprocess
import tempfile
import time
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from common.errors import UserError
from data import TrainLoader
from training.config.checks import check, model_config
from training.launch.cli import command_line
from training.run import peak_tokens_per_second, prepare_tokens, training_sequences
from training.runtime.hardware import flops_per_token
from zclip.arguments import is_count

GPU = torch.cuda.is_available()
LOG_EVERY = 5
DEFAULTS: dict[str, Any] = {
    "model": "1b" if GPU else "micro",
    "length": 2048 if GPU else 128,
    "batch": 8 if GPU else 16,
    "steps": 20 if GPU else 5,
    "rounds": 5 if GPU else 25,
    "peers": None,
    "only": None,
    "compile": None,
}
NAMES = {
    "ours": "train.py, ZClip",
    "bare": "our model, bare loop",
    "transformers": "transformers, bare loop",
    "litgpt": "litgpt, its loop",
}
PEERS = ("transformers==5.3.0", "litgpt==0.5.13")
WORKER = Path(__file__).with_name("bench_worker.py")
DEVICE = "cuda" if GPU else "cpu"


class Contender:
    """A process that trains, round by round."""

    def __init__(self, name: str, compiled: bool, python: str, spec: dict[str, Any], folder: Path) -> None:
        self.name, self.compiled, self.python = name, compiled, python
        self.label = f"{name}{'-compiled' if compiled else ''}"
        self.spec = folder / f"{self.label}.json"
        self.log = folder / f"{self.label}.log"
        own = {"compile": compiled, "overrides": [*spec["overrides"], f"name={self.label}"]}
        self.spec.write_text(json.dumps(spec | own))
        self.process: subprocess.Popen[str] | None = None
        self.rounds: list[dict[str, float]] = []
        self.failure = ""

    def round(self, keep: bool) -> None:
        """Train for a round, after warming up if the process is new; end it unless it is to be kept."""
        if self.process is None:
            with self.log.open("w") as log:
                self.process = subprocess.Popen(
                    [self.python, str(WORKER), self.name, str(self.spec)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                )  # fmt: skip
            if not self._report():
                return
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        if report := self._report():
            self.rounds.append(report)
        if not keep:
            self.end()

    def end(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _report(self) -> dict[str, float] | None:
        assert self.process is not None and self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        said = self.log.read_text().strip().splitlines()
        self.failure = "out of memory" if any("out of memory" in line for line in said) else (said or ["killed"])[-1]
        self.end()
        return None


def main() -> None:
    """Run the benchmark and print its tables."""
    given = OmegaConf.to_container(OmegaConf.from_cli())
    assert isinstance(given, dict)
    if unknown := given.keys() - DEFAULTS.keys():
        raise UserError(f"{unknown.pop()} is not a key: there are {', '.join(DEFAULTS)}")
    cfg = DEFAULTS | given
    names = str(cfg["only"]).split(",") if cfg["only"] else list(NAMES)
    if strange := [name for name in names if name not in NAMES]:
        raise UserError(f"only={strange[0]} is not allowed: it must be of {', '.join(NAMES)}")
    for key in ("length", "batch", "steps", "rounds"):
        if not is_count(cfg[key]) or (key == "steps" and cfg[key] % LOG_EVERY):
            allowed = f"a multiple of {LOG_EVERY}" if key == "steps" else "an integer from 1"
            raise UserError(f"{key}={cfg[key]} is not allowed: it must be {allowed}")
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spec = specification(cfg, folder, console)
        python = sys.executable
        if cfg["peers"] == "none":
            names = [name for name in names if name in ("ours", "bare")]
        elif {"transformers", "litgpt"} & set(names):
            python = cfg["peers"] or environment_of_peers(console)
        if not names:
            raise UserError(f"only={cfg['only']} is not possible with peers=none: they are peers")
        kinds = [False, True] if cfg["compile"] is None else [bool(cfg["compile"])]
        contenders = [
            Contender(name, kind, sys.executable if name in ("ours", "bare") else python, spec, folder)
            for kind in kinds
            for name in names
        ]
        rates = []
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("", total=cfg["rounds"] * len(contenders))
            try:
                for turn in range(cfg["rounds"]):
                    rates.append(matmul_rate())
                    for contender in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
                        progress.update(bar, description=contender.label, advance=1)
                        if not contender.failure:
                            contender.round(keep=not GPU)
            finally:
                for contender in contenders:
                    contender.end()
    show(cfg, spec, contenders, statistics.median(rates), console)


def specification(cfg: dict[str, Any], folder: Path, console: Console) -> dict[str, Any]:
    """Return what the contenders must know, with the batches of the run stored in the folder."""
    overrides = [
        f"model={cfg['model']}", f"trainer={'gpu' if GPU else 'cpu'}", f"data.sequence_length={cfg['length']}",
        f"trainer.global_batch_size={cfg['batch']}", f"trainer.micro_batch_size={cfg['batch']}",
        "trainer.max_steps=100000", "trainer.checkpoint_every=100000", f"trainer.log_every={LOG_EVERY}",
        "optim.warmup_fraction=0", f"paths.runs={folder}",
    ]  # fmt: skip
    with initialize_config_dir(str(Path(__file__).parent.parent / "configs"), version_base="1.3"):
        run = compose("train", overrides=overrides)
    check(run)
    tokens = prepare_tokens(run, console)
    loader = TrainLoader(training_sequences(run, tokens), tokens.fingerprint, 50, cfg["batch"], cfg["batch"])
    np.save(folder / "batches.npy", np.stack([batch.tokens.numpy() for batch in loader]).astype(np.int32))
    config = model_config(run)
    return {
        "device": DEVICE,
        "steps": cfg["steps"],
        "batch": cfg["batch"],
        "length": cfg["length"],
        "lr": run.lr,
        "log_every": LOG_EVERY,
        "batches": str(folder / "batches.npy"),
        "folder": str(folder),
        "model": config.shape,
        "parameters": config.parameters,
        "overrides": overrides,
        "flops": flops_per_token(config, cfg["length"]),
        "peak": peak_tokens_per_second(run),
    }


def environment_of_peers(console: Console) -> str:
    """Return the Python of an environment with the peers, made if it is not there."""
    folder = Path("cache") / "peers"
    python = folder / "bin" / "python"
    wanted = [f"torch=={torch.__version__.split('+')[0]}", "numpy", *PEERS]
    made = folder / "made"
    if not made.exists() or made.read_text().splitlines() != wanted:
        console.print(f"making an environment for {', '.join(PEERS)} in {folder}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        if subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=False).returncode:
            raise UserError(
                f"peers=null is not possible: pip cannot install {' '.join(wanted)}; give a Python, or none"
            )
        made.write_text("\n".join(wanted))
    return str(python)


def matmul_rate() -> float:
    """Return the operations a second of a large matrix product, in the dtype of the training."""
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


def show(cfg: dict[str, Any], spec: dict[str, Any], contenders: list[Contender], rate: float, console: Console) -> None:
    """Print a table of contenders that are compiled, and one of those that are not."""
    tokens = cfg["steps"] * cfg["batch"] * cfg["length"]
    place = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    what = f"{spec['parameters'] / 1e6:.1f}M parameters, {cfg['batch']} x {cfg['length']} tokens, {place}"
    for compiled in (False, True):
        those = [contender for contender in contenders if contender.compiled == compiled]
        if not those:
            continue
        title = f"{what}, torch {torch.__version__}, {'compiled' if compiled else 'eager'}"
        table = Table(title=title, title_justify="left")
        first = {"ours": "train.py"}.get(those[0].name, those[0].name)
        columns = ("", "tokens/s", f"{first} over it (rounds)", "of matmul", *(["MFU"] if spec["peak"] else []))
        for column in (*columns, "GiB", "loss"):
            table.add_column(column, justify="right" if column else "left")
        reference = those[0].rounds
        for contender in those:
            if contender.failure:
                table.add_row(NAMES[contender.name], contender.failure)
                continue
            speed = tokens / statistics.median(r["seconds"] for r in contender.rounds)
            ratios = [r["seconds"] / o["seconds"] for r, o in zip(contender.rounds, reference, strict=False)]
            compared = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"
            table.add_row(
                NAMES[contender.name],
                f"{speed:,.0f}",
                compared,
                f"{speed * spec['flops'] / rate:.0%}",
                *([f"{speed / spec['peak']:.1%}"] if spec["peak"] else []),
                f"{contender.rounds[-1]['memory'] / 2**30:.1f}",
                f"{contender.rounds[-1]['loss']:.2f}",
            )
        console.print(table)
    console.print(f"matrix product: {rate / 1e12:.2f}e12 operations/s; {spec['flops'] / 1e9:.3f}e9 operations a token")


if __name__ == "__main__":
    sys.exit(command_line(main))
