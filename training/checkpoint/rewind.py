"""How a run folder is taken back to an earlier step.

`NonFiniteGuard` in `training/monitor/health.py` decides on a rewind, `train` in `training/run.py` then builds the run
again, and `TrainLoader` in `data/loader.py` skips the batches that led to the failure.
"""

import json

from common.files import remove, write_atomic
from training.run_dir import RunDir


def rewind(run_dir: RunDir, to_step: int, from_step: int) -> None:
    """Take a run folder back from one step to the checkpoint of another.

    The lines that are removed from metrics.jsonl go into rewound-N.jsonl. If this is interrupted, the rewind has not
    happened: the run comes to the same step again.
    """
    skipped = run_dir.skipped_batches(from_step) + from_step - to_step
    rewinds = [*run_dir.rewinds(), {"from_step": from_step, "to_step": to_step, "skipped_batches": skipped}]
    for step in reversed(run_dir.checkpoint_steps()):
        if step > to_step:
            remove(run_dir.checkpoint(step))
    removed = [json.dumps(row) + "\n" for step, row in run_dir.metrics_rows().items() if step > to_step]
    write_atomic(run_dir.path / f"rewound-{len(rewinds)}.jsonl", "".join(removed))
    run_dir.write_rewinds(rewinds)
