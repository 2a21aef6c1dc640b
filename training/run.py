"""One training run, from a checked configuration to its final evaluation: read `train` and `_train_from` first.

`build_run` makes the parts of a run. `training/callback.py` calls them around each step. What depends on private names
of Lightning is in `training/lightning_internals.py`.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from rich.console import Console

from common.errors import UserError, prefix_errors
from data import (
    BatchCorruption,
    BatchShare,
    ShuffledDataset,
    SourceError,
    StreamingDataset,
    TokenDataset,
    Tokens,
    TrainLoader,
    corpus_from,
    load_tokenizer,
    prepare,
    unigram_entropy,
)
from training.callback import ClipCallback, RunCallback
from training.checkpoint.fork import ForkSource
from training.checkpoint.format import step_of
from training.checkpoint.manager import CheckpointManager
from training.checkpoint.resume import resume_checkpoint, rewind
from training.config.schema import Config
from training.config.strategy import clipping_strategy
from training.launch.plan import memory_warning
from training.lightning_internals import interrupts_as_raised, keep_our_signal_handlers, skip_sigterm_broadcast
from training.module import PretrainingModule, build_module
from training.monitor.divergence import DivergenceDetector
from training.monitor.metrics import MetricsRecorder, Row
from training.monitor.nonfinite import NonFiniteGuard, RestartFromCheckpoint
from training.monitor.progress import ProgressDisplay
from training.run_dir import RunDir
from training.runtime.coordinated_stop import CoordinatedStop
from training.runtime.distributed import broadcast_from_rank0, init_process_group, is_distributed, rank
from training.runtime.hardware import available_memory, flops_per_token, peak_flops
from training.runtime.signals import Interrupted, override_handler
from training.validation.loss import LossValidator
from training.validation.report import EvaluationReport
from training.validation.tasks import TaskEvaluator, load_eval_tasks
from training.validation.validation_set import ValidationSet, bits_per_byte

if TYPE_CHECKING:
    from training.monitor.wandb_run import WandbRun


class Start(NamedTuple):
    """Where a run starts or resumes.

    Attributes:
        checkpoint: checkpoint to load; `None`: new weights.
        skipped_batches: global batches that the run has skipped before.
        fork: the other run to which the checkpoint belongs; `None`: it is this run's own.
        fork_step: step of the other run that this one can be rewound to; 0: none.
    """

    checkpoint: Path | None
    skipped_batches: int
    fork: ForkSource | None
    fork_step: int

    @property
    def step(self) -> int:
        """Steps that are done."""
        return step_of(self.checkpoint) if self.checkpoint else 0

    @property
    def reset_clipper(self) -> bool:
        """Whether the clipper's statistics in the checkpoint belong to another strategy."""
        return self.fork is not None and not self.fork.same_clipping


class Run(NamedTuple):
    """What `build_run` makes: Lightning's Trainer, what it trains, and the parts that are needed outside of it."""

    trainer: pl.Trainer
    module: PretrainingModule
    loader: TrainLoader
    stop: CoordinatedStop
    guard: NonFiniteGuard
    display: ProgressDisplay
    wandb: "WandbRun | None"


def prepare_tokens(config: Config, console: Console) -> Tokens:
    """Return the tokens of `config.data`, prepared if they are not in the cache yet."""
    with prefix_errors("data"):
        tokens = prepare(corpus_from(config.data), Path(config.paths.cache), config.data.sequence_length, console)
        batch_corruption(config, tokens)  # raises if the tokenizer does not allow it
        return tokens


def train(
    config: Config,
    run_dir: RunDir,
    tokens: Tokens,
    console: Console,
    fork: ForkSource | None = None,
    listeners: Sequence[Callable[[Row], None]] = (),
) -> dict[str, Any]:
    """Train from the last checkpoint in the run folder, if there is one, and evaluate. All processes call it.

    Args:
        config: checked configuration.
        run_dir: run folder, which rank 0 has acquired.
        tokens: prepared tokens.
        console: shows the progress.
        fork: step of another run to start from, if the run folder has no checkpoint.
        listeners: called on rank 0 with each row of metrics.jsonl, after it is written.

    Returns:
        `test_loss` and `unigram_entropy` in nats per token, `test_bits_per_byte`, `test_tokens`, `parameters`, and
        `data_fingerprint`, which identifies the tokens.

    Raises:
        Interrupted: a signal ended training; the run is saved.
        RunError: the run cannot continue.
        UserError: the training text cannot be read.
    """
    quiet_libraries()
    while True:
        pl.seed_everything(config.seed, verbose=False)
        init_process_group(config.trainer.accelerator == "gpu")
        start = broadcast_from_rank0(partial(find_start, run_dir, fork, console))
        try:
            return _train_from(start, config, run_dir, tokens, console, listeners)
        except RestartFromCheckpoint:  # the run was rewound
            continue


def _train_from(
    start: Start,
    config: Config,
    run_dir: RunDir,
    tokens: Tokens,
    console: Console,
    listeners: Sequence[Callable[[Row], None]],
) -> dict[str, Any]:
    """Train to the last step and evaluate, see `train`.

    Raises:
        RestartFromCheckpoint: the run folder was rewound.
    """
    run = build_run(start, config, run_dir, tokens, console, listeners)
    test_set = validation_set(config, tokens, console, config.data.max_val_tokens)
    try:
        with interrupts_as_raised(lambda: run.trainer.global_step):
            fit(run, start)
            console.print(f"evaluating on {test_set.tokens:,} held-out tokens")
            run.trainer.test(run.module, dataloaders=test_set, verbose=False)
            if run.wandb is not None:
                run.wandb.log({"test_loss": run.module.test_loss}, config.trainer.max_steps)
    except SourceError as error:
        raise UserError(f"data.{error} (after step {run.trainer.global_step})") from error
    finally:
        run.loader.sequences.close()
        if run.wandb is not None:
            run.wandb.finish()
    return final_metrics(config, tokens, run.module.test_loss, test_set)


def fit(run: Run, start: Start) -> None:
    """Train to the last step, unless a signal or too many non-finite steps end training before.

    Raises:
        Interrupted: a signal ended training.
        RestartFromCheckpoint: the run folder was rewound.
        RunError: the run cannot continue.
    """
    with run.display, override_handler(run.stop.request):
        # Checkpoints are our own files, and hold more than tensors.
        run.trainer.fit(run.module, train_dataloaders=run.loader, ckpt_path=start.checkpoint, weights_only=False)
    rewound_to = run.guard.rewind() if run.guard.limit_reached else None
    if signum := run.stop.global_signal or run.stop.local_signal:
        raise Interrupted(signum, run.trainer.global_step if rewound_to is None else rewound_to)
    if rewound_to is not None:
        raise RestartFromCheckpoint


def build_run(
    start: Start,
    config: Config,
    run_dir: RunDir,
    tokens: Tokens,
    console: Console,
    listeners: Sequence[Callable[[Row], None]],
) -> Run:
    """Build the parts of a run, and report how it starts."""
    module = build_module(config, fresh=start.checkpoint is None)
    loader = build_loader(config, tokens, start.skipped_batches)
    report_start(start, config, run_dir, loader, console)

    strategy = clipping_strategy(config.clip)
    strategy.max_consecutive_nonfinite = None  # a run that diverges ends like any other, unless the guard ends it
    wandb = open_wandb(config, run_dir, console)
    display = ProgressDisplay(config.trainer.max_steps, start.step, console)
    metrics = MetricsRecorder(
        run_dir,
        strategy,
        log_every=config.trainer.log_every,
        tokens_per_step=config.trainer.global_batch_size * config.data.sequence_length,
        peak_tokens_per_second=peak_tokens_per_second(config),
        listeners=[*listeners, *([] if wandb is None else [wandb]), display],
        console=console,
    )
    divergence = DivergenceDetector()
    guard = NonFiniteGuard(
        run_dir, config.trainer, start.fork_step, divergence.is_healthy, partial(rewind, run_dir), console
    )
    stop = CoordinatedStop()
    checkpoints = CheckpointManager(run_dir, config, divergence.is_healthy, metrics.assert_flushed_to, console)

    tokenizer = load_tokenizer(str(tokens.folder))
    held_out = validation_set(config, tokens, console, config.trainer.val_tokens)
    report = EvaluationReport(console, (lambda numbers, step: None) if wandb is None else wandb.log)
    loss_validator = LossValidator(run_dir, config.trainer, held_out, tokenizer, report)
    tasks = load_eval_tasks(config)
    task_evaluator = TaskEvaluator(run_dir, config.trainer, config.eval, tasks, tokenizer, stop.sync, report)

    callback = RunCallback(metrics, divergence, guard, stop, checkpoints, loss_validator, task_evaluator)
    clipper = ClipCallback(strategy, callback.timer, reset_state=start.reset_clipper)
    trainer = build_trainer(config, run_dir, [clipper, callback])
    return Run(trainer, module, loader, stop, guard, display, wandb)


def find_start(run_dir: RunDir, fork: ForkSource | None, console: Console) -> Start:
    """Return where a run starts or resumes, and make its folder that of the run at this step. Rank 0 calls it."""
    fork_step = 0 if fork is None else fork.step
    checkpoint = resume_checkpoint(run_dir, console.print, start=fork_step)
    if checkpoint is None and fork is not None:
        fork.copy_history(run_dir)
        return Start(fork.checkpoint, run_dir.skipped_batches(fork.step), fork, fork_step)
    step = step_of(checkpoint) if checkpoint else 0
    return Start(checkpoint, run_dir.skipped_batches(step), None, fork_step)


def report_start(start: Start, config: Config, run_dir: RunDir, loader: TrainLoader, console: Console) -> None:
    """Print what is trained from where, and a warning if it may not fit the memory."""
    trainer = config.trainer
    if start.fork is not None:
        reset = ", with the clipper's statistics reset" if start.reset_clipper else ""
        console.print(f"training {run_dir.path} from {start.checkpoint}{reset}")
    elif start.checkpoint:
        console.print(f"continuing {run_dir.path} after step {start.step} of {trainer.max_steps}")
    else:
        epochs = loader.total / len(loader.sequences) if isinstance(loader.sequences, ShuffledDataset) else 0.0
        console.print(
            f"training {run_dir.path}: {config.model.parameters / 1e6:.2f}M parameters, {trainer.max_steps} steps of "
            f"{trainer.global_batch_size} x {config.data.sequence_length} tokens"
            + (f", {epochs:.1f} passes over the text" if epochs > 1 else "")
        )
    if warning := memory_warning(config, available_memory(trainer.accelerator, trainer.devices)):
        console.print(warning)
    if start.checkpoint is None and config.model.init_from is not None:
        console.print(f"starting from the weights in {config.model.init_from}")


def build_loader(config: Config, tokens: Tokens, skipped_batches: int) -> TrainLoader:
    """Return the loader of this process's micro-batches."""
    trainer = config.trainer
    return TrainLoader(
        training_sequences(config, tokens),
        tokens.fingerprint,
        trainer.max_steps,
        BatchShare(trainer.global_batch_size, trainer.micro_batch_size, rank(), trainer.world_size),
        batch_corruption(config, tokens),
        skipped_batches=skipped_batches,
    )


def training_sequences(config: Config, tokens: Tokens) -> ShuffledDataset | StreamingDataset:
    """Return the sequences of a run in their order, read from prepared tokens or tokenized while training."""
    data = config.data
    if data.mode == "prepared":
        return ShuffledDataset(TokenDataset(tokens.train, data.sequence_length), config.seed)
    return StreamingDataset(
        corpus_from(data).pinned_to(tokens.facts["commits"]),
        load_tokenizer(str(tokens.folder)),
        threshold=tokens.facts["threshold"],
        length=data.sequence_length,
        seed=config.seed,
        block_tokens=int(data.shuffle_tokens),
    )


def batch_corruption(config: Config, tokens: Tokens) -> BatchCorruption | None:
    """Return what replaces batches in this run; `None` if nothing does."""
    steps = list(config.data.corruption.steps)
    if not steps:
        return None
    return BatchCorruption(steps, config.data.corruption.kind, config.seed, load_tokenizer(str(tokens.folder)))


def validation_set(config: Config, tokens: Tokens, console: Console, max_tokens: float | None) -> ValidationSet:
    """Return this process's batches of the held-out text; `max_tokens=None` is all of it."""
    return ValidationSet(
        TokenDataset(tokens.test, config.data.sequence_length),
        4 * config.trainer.micro_batch_size,
        max_tokens,
        console,
        rank(),
        config.trainer.world_size,
    )


def build_trainer(config: Config, run_dir: RunDir, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Return Lightning's Trainer, without what the callbacks do: logging, checkpoints, progress, signals."""
    trainer = pl.Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.nodes,
        strategy=lightning_strategy(config),
        precision="32-true" if config.trainer.sharded else config.trainer.precision,  # FSDP2 has its own policy
        max_steps=config.trainer.max_steps,
        accumulate_grad_batches=config.trainer.grad_accum_steps,
        callbacks=callbacks,
        logger=False,
        default_root_dir=run_dir.path,
        use_distributed_sampler=False,
        plugins=[TorchElasticEnvironment() if is_distributed() else LightningEnvironment()],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    keep_our_signal_handlers(trainer)
    skip_sigterm_broadcast(trainer)
    return trainer


def lightning_strategy(config: Config) -> Any:
    """Return the argument of Lightning's Trainer for `config.trainer.strategy`."""
    if config.trainer.sharded:
        # Lightning checks only the product of the two sizes; the mesh is made in `training/module.py`.
        return ModelParallelStrategy(config.trainer.dp_replicate, config.trainer.dp_shard)
    return DDPStrategy(gradient_as_bucket_view=True) if config.trainer.strategy == "ddp" else "auto"


def open_wandb(config: Config, run_dir: RunDir, console: Console) -> "WandbRun | None":
    """Return the run's listener that logs to wandb, on rank 0 if it is chosen."""
    if config.logger.name != "wandb" or rank() > 0:
        return None
    from training.monitor.wandb_run import WandbRun

    return WandbRun(config, run_dir.path, console)


def peak_tokens_per_second(config: Config) -> float | None:
    """Return the tokens per second of all devices at their peak FLOP/s; `None` if the peak is not known."""
    peak = peak_flops(torch.cuda.get_device_name()) if config.trainer.accelerator == "gpu" else None
    if peak is None:
        return None
    return config.trainer.world_size * peak / flops_per_token(config.model.llama, config.data.sequence_length)


def final_metrics(config: Config, tokens: Tokens, test_loss: float, test_set: ValidationSet) -> dict[str, Any]:
    """Return the results of the final evaluation, see `train`."""
    bits = None
    if rank() == 0:
        size = test_set.bytes(load_tokenizer(str(tokens.folder)))
        bits = bits_per_byte(test_loss, test_set.tokens, size)
    predicted = tokens.test.read(1, test_set.tokens + 1)
    return {
        "test_loss": test_loss,
        "test_bits_per_byte": bits,
        "unigram_entropy": unigram_entropy(predicted),
        "test_tokens": len(predicted),
        "parameters": config.model.parameters,
        "data_fingerprint": tokens.fingerprint,
    }


def quiet_libraries() -> None:
    """Silence notices that do not concern this run. Warnings that could matter stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)  # compiled selective recomputation
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # see training/runtime/slurm.py
