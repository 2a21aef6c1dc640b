"""Collections of runs with modified numbers."""

import numpy as np

from experiments.paper.tables_and_figures import SPIKE_LAB, RunSpec
from experiments.run.collect import RunCollection
from tests.experiments.written_runs import modify


def with_result(collection: RunCollection, numbers: dict[RunSpec, dict], diverged: set | None = None) -> RunCollection:
    """Return the runs with modified numbers of result.json; a list has a value for each seed."""

    def change(spec, seed, run):
        modified = {
            key: value[seed] if isinstance(value, list) else value for key, value in numbers.get(spec, {}).items()
        }
        return run._replace(result={**run.result, **modified})

    return modify(collection, change, diverged or ())


def with_loss(collection: RunCollection, losses: dict[RunSpec, object], diverged: set | None = None) -> RunCollection:
    """Return the runs with losses from functions of seed, steps and the original loss."""

    def change(spec, seed, run):
        if spec not in losses:
            return run
        loss = losses[spec](seed, np.arange(len(run.metrics["loss"])), run.metrics["loss"])
        return run._replace(metrics={**run.metrics, "loss": loss})

    return modify(collection, change, diverged or ())


def with_excess_loss(collection: RunCollection, label: str, nats: list[float]) -> RunCollection:
    """Return the runs with a strategy's excess loss after corrupted batches set to `nats`, by seed."""

    def losses(seed, steps, own):
        run = collection.runs[SPIKE_LAB[label]["corrupted"], seed]
        loss = collection.runs[SPIKE_LAB[label]["baseline"], seed].metrics["loss"].copy()
        for step in run.config["data"]["corruption"]["steps"]:
            loss[step : step + 10] += nats[seed]
        return loss

    return with_loss(collection, {SPIKE_LAB[label]["corrupted"]: losses})
