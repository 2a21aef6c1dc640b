"""The training run: configuration checks, run folder, Lightning module, callbacks."""
