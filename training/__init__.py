"""The training run: configuration checks, run folder, Lightning module, callbacks."""

import os

# Libraries show no progress bars between ours. tqdm reads this when it is imported.
os.environ.setdefault("TQDM_DISABLE", "1")
