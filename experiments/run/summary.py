"""The final numbers of a run, and the tables printed after a run and after a sweep."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from common.errors import shown
from common.run_files import value_before
from experiments.run.definitions import SPIKE_SIGMAS, SPIKE_WINDOW, loss_spikes
from experiments.run.read import Run, corrupted_rows, corrupted_steps

#: Maximum number of varied settings that have a column each in the table of a sweep.
MAX_COLUMNS = 3
#: Characters that a column of settings, and that of corrupted batches, has at least: else the settings share one.
LEAST_CHARACTERS = 5

#: Share of steps from which a bound beside the rule replaces the rule, and what the table then says.
MOSTLY, RULE_HARDLY_ACTS = 0.5, "of steps: the rule hardly acts; raise clip.max_grad_norm, or set it null"

#: Share of the schedule's learning rate below which a rule over updates holds a low rate.
LOW_RATE = 0.5

#: Phases of a step: the names in metrics.jsonl, and those in the table.
STEP_PHASES = {"data": "data", "forward_backward": "forward and backward", "clip": "clipping", "optimizer": "optimizer"}


def summarise(run: Run) -> dict[str, Any]:
    """Return the numbers of a whole run, as result.json has them. Those of a fork are over the steps before it, too.

    Returns:
        steps, tokens: in all.
        fork_step: the step of another run after which it begins; `None` if it begins at its first step.
        train_loss: mean over the last tenth of the steps, corrupted batches excluded; `None` if it is not finite or all
            are corrupted.
        spikes, spike_definition: see `loss_spikes`.
        clipped_share: fraction of steps whose gradients were scaled down.
        skipped: number of steps whose norm was not finite.
        clipped_by_z: number of steps that were clipped by their z-score; `None` for strategies without `spike`.
        clipped_by_max_share: fraction of steps that `clip.max_grad_norm` clipped further than the rule; `None` without
            this bound.
        update_clipped_share: fraction of steps on which a rule over updates acted; `None` without a rule.
        lowest_update_scale: lowest factor on the learning rate, or on that of a tensor; `None` without factors.
        highest_clipped_element_share: highest fraction of elements that SPAM clipped in a step; `None` without it.
        low_rate_steps: number of steps with a factor below 0.5 on all rates; `None` without such factors.
        low_rate_longest, low_rate_from: length of the longest row of such steps, and its first step; `None` for none.
        tokens_per_second, mfu, step_seconds: of the median step, so that compilation, saving and pauses do not count;
            `mfu` is `None` if the devices' peak is unknown; `step_seconds` has a value for each phase of a step. All
            are `None` if the times were lost with the file.
        changes: of settings, while the run trained, see `Run.changes`.
        saving_seconds: seconds in which training waited for a checkpoint.
        peak_memory_gib: maximum over the processes.
        corrupted_batches, corruption_kind: number and kind of the injected batches.
        masked_rows, masked_steps: sequences that the instance filter masked, and steps in which it masked all; `None`
            without a filter.
    """
    metrics = run.metrics
    corrupted = corrupted_steps(run)
    steps = int(metrics["step"][-1])
    tail = np.delete(metrics["loss"], sorted(corrupted_rows(run)))[-max(1, steps // 10) :]
    rates = _rates(metrics)
    return {
        "steps": steps,
        "tokens": int(metrics["tokens"][-1]),
        "fork_step": run.fork_step,
        "train_loss": float(tail.mean()) if len(tail) and np.isfinite(tail).all() else None,
        "spikes": len(loss_spikes(metrics["loss"], corrupted_rows(run))),
        "spike_definition": f"{SPIKE_SIGMAS:g} robust sigma over the last {SPIKE_WINDOW} steps",
        "clipped_share": float(np.mean((metrics["clipped"] > 0) & np.isfinite(metrics["grad_norm"]))),
        "skipped": int(np.sum(~np.isfinite(metrics["grad_norm"]))),
        "clipped_by_z": int(np.nansum(metrics["spike"])) if "spike" in metrics else None,
        "clipped_by_max_share": _bound_share(run),
        **_updates(metrics),
        "tokens_per_second": _median(rates),
        "mfu": _median(rates * metrics["mfu"] / metrics["tokens_per_second"]) if "mfu" in metrics else None,
        "step_seconds": {phase: _median(metrics.get(f"{phase}_seconds")) for phase in STEP_PHASES},
        "changes": run.changes,
        "saving_seconds": float(np.nansum(metrics["saving_seconds"])) if "saving_seconds" in metrics else None,
        "peak_memory_gib": _max(metrics.get("peak_memory_gib")),
        "corrupted_batches": len(corrupted),
        "corruption_kind": run.config["data"]["corruption"]["kind"] if corrupted else None,
        **_masked(run),
    }


def _masked(run: Run) -> dict[str, int | None]:
    """Return what the instance filter masked; see `summarise`."""
    if (masked := run.metrics.get("masked_rows")) is None:
        return {"masked_rows": None, "masked_steps": None}
    rows = run.config["trainer"]["global_batch_size"]
    return {"masked_rows": int(np.nansum(masked)), "masked_steps": int(np.sum(masked == rows))}


def _bound_share(run: Run) -> float | None:
    """Return the fraction of steps in which a bound beside the rule was binding; `None` without such a bound."""
    bound = run.metrics.get("clipped_by_max")
    if bound is None or np.isnan(run.argument("max_grad_norm")).all():
        return None
    return float(np.mean(bound == 1))


def _updates(metrics: Mapping[str, np.ndarray]) -> dict[str, float | int | None]:
    """Return what a rule over updates did; see `summarise`."""
    missing = np.array([])
    scale = metrics.get("update_scale", missing)
    scales, elements = metrics.get("lowest_update_scale", scale), metrics.get("clipped_element_share", missing)
    low = np.flatnonzero(scale < LOW_RATE)
    longest = max(np.split(low, np.flatnonzero(np.diff(low) > 1) + 1), key=len)
    acted = bool(np.isfinite(scales).any() or np.isfinite(elements).any())
    return {
        "update_clipped_share": float(np.mean(metrics["update_clipped"] == 1)) if acted else None,
        "lowest_update_scale": float(np.nanmin(scales)) if np.isfinite(scales).any() else None,
        "highest_clipped_element_share": _max(elements),
        "low_rate_steps": len(low) if np.isfinite(scale).any() else None,
        "low_rate_longest": len(longest) or None,
        "low_rate_from": int(metrics["step"][longest[0]]) if len(longest) else None,
    }


def _rates(metrics: dict[str, np.ndarray]) -> np.ndarray:
    """Return the tokens per second of each step, from the times of its phases if they are known; NaN if nothing is."""
    unknown = np.full(len(metrics["step"]), np.nan)
    times = [metrics.get(f"{phase}_seconds", unknown) for phase in STEP_PHASES]
    rates = np.diff(metrics["tokens"], prepend=0) / np.sum(times, axis=0)
    return np.where(np.isnan(rates), metrics.get("tokens_per_second", unknown), rates)


def _median(column: np.ndarray | None) -> float | None:
    """Return the median of a column's values; `None` if it has none."""
    return None if column is None or np.isnan(column).all() else float(np.nanmedian(column))


def _max(column: np.ndarray | None) -> float | None:
    """Return the largest of a column's values; `None` if it has none."""
    return None if column is None or np.isnan(column).all() else float(np.nanmax(column))


def comparison(jobs: list[tuple[dict[str, str], dict[str, Any]]], title: str = "sweep", width: int = 80) -> Table:
    """Return the table of a sweep, or of other runs: one row per run, with the best test loss in bold.

    Args:
        jobs: overrides (key to value) and result of each run. Only overrides that differ are shown.
        title: of the table.
        width: columns of the terminal. Numbers are whole from 60 on; settings share a column where each has no room.
    """
    keys = dict.fromkeys(key for overrides, _ in jobs for key in overrides)
    varied = [key for key in keys if len({overrides.get(key) for overrides, _ in jobs}) > 1]
    injected = any(result.get("corrupted_batches") for _, result in jobs)
    numbers = {
        "test\nloss": [_loss(result["test_loss"]) for _, result in jobs],
        "train\nloss": [_loss(result["train_loss"]) for _, result in jobs],
        "spikes": [str(result["spikes"]) for _, result in jobs],
        "clipped": [f"{result['clipped_share']:.1%}" for _, result in jobs],
    }
    taken = sum(max(map(len, [*name.split("\n"), *cells])) for name, cells in numbers.items())
    texts = len(varied) + injected
    merged = len(varied) > MAX_COLUMNS or width - taken - 3 * (len(numbers) + texts) - 1 < LEAST_CHARACTERS * texts
    sweep = Table(title=title, title_justify="left", show_lines=merged, padding=(0, 0 if merged else 1))
    for column in ["settings"] if merged else varied:
        sweep.add_column(column.replace(".", ".\n").replace("_", "\n_"), overflow="fold")
    for name in numbers:
        sweep.add_column(name, justify="right", no_wrap=True)
    if injected:
        sweep.add_column("corrupted\nbatches", justify="right", overflow="fold")
    best = min((result["test_loss"] for _, result in jobs if result["test_loss"] is not None), default=None)
    for (overrides, result), row in zip(jobs, zip(*numbers.values(), strict=True), strict=True):
        values = {key: overrides[key] for key in varied if key in overrides}
        cells = [" ".join(f"{key}={value}" for key, value in values.items())] if merged else [*map(values.get, varied)]
        corruption = [_corruption(result) or "none"] if injected else []
        style = "bold" if result["test_loss"] == best is not None else None
        sweep.add_row(*cells, *row, *corruption, style=style)
    return sweep


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _change_row(change: dict[str, Any]) -> tuple[str, str, str]:
    """Return the row on a setting that was changed while the run trained."""
    value = f"{change['setting']}={shown(change['to'])}"
    return "changed setting", value, f"since step {change['step']}; it was {value_before(change)}"


def _corruption(result: dict[str, Any]) -> str:
    """Return number and kind of the injected corrupted batches; empty if there are none."""
    count = result.get("corrupted_batches")
    return f"{count} {result['corruption_kind']}" if count else ""


def _resource_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return rows on the time of a step, on saving and on memory, as far as the result has them."""
    seconds = {phase: value for phase, value in (result.get("step_seconds") or {}).items() if value is not None}
    rows = []
    if total := sum(seconds.values()):
        shares = ", ".join(f"{STEP_PHASES.get(phase, phase)} {value / total:.1%}" for phase, value in seconds.items())
        rows.append(("time of a step", f"{total:.3f} s", shares))
    if saving := result.get("saving_seconds"):
        rows.append(("saving", f"{saving:.2f} s", "in all, in which steps waited for a checkpoint"))
    if (memory := result.get("peak_memory_gib")) is not None:
        rows.append(("peak memory", f"{memory:.1f} GiB", "maximum over the processes"))
    return rows


def _update_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return a row on what a rule over updates did, if there was one."""
    if (share := result.get("update_clipped_share")) is None:
        return []
    if (elements := result.get("highest_clipped_element_share")) is not None:
        return [("elements clipped", f"{share:.1%}", f"of steps; at most {elements:.2%} of the elements in one")]
    if result.get("low_rate_steps") is None:
        lowest = result["lowest_update_scale"]
        return [
            ("updates clipped", f"{share:.1%}", f"of steps; the lowest factor on the rate of a tensor was {lowest:.2f}")
        ]
    what = f"of steps; the rate was never below {LOW_RATE:g} of the schedule"
    if low := result.get("low_rate_steps"):
        steps = f"{low:,} step{'s' * (low > 1)}"
        if (longest := result.get("low_rate_longest")) is not None:  # runs of earlier versions do not have it
            steps += f", the longest time from step {result['low_rate_from']:,} for {longest:,}"
        what = f"of steps; the rate was below {LOW_RATE:g} of the schedule for {steps}"
    return [("updates clipped", f"{share:.1%}", f"{what}, at the lowest {result['lowest_update_scale']:.2f}")]


def table(result: dict[str, Any], title: str) -> Table:
    """Return the table printed at the end of a run."""
    test, bits, mfu = result["test_loss"], result.get("test_bits_per_byte"), result.get("mfu")
    rate = result["tokens_per_second"]
    loss, perplexity, unigram = "not finite", "not finite", result["unigram_entropy"]
    if test is not None:
        loss, perplexity = f"{test:.3f} nats/token", f"{math.exp(min(test, 700)):,.1f}"
    by_z = "" if result.get("clipped_by_z") is None else f", {result['clipped_by_z']} of them by z-score"
    skipped = f"; {result['skipped']} skipped, norm not finite" if result.get("skipped") else ""
    size = f"{result['parameters'] / 1e6:.2f}M parameters"
    bound = result.get("clipped_by_max_share") or 0.0
    rows = [
        ("test loss", loss, f"{result['test_tokens']:,} test tokens"),
        ("test perplexity", perplexity, "" if bits is None else f"{bits:.3f} bits per byte"),
        ("unigram entropy", f"{unigram:.3f} nats/token", "the lowest loss of a model without context"),
        ("loss spikes", str(result["spikes"]), result["spike_definition"]),
        ("steps clipped", f"{result['clipped_share']:.1%}", f"of {result['steps']:,}{by_z}{skipped}"),
        *([("clipped by the bound", f"{bound:.1%}", RULE_HARDLY_ACTS)] if bound >= MOSTLY else []),
        *_update_rows(result),
        (
            "speed",
            "unknown" if rate is None else f"{rate:,.0f} tokens/s",
            size if mfu is None else f"{size}, {mfu:.1%} MFU",
        ),
        *_resource_rows(result),
        *map(_change_row, result.get("changes", ())),
    ]
    if (fork := result.get("fork_step")) is not None:
        rows.append(("fork", f"after step {fork:,}", "the steps up to there are another run's, and count here"))
    if corruption := _corruption(result):
        rows.append(("corrupted batches", corruption, "injected (data.corruption)"))
    if (masked := result.get("masked_rows")) is not None:
        steps = result.get("masked_steps") or 0
        remark = f"by the instance filter; {steps} step{'' if steps == 1 else 's'} skipped, all rows masked"
        rows.append(("sequences masked", f"{masked:,}", remark))
    summary = Table(title=title, show_header=False, title_justify="left", min_width=60)
    for name, value, remark in rows:
        summary.add_row(name, value, Text(remark, style="dim"))
    return summary
