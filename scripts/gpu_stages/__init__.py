"""Stages of gpu_check.py, in their order. Each module has a function `run`, which saves results as it has them."""
