"""Training speed: ours, a bare loop and transformers; the time of a step by part; and memory against the plan.

The plan is of blocks that are not compiled; compiled ones need less.
"""

import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from rich.console import Console

from scripts.bench_train import BenchTrainConfig, Contender, matmul_rate, specification
from scripts.gpu_stages.context import Context, metrics
from training.config.compose import CONFIGS, load_config
from training.launch.plan import plan
from training.monitor.step_timer import STEP_PHASES

#: Seconds that a case takes with its imports, weights, compilation and two rounds.
CASE_SECONDS = 45


class Case(NamedTuple):
    """A contender of bench_train.py on a model, with so many sequences of 2,048 tokens per step."""

    contender: str
    model: str
    batch: int
    recomputing: str = "none"
    compiled: bool = True

    @property
    def label(self) -> str:
        """Its name in the results."""
        options = [self.recomputing] * (self.recomputing != "none") + ["eager"] * (not self.compiled)
        return " ".join([self.contender, self.model, *options])


#: The cases of the paper's model come first: time may be over before the last.
CASES = (
    Case("ours", "1b", 8), Case("bare", "1b", 8), Case("ours", "1b", 8, "selective"), Case("transformers", "1b", 8),
    Case("ours", "60m", 32), Case("ours", "60m", 32, compiled=False), Case("bare", "60m", 32),
    Case("transformers", "60m", 32), Case("ours", "350m", 16), Case("ours", "350m", 16, "selective"),
    Case("ours", "60m", 32, "selective"),
)  # fmt: skip


def run(context: Context) -> None:
    """Save each case's numbers; those of a call before are kept, and those for which no time is left are not begun."""
    cases = tuple(Case(name, "nano", 2) for name in ("ours", "bare", "transformers")) if context.dry_run else CASES
    for case in cases:
        if "tokens_per_second" in context.results.get(case.label, {}):
            continue
        if context.seconds_left() < CASE_SECONDS and not context.dry_run:
            raise TimeoutError(f"no time is left for {case.label}")
        context.save(**{case.label: measure(case, context)})


def measure(case: Case, context: Context) -> dict[str, Any]:
    """Return a case's tokens per second and memory; for ours also its parts."""
    length = 32 if context.dry_run else 2048
    peers = sys.executable if case.contender == "transformers" else "none"
    sizes = {"model": case.model, "length": length, "batch": case.batch, "steps": 5 if context.dry_run else 20}
    settings = BenchTrainConfig.model_validate(sizes | {"only": case.contender, "peers": peers})
    extra = [
        f"paths.cache={context.cache.resolve()}", f"trainer.activation_checkpointing={case.recomputing}",
        f"model.max_position_embeddings={max(length, 1024)}",
        *(["model.vocab_size=512", "data.max_tokens=2e4"] if context.dry_run else []),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        spec = specification(settings, Path(temporary), Console(quiet=True), extra)
        contender = Contender(case.contender, case.compiled and not context.dry_run, sys.executable, spec)
        try:
            contender.run_round()
        finally:
            contender.end()
        if contender.failure:
            return {"failure": contender.failure}
        (report,) = contender.rounds
        rate = settings.steps * case.batch * length / report["seconds"]
        numbers: dict[str, Any] = {
            "tokens_per_second": round(rate),
            "mfu": round(rate / spec["peak"], 4) if spec["peak"] else None,
            "of_matmul": round(rate * spec["flops"] / matmul_rate(), 4),
            "memory_gib": round(report["memory"] / 2**30, 2),
            "loss": round(report["loss"], 3),
        }
        if case.contender == "ours":
            rows = metrics(Path(temporary, "main", contender.label))[-settings.steps :]
            names = [f"{phase}_seconds" for phase in STEP_PHASES]
            numbers |= {name: round(median(row[name] for row in rows), 5) for name in names}
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                numbers["planned_gib"] = round(
                    plan(load_config(compose("train", overrides=spec["overrides"]))).bytes / 2**30, 2
                )
        return numbers
