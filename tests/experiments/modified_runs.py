"""Runs with other numbers than those they were written with."""

import numpy as np

from experiments.paper.collect import Found
from experiments.paper.judging import at_rates
from experiments.paper.suites import TABLES, Setting

#: The settings of Table 2 by learning rate, and those of the spike lab by strategy.
RATES = at_rates()
LAB = {row.label: row.settings for row in TABLES["spike_lab"].rows}


def changed(found: Found, change, diverged: set | None = None) -> Found:
    """The runs as `change` makes them of (setting, seed, run)."""
    runs = {key: change(*key, run) for key, run in found.runs.items()}
    return found._replace(runs=runs, diverged=set(diverged or ()))


def with_result(found: Found, numbers: dict[Setting, dict], diverged: set | None = None) -> Found:
    """The runs with other numbers of result.json; a number may be a list, by seed."""

    def change(setting, seed, run):
        own = {
            key: value[seed] if isinstance(value, list) else value for key, value in numbers.get(setting, {}).items()
        }
        return run._replace(result={**run.result, **own})

    return changed(found, change, diverged)


def with_loss(found: Found, losses: dict[Setting, object], diverged: set | None = None) -> Found:
    """The runs with other losses, of a function of seed and steps."""

    def change(setting, seed, run):
        if setting not in losses:
            return run
        loss = losses[setting](seed, np.arange(len(run.metrics["loss"])), run.metrics["loss"])
        return run._replace(metrics={**run.metrics, "loss": loss})

    return changed(found, change, diverged)


def after_bad(found: Found, label: str, nats: list[float]) -> Found:
    """The runs with a strategy's losses in the lab so much above the undisturbed ones after bad batches, by seed."""

    def losses(seed, steps, own):
        run = found.runs[LAB[label]["bad"], seed]
        loss = found.runs[LAB[label]["good"], seed].metrics["loss"].copy()
        for step in run.config["data"]["corruption"]["steps"]:
            loss[step : step + 10] += nats[seed]
        return loss

    return with_loss(found, {LAB[label]["bad"]: losses})


def without(found: Found, *keys) -> Found:
    return found._replace(runs={key: run for key, run in found.runs.items() if key not in keys})
