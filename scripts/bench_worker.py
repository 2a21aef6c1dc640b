"""One contender of bench_train.py, in a process of its own: `python scripts/bench_worker.py NAME SPEC.json`.

A contender trains on the batches of the specification and pauses between rounds. It prints a line of JSON when it has
warmed up. For each line that it then reads, it trains for a round and prints how long that took. Besides torch and
numpy it imports its own libraries only, so peers run in an environment without this project.
"""

import itertools
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path[0] = str(Path(__file__).parent.parent)


class Rounds:
    """Pauses a training loop between rounds, and reports how long each took. The first round is the warm-up."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.steps = spec["steps"]
        self.on_gpu = spec["device"] == "cuda"
        self.reports = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # output of libraries goes to the log
        self.steps_done = 0
        self._round_began = 0.0

    def step_done(self, loss: Any) -> None:
        """Count a step. At the end of a round report it, and wait for the next one; exit if there is none."""
        self.steps_done += 1
        if self.steps_done % self.steps:
            return
        loss = float(loss)
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._round_began
        memory = torch.cuda.max_memory_allocated() if self.on_gpu else resident_peak()
        print(json.dumps({"seconds": seconds, "loss": loss, "memory": memory}), file=self.reports, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        self._round_began = time.perf_counter()


def resident_peak() -> int:
    """Return the peak resident memory of this program in bytes; getrusage includes that of its parent process."""
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * (int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def batches(spec: dict[str, Any]) -> Iterator[Tensor]:
    """Yield int64 tokens of shape (batch, length + 1) on the device, for ever."""
    for batch in itertools.cycle(np.load(Path(spec["folder"], "batches.npy"), mmap_mode="r")):
        tokens = torch.from_numpy(batch.astype(np.int64))
        yield tokens.pin_memory().to("cuda", non_blocking=True) if spec["device"] == "cuda" else tokens


def plain_loop(model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], spec: dict[str, Any]) -> None:
    """Train with the model and AdamW alone, until the process ends."""
    rounds = Rounds(spec)
    model.train().to(spec["device"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec["lr"], fused=True)
    mixed = torch.autocast("cuda", torch.bfloat16) if spec["device"] == "cuda" else nullcontext()
    for tokens in batches(spec):
        with mixed:
            loss = loss_of(tokens[:, :-1], tokens[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rounds.step_done(loss.detach())


def ours(spec: dict[str, Any]) -> None:
    """Train as `train.py` does."""
    from hydra import compose, initialize_config_dir
    from rich.console import Console

    from training.config.checks import check
    from training.config.compose import CONFIGS, load_config
    from training.config.identity import run_path
    from training.run import prepare_tokens, train
    from training.run_dir import RunDir

    rounds = Rounds(spec)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = load_config(compose("train", [*spec["overrides"], f"trainer.compile={str(spec['compile']).lower()}"]))
    check(config, run_path(config))
    console = Console(quiet=True)
    tokens = prepare_tokens(config, console)
    run_dir = RunDir(run_path(config))
    with run_dir.acquire(config, tokens):
        train(config, run_dir, tokens, {}, console, listeners=[lambda step, row: rounds.step_done(row["loss"])])


def bare(spec: dict[str, Any]) -> None:
    """Train our model in a plain loop."""
    from models import Llama, LlamaConfig
    from models.parallel import compile_model

    model = Llama(LlamaConfig(**spec["model"]))
    if spec["compile"]:
        compile_model(model)
    plain_loop(model, lambda tokens, targets: model(tokens, targets)[0], spec)


def transformers(spec: dict[str, Any]) -> None:
    """Train transformers' LLaMA in a plain loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = ("qk_norm", "rope_theta", "embedding_initializer_range")
    shape = {name: value for name, value in spec["model"].items() if name not in ours}
    rope = {"rope_type": "default", "rope_theta": spec["model"]["rope_theta"]}
    config = LlamaConfig(**shape, rope_parameters=rope, use_cache=False, attn_implementation="sdpa")  # type: ignore[call-arg]
    model = LlamaForCausalLM(config)
    check_size(model, spec)
    run = torch.compile(model) if spec["compile"] else model
    plain_loop(model, lambda tokens, targets: run(tokens, labels=targets, shift_labels=targets).loss, spec)


def litgpt(spec: dict[str, Any]) -> None:
    """Train litgpt's GPT with litgpt's loop, which clips by a fixed norm."""
    import lightning
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.pretrain import fit, initialize_weights

    rounds, shape = Rounds(spec), spec["model"]
    config = Config(
        block_size=spec["length"], n_layer=shape["num_hidden_layers"], n_embd=shape["hidden_size"],
        vocab_size=shape["vocab_size"], padded_vocab_size=shape["vocab_size"], norm_class_name="RMSNorm",
        norm_eps=shape["rms_norm_eps"], parallel_residual=False, n_head=shape["num_attention_heads"],
        n_query_groups=shape["num_key_value_heads"], rope_base=int(shape["rope_theta"]), rotary_percentage=1.0,
        intermediate_size=shape["intermediate_size"], bias=False, mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    fabric = lightning.Fabric(
        accelerator=spec["device"], devices=1, precision="bf16-mixed" if rounds.on_gpu else "32-true"
    )
    fabric.launch()
    model = GPT(config)
    check_size(model, spec)
    initialize_weights(fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
    prepared = fabric.setup(torch.compile(model) if spec["compile"] else model)  # type: ignore[arg-type]
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=spec["lr"], fused=True))
    losses = [float("nan")]
    fabric.log_dict = lambda metrics, step: losses.append(metrics["loss"])  # type: ignore[assignment,method-assign,misc]

    def feed() -> Iterator[Tensor]:
        source = batches(spec)
        yield next(source)
        for tokens in source:
            rounds.step_done(losses[-1])
            yield tokens

    unlimited = 10**12
    fit(
        fabric=fabric, devices=1, state={"model": prepared, "optimizer": optimizer, "iter_num": 0, "step_count": 0},
        train_dataloader=feed(), val_dataloader=[next(batches(spec))], out_dir=Path(spec["folder"]),
        tokenizer_dir=None, eval=EvalArgs(interval=unlimited, max_iters=1, final_validation=False),
        train=TrainArgs(save_interval=None, log_interval=spec["log_every"], global_batch_size=spec["batch"],
                        micro_batch_size=spec["batch"], lr_warmup_steps=1, max_tokens=unlimited, max_norm=1.0),
    )  # fmt: skip


def check_size(model: nn.Module, spec: dict[str, Any]) -> None:
    """Raise `ValueError` unless a peer's model has as many parameters as ours."""
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != spec["parameters"]:
        raise ValueError(f"this model has {count:,} parameters, ours {spec['parameters']:,}")


if __name__ == "__main__":
    torch.manual_seed(0)
    {"ours": ours, "bare": bare, "transformers": transformers, "litgpt": litgpt}[sys.argv[1]](
        json.loads(Path(sys.argv[2]).read_text())
    )
