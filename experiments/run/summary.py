"""The final numbers of one run, and the table that shows them."""

import math
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from experiments.run.definitions import SPIKE_SIGMAS, SPIKE_WINDOW, loss_spikes
from experiments.run.read import Run, corrupted_rows, corrupted_steps

#: Settings that differ between the runs of a sweep have a column each, if they are no more than this.
MOST_COLUMNS = 3

#: Parts of a step's time, as metrics.jsonl and as the table name them.
PARTS = {"data": "data", "forward_backward": "forward and backward", "clip": "clipping", "optimizer": "optimizer"}


def summarise(run: Run) -> dict[str, Any]:
    """Return what metrics.jsonl says about a whole run.

    `train_loss` is the mean over the last tenth of the steps that had no bad batch put in on purpose, `None` if not
    finite or if all had one; `clipped_share` the share of
    steps whose gradients were scaled down; `skipped` the number of steps whose norm was not finite;
    `clipped_by_z` the number of ZClip's spikes, `None` for other strategies; `tokens_per_second`, `mfu` (`None`
    where the devices' peak is not known) and `step_seconds` (by what they go to) those of the median step, so that
    compiling, saving and pauses do not count; `saving_seconds` those of the run in which training waited for a
    checkpoint; `peak_memory_gib` the most that a process took; `bad_batches` how many
    steps had one put in on purpose, and `corruption_kind` of which kind.
    """
    metrics = run.metrics
    bad = corrupted_steps(run)
    steps = len(metrics["step"])
    tail = np.delete(metrics["loss"], sorted(corrupted_rows(run)))[-max(1, steps // 10) :]
    rates = _rates(metrics)
    return {
        "steps": steps,
        "tokens": int(metrics["tokens"][-1]),
        "train_loss": float(tail.mean()) if len(tail) and np.isfinite(tail).all() else None,
        "spikes": len(loss_spikes(metrics["loss"], corrupted_rows(run))),
        "spike_definition": f"{SPIKE_SIGMAS:g} robust sigma over the last {SPIKE_WINDOW} steps",
        "clipped_share": float(np.mean((metrics["clipped"] > 0) & np.isfinite(metrics["grad_norm"]))),
        "skipped": int(np.sum(~np.isfinite(metrics["grad_norm"]))),
        "clipped_by_z": int(np.nansum(metrics["spike"])) if "spike" in metrics else None,
        "tokens_per_second": float(np.median(rates)),
        "mfu": _median(rates * metrics["mfu"] / metrics["tokens_per_second"]) if "mfu" in metrics else None,
        "step_seconds": {part: _median(metrics.get(f"{part}_seconds")) for part in PARTS},
        "saving_seconds": float(np.nansum(metrics["saving_seconds"])) if "saving_seconds" in metrics else None,
        "peak_memory_gib": float(np.nanmax(metrics["peak_memory_gib"])) if "peak_memory_gib" in metrics else None,
        "corrupted_batches": len(bad),
        "corruption_kind": run.config["data"]["corruption"]["kind"] if bad else None,
    }


def _rates(metrics: dict[str, np.ndarray]) -> np.ndarray:
    """Return the tokens per second of each step, by its own time where that is there."""
    times = [metrics[f"{part}_seconds"] for part in PARTS if f"{part}_seconds" in metrics]
    if len(times) < len(PARTS) or np.isnan(times).any():
        return metrics["tokens_per_second"]
    return np.diff(metrics["tokens"], prepend=0) / np.sum(times, axis=0)


def _median(column: np.ndarray | None) -> float | None:
    """Return the median of what there is of a column, `None` if there is nothing."""
    return None if column is None or np.isnan(column).all() else float(np.nanmedian(column))


def comparison(jobs: list[tuple[dict[str, str], dict[str, Any]]]) -> Table:
    """Return the table at the end of a sweep: one row per run, in the order given, best test loss in bold.

    Args:
        jobs: of each run its overrides, key to value, of which those that differ are shown, and its result.
    """
    keys = dict.fromkeys(key for overrides, _ in jobs for key in overrides)
    varied = [key for key in keys if len({overrides.get(key) for overrides, _ in jobs}) > 1]
    several = len(varied) > MOST_COLUMNS
    shown = Table(title="sweep", title_justify="left", show_lines=several, padding=(0, 0 if several else 1))
    for column in ["settings"] if several else varied:
        shown.add_column(column, min_width=25 if several else None, overflow="fold")
    for column in ("test loss", "train loss", "spikes", "clipped"):
        shown.add_column(column, justify="right")
    injected = any(result.get("corrupted_batches") for _, result in jobs)
    if injected:
        shown.add_column("bad batches", justify="right")
    best = min((result["test_loss"] for _, result in jobs if result["test_loss"] is not None), default=None)
    for overrides, result in jobs:
        losses = ["not finite" if (v := result[key]) is None else f"{v:.3f}" for key in ("test_loss", "train_loss")]
        own = {key: overrides[key] for key in varied if key in overrides}
        cells = [" ".join(f"{key}={value}" for key, value in own.items())] if several else [*map(own.get, varied)]
        cells += losses
        cells += [str(result["spikes"]), f"{result['clipped_share']:.1%}"]
        if injected:
            cells.append(_injected(result) or "none")
        shown.add_row(*cells, style="bold" if result["test_loss"] == best is not None else None)
    return shown


def _injected(result: dict[str, Any]) -> str:
    """Say which bad batches a run was given on purpose; empty if none."""
    many = result.get("corrupted_batches")
    return f"{many} {result['corruption_kind']}" if many else ""


def _bits(result: dict[str, Any]) -> str:
    """Say what the held-out text costs, whatever the tokenizer."""
    bits = result.get("test_bits_per_byte")
    return "" if bits is None else f"{bits:.3f} bits per byte"


def _speed(result: dict[str, Any]) -> str:
    """Say how large a model was trained, and how near to the peak of its devices."""
    size = f"{result['parameters'] / 1e6:.2f}M parameters"
    return size if result.get("mfu") is None else f"{size}, {result['mfu']:.1%} MFU"


def _costs(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return rows on what a step's time went to, and on memory, as far as the result has them."""
    spent = {part: value for part, value in (result.get("step_seconds") or {}).items() if value is not None}
    rows = []
    if total := sum(spent.values()):
        shares = ", ".join(f"{PARTS[part]} {value / total:.1%}" for part, value in spent.items())
        rows.append(("time of a step", f"{total:.3f} s", shares))
    if waited := result.get("saving_seconds"):
        rows.append(("saving", f"{waited:.2f} s", "in all, in which steps waited for a checkpoint"))
    if (most := result.get("peak_memory_gib")) is not None:
        rows.append(("peak memory", f"{most:.1f} GiB", "of one process"))
    return rows


def table(result: dict[str, Any], title: str) -> Table:
    """Return the table a person sees at the end of a run."""
    test, unigram = result["test_loss"], result["unigram_entropy"]
    finite = test is not None
    by_z = "" if result.get("clipped_by_z") is None else f", {result['clipped_by_z']} of them by z-score"
    skipped = f"; {result['skipped']} skipped, norm not finite" if result.get("skipped") else ""
    shown = Table(title=title, show_header=False, title_justify="left", min_width=60)
    for name, value, remark in (
        (
            "test loss",
            f"{test:.3f} nats/token" if finite else "not finite",
            f"{result['test_tokens']:,} held-out tokens",
        ),
        ("test perplexity", f"{math.exp(min(test, 700)):,.1f}" if finite else "not finite", _bits(result)),
        ("unigram entropy", f"{unigram:.3f} nats/token", "the best that a model without context can do"),
        ("loss spikes", str(result["spikes"]), result["spike_definition"]),
        ("steps clipped", f"{result['clipped_share']:.1%}", f"of {result['steps']:,}{by_z}{skipped}"),
        (
            "speed",
            f"{result['tokens_per_second']:,.0f} tokens/s",
            _speed(result),
        ),
        *_costs(result),
    ):
        shown.add_row(name, value, Text(remark, style="dim"))
    if injected := _injected(result):
        shown.add_row("bad batches", injected, Text("put in on purpose (data.corruption)", style="dim"))
    return shown
