"""What each key of a configuration may be, taken by itself."""

import re
from collections.abc import Callable
from typing import Any

from data import KINDS
from models.parallel import ACTIVATION_CHECKPOINTING
from training.runtime.hardware import PEAK_FLOPS, peak
from zclip.arguments import is_count, is_number


def _positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _folder_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.=,+-]+", value) is not None and value.strip(".") != ""


Rule = tuple[Callable[[Any], bool], str]

_POSITIVE = (_positive, "a number above 0")
_COUNT = (is_count, "an integer from 1")
_COUNT_OR_NULL = (lambda v: v is None or is_count(v), "an integer from 1, or null")
_FOLDER = (lambda v: isinstance(v, str) and v != "", "a folder")
_FRACTION = (lambda v: is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
_NAME = (_folder_name, "a folder name of letters, digits and . _ = , + -")
_STEPS = (
    lambda v: isinstance(v, list) and all(is_count(step) for step in v) and len(set(v)) == len(v),
    "a list of different steps, counted from 1, such as [100,200]",
)
_BAD_KIND = (lambda v: isinstance(v, str) and v in KINDS, f"one of {', '.join(KINDS)}")

#: single: one process; ddp: a whole model in each; fsdp: the model sharded over all; hsdp: over those of each replica.
STRATEGIES = ("single", "ddp", "fsdp", "hsdp")

#: Of the group eval, which scripts/evaluate.py has too.
EVAL_RULES: dict[str, Rule] = {
    "eval.tasks": (
        lambda v: isinstance(v, list) and v != [] and all(isinstance(task, str) for task in v),
        "a list of tasks, as [hellaswag]",
    ),
    "eval.num_fewshot": (
        lambda v: (
            v != [] and all(type(number) is int and number >= 0 for number in (v if isinstance(v, list) else [v]))
        ),
        "integers from 0, as 0 or [0,5]",
    ),
    "eval.limit": _COUNT_OR_NULL,
    "eval.seed": (lambda v: type(v) is int, "an integer"),
    "eval.batch_tokens": _COUNT_OR_NULL,
    "eval.data_dir": (lambda v: v is None or (isinstance(v, str) and v != ""), "a folder, or null"),
}

#: Key -> (test of the value, what is allowed). Keys of `model` and `clip` are the arguments of what they make.
RULES: dict[str, Rule] = {
    "lr": _POSITIVE,
    "seed": (lambda v: type(v) is int and 0 <= v < 2**32, "an integer from 0 to 2**32 - 1"),
    "name": (lambda v: v is None or _folder_name(v), f"{_NAME[1]}, or null"),
    "experiment": _NAME,
    "model.name": _NAME,
    "clip.name": _NAME,
    "model.init_from": (lambda v: v is None or (isinstance(v, str) and v != ""), "a Hugging Face folder, or null"),
    "resume_from": (lambda v: v is None or isinstance(v, str), "a run folder and a step, as FOLDER@STEP, or null"),
    "plan": (lambda v: isinstance(v, bool), "true or false"),
    "print_run_dir": (lambda v: isinstance(v, bool), "true or false"),
    "paper.suite": (lambda v: v is None or isinstance(v, str), "set by experiment="),
    "paper.scale": _NAME,
    "paper.lr": _POSITIVE,
    "paper.lr_scale": _POSITIVE,
    "paper.corruption_steps": _STEPS,
    "paper.corruption_kind": _BAD_KIND,
    "paper.lab_steps": _STEPS,
    "hardware.device": (lambda v: isinstance(v, str) and peak(v) is not None, f"one of {', '.join(PEAK_FLOPS)}"),
    "hardware.memory_gib": _POSITIVE,
    "hardware.mfu": (lambda v: is_number(v) and 0 < v <= 1, "a number above 0 and at most 1"),
    "paths.runs": _FOLDER,
    "paths.cache": _FOLDER,
    "data.name": _NAME,
    "data.path": (lambda v: v is None or (isinstance(v, str) and v != ""), "a file, a folder or a pattern, or null"),
    "data.column": (lambda v: isinstance(v, str) and v != "", "the name of a column"),
    "data.sources": (lambda v: isinstance(v, dict) and any(v.values()), "sources by their names, one at least"),
    "data.tokenizer": (
        lambda v: v is None or (isinstance(v, str) and v != ""),
        "a tokenizer.json, a folder that holds one, a name on the hub, or null for one trained on the text",
    ),
    "data.mode": (lambda v: v in ("prepared", "stream"), "prepared or stream"),
    "data.shuffle_tokens": (lambda v: is_number(v) and v >= 1, "a number from 1"),
    "data.deduplicate": (lambda v: isinstance(v, bool), "true or false"),
    "data.max_tokens": (
        lambda v: v is None or (is_number(v) and v >= 1),
        "a number from 1, or null for no limit",
    ),
    "data.max_val_tokens": (
        lambda v: v is None or (is_number(v) and v >= 1),
        "a number from 1, or null for all held-out tokens",
    ),
    "data.sequence_length": _COUNT,
    "data.vocab_size": _COUNT,
    "data.val_fraction": (lambda v: is_number(v) and 0 < v < 1, "a number above 0 and below 1"),
    "data.corruption.steps": _STEPS,
    "data.corruption.kind": _BAD_KIND,
    "optim.name": (lambda v: v == "adamw", "adamw"),
    "optim.betas": (
        lambda v: isinstance(v, list) and len(v) == 2 and all(is_number(b) and 0 <= b < 1 for b in v),
        "two numbers from 0 to below 1",
    ),
    "optim.eps": _POSITIVE,
    "optim.weight_decay": (lambda v: is_number(v) and v >= 0, "a number from 0"),
    "optim.z_loss": (lambda v: is_number(v) and v >= 0, "a number from 0"),
    "optim.fused": (lambda v: isinstance(v, bool), "true or false"),
    "optim.warmup_fraction": _FRACTION,
    "optim.final_lr_fraction": _FRACTION,
    "trainer.accelerator": (lambda v: v in ("cpu", "gpu"), "cpu or gpu"),
    "trainer.strategy": (lambda v: v in STRATEGIES, f"one of {', '.join(STRATEGIES)}"),
    "trainer.nodes": _COUNT,
    "trainer.devices": _COUNT,
    "trainer.dp_replicate": _COUNT,
    "trainer.activation_checkpointing": (
        lambda v: v in ACTIVATION_CHECKPOINTING,
        f"one of {', '.join(ACTIVATION_CHECKPOINTING)}",
    ),
    "trainer.compile": (lambda v: isinstance(v, bool), "true or false"),
    "trainer.precision": (lambda v: v in ("32-true", "bf16-mixed"), "32-true or bf16-mixed"),
    "trainer.max_steps": _COUNT,
    "trainer.global_batch_size": _COUNT,
    "trainer.micro_batch_size": _COUNT,
    "trainer.log_every": _COUNT,
    "trainer.checkpoint_every": _COUNT,
    "trainer.keep_last": _COUNT,
    "trainer.on_nonfinite": (lambda v: v in ("skip", "stop", "rewind"), "skip, stop or rewind"),
    "trainer.max_consecutive_nonfinite": _COUNT,
    "trainer.max_rewinds": _COUNT,
    "trainer.keep_every": _COUNT_OR_NULL,
    "trainer.async_save": (lambda v: isinstance(v, bool), "true or false"),
    "trainer.val_every": _COUNT_OR_NULL,
    "trainer.val_tokens": _COUNT,
    "trainer.eval_every": _COUNT_OR_NULL,
    **EVAL_RULES,
    "logger.name": (lambda v: v in ("jsonl", "wandb"), "jsonl or wandb"),
}
WANDB_RULES: dict[str, Rule] = {
    "logger.project": (
        lambda v: isinstance(v, str) and re.fullmatch(r"[^/\\#?%:]{1,128}", v) is not None,
        "a name of at most 128 characters without / \\ # ? % :",
    ),
    "logger.entity": (lambda v: v is None or isinstance(v, str), "a wandb user or team, or null"),
    "logger.tags": (lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v), "a list of words"),
}
