"""One training run, from a checked configuration to its final evaluation: read `train` first.

`build_run` makes the parts of a run. `training/callback.py` calls them around each step. What depends on private names
of Lightning is in `training/lightning_internals.py`.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from rich.console import Console

from common.errors import UserError, prefix_errors, shown
from common.run_files import corrupted_steps
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
    prepare,
    read_tokenizer,
    unigram_entropy,
)
from training.callback import RunCallback, TimedClippingCallback, UpdateRuleCallback
from training.checkpoint.fork import ForkSource
from training.checkpoint.manager import CheckpointManager
from training.checkpoint.resume import Start, prepare_start
from training.checkpoint.rewind import rewind
from training.config.identity import shared_settings
from training.config.live import describe_changes
from training.config.schema import Config
from training.config.strategy import clipping_strategy, update_rule
from training.launch.plan import memory_warning
from training.lightning_internals import (
    interrupts_as_raised,
    keep_our_signal_handlers,
    no_trainer_variables,
    skip_sigterm_broadcast,
)
from training.module import PretrainingModule
from training.monitor.health import NonFiniteGuard
from training.monitor.low_rate import LowRateWarning
from training.monitor.metrics import Listener, MetricsRecorder
from training.monitor.progress import ProgressDisplay
from training.monitor.wandb_run import WandbRun
from training.run_dir import RunDir
from training.runtime.coordinated_stop import CoordinatedStop
from training.runtime.distributed import (
    broadcast_from_rank0,
    gather_from_all,
    init_process_group,
    is_distributed,
    rank,
)
from training.runtime.hardware import available_memory
from training.runtime.signals import Interrupted, override_handler
from training.validation.loss import LossValidator, ValidationSet, bits_per_byte
from training.validation.report import EvaluationReport
from training.validation.tasks import LoadedTasks, TaskEvaluator


class Run(NamedTuple):
    """What `build_run` makes: Lightning's Trainer, what it trains, and the parts that are needed outside of it."""

    trainer: pl.Trainer
    module: PretrainingModule
    loader: TrainLoader
    stop: CoordinatedStop
    guard: NonFiniteGuard
    display: ProgressDisplay
    loggers: list[WandbRun]


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
    tasks: LoadedTasks,
    console: Console,
    fork: ForkSource | None = None,
    listeners: Sequence[Listener] = (),
) -> dict[str, Any]:
    """Train from the last checkpoint in the run folder, if there is one, and evaluate. All processes call it.

    Rank 0 has acquired the folder. It calls the listeners with each line of metrics.jsonl, after it is written. The
    fork is used if the folder has no checkpoint. The tasks are scored every `trainer.eval_every` steps.

    Returns:
        `test_loss` and `unigram_entropy` in nats per token, `test_bits_per_byte`, `test_tokens`, `parameters`, and
        `data_fingerprint`, which identifies the tokens. Other processes than rank 0 get `test_loss` alone.

    Raises:
        Interrupted: a signal ended training; the run is saved.
        RunError: the run cannot continue.
        UserError: the training text cannot be read, or the processes were started with different settings.
    """
    quiet_libraries()
    while True:
        pl.seed_everything(config.seed, verbose=False)
        init_process_group(config.trainer.accelerator == "gpu")
        check_agreement(config, tokens)
        start = broadcast_from_rank0(partial(prepare_start, run_dir, fork, console.print))
        run = build_run(start, config, run_dir, tokens, tasks, console, listeners)
        test_set = validation_set(config, tokens, console, config.data.max_val_tokens)
        try:
            with interrupts_as_raised(run.trainer):
                if not fit(run, start):
                    continue  # after a rewind, all parts are built again
                console.print(f"evaluating on {test_set.tokens:,} held-out tokens")
                # The set is the only batch of an iterable. Lightning would take a list for several loaders.
                run.trainer.test(run.module, dataloaders={test_set}, verbose=False)
                for logger in run.loggers:
                    logger(config.trainer.max_steps, {"test_loss": run.module.test_loss})
        except SourceError as error:
            raise UserError(f"data.{error} (after step {run.trainer.global_step})") from error
        finally:
            run.loader.sequences.close()
            for logger in run.loggers:
                logger.finish()
        return final_metrics(config, tokens, run.module.test_loss, test_set)


def check_agreement(config: Config, tokens: Tokens) -> None:
    """Raise `UserError` in all processes unless they have the same settings and tokens. All processes call it."""
    first, *others = gather_from_all(shared_settings(config) | {"tokens": tokens.fingerprint})
    for number, other in enumerate(others, 1):
        if changed := sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key)):
            pairs = [f"{key}={shown(other.get(key))} (process 0: {shown(first.get(key))})" for key in changed[:4]]
            raise UserError(
                f"process {number} of the run was started with other settings or text than process 0, "
                f"{', '.join(pairs)}: start all with the same"
            )


def fit(run: Run, start: Start) -> bool:
    """Train to the last step, and return whether it was reached; otherwise the run folder was rewound.

    Raises:
        Interrupted: a signal ended training.
        RunError: the run cannot continue.
    """
    with run.display, override_handler(run.stop.request):
        # Checkpoints are our own files, and hold more than tensors.
        run.trainer.fit(run.module, train_dataloaders=run.loader, ckpt_path=start.checkpoint, weights_only=True)
    # After a rewind the folder already ends at an earlier step, which is then the one to report.
    rewound_to = run.guard.rewind() if run.guard.limit_reached else None
    if signum := run.stop.global_signal or run.stop.local_signal:
        raise Interrupted(signum, run.trainer.global_step if rewound_to is None else rewound_to)
    return rewound_to is None


def build_run(
    start: Start,
    config: Config,
    run_dir: RunDir,
    tokens: Tokens,
    tasks: LoadedTasks,
    console: Console,
    listeners: Sequence[Listener],
) -> Run:
    """Build the parts of a run, and report how it starts."""
    module = PretrainingModule(config, fresh=start.checkpoint is None)
    loader = build_loader(config, tokens, start)
    report_start(start, config, run_dir, loader, console)

    strategy = clipping_strategy(config.clip)
    strategy.max_consecutive_nonfinite = None  # the clipper must not raise: `NonFiniteGuard` decides
    use_wandb = config.logger.name == "wandb" and rank() == 0
    loggers = [WandbRun(config, run_dir.path, console)] if use_wandb else []
    display = ProgressDisplay(config.trainer.max_steps, start.step, console)
    rule = update_rule(config.update)
    low_rate = [] if rule is None else [LowRateWarning(console)]
    metrics = MetricsRecorder(run_dir, config, strategy, [*listeners, *loggers, display, *low_rate], console, rule)
    guard = NonFiniteGuard(run_dir, config.trainer, start.fork_step, partial(rewind, run_dir), console)
    stop = CoordinatedStop()
    checkpoints = CheckpointManager(run_dir, config, guard.divergence.is_healthy, console)

    tokenizer = read_tokenizer(tokens.folder)
    held_out = validation_set(config, tokens, console, config.trainer.val_tokens)
    report = EvaluationReport(console, loggers)
    text_bytes = tokens.held_out_bytes(1, held_out.tokens + 1)
    loss_validator = LossValidator(run_dir, config.trainer, held_out, text_bytes, report)
    task_evaluator = TaskEvaluator(run_dir, config, tasks, tokenizer, stop.sync, report)

    callback = RunCallback(metrics, guard, stop, checkpoints, loss_validator, task_evaluator)
    rows = config.trainer.global_batch_size
    clipper = TimedClippingCallback(strategy, callback.timer, rows, start.reset_clipper, start.changed)
    rules = [] if rule is None else [UpdateRuleCallback(rule, start.reset_rule, start.changed)]
    trainer = build_trainer(config, run_dir, [clipper, *rules, callback])
    return Run(trainer, module, loader, stop, guard, display, loggers)


def report_start(start: Start, config: Config, run_dir: RunDir, loader: TrainLoader, console: Console) -> None:
    """Print what is trained from where, and a warning if it may not fit the memory."""
    trainer = config.trainer
    if start.fork is not None:
        parts = {"the clipper's": start.reset_clipper, "the update rule's": start.reset_rule}
        whose = " and ".join(part for part, is_reset in parts.items() if is_reset)
        reset = f", with {whose} statistics reset" if whose else ""
        new_data = "" if start.new_data_after is None else f", on new data from step {start.step + 1} on"
        console.print(f"training {run_dir.path} from {start.checkpoint}{reset}{new_data}")
    elif start.checkpoint:
        console.print(f"continuing {run_dir.path} after step {start.step} of {trainer.max_steps}")
    else:
        epochs = loader.total / len(loader.sequences) if isinstance(loader.sequences, ShuffledDataset) else 0.0
        console.print(
            f"training {run_dir.path}: {config.model.parameters / 1e6:.2f}M parameters, {trainer.max_steps} steps of "
            f"{trainer.global_batch_size} x {config.data.sequence_length} tokens"
            + (f", {epochs:.1f} passes over the text" if epochs > 1 else "")
        )
    for sentence in describe_changes(run_dir.setting_changes()):
        console.print(sentence)
    if warning := memory_warning(config, available_memory(trainer.accelerator, trainer.devices)):
        console.print(warning)
    if start.checkpoint is None and config.model.init_from is not None:
        console.print(f"starting from the weights in {config.model.init_from}")


def build_loader(config: Config, tokens: Tokens, start: Start) -> TrainLoader:
    """Return the loader of this process's micro-batches. A step that was rewound over is not corrupted again."""
    trainer = config.trainer
    return TrainLoader(
        training_sequences(config, tokens),
        tokens.fingerprint,
        trainer.max_steps,
        BatchShare(trainer.global_batch_size, trainer.micro_batch_size, rank(), trainer.world_size),
        batch_corruption(config, tokens, start.rewinds),
        skipped_batches=start.skipped_batches,
        skipped_before=start.skipped_before,
        instance_filter=config.data.instance_filter if config.data.instance_filter.enabled else None,
        new_data_after=start.new_data_after,
    )


def training_sequences(config: Config, tokens: Tokens) -> ShuffledDataset | StreamingDataset:
    """Return the sequences of a run in their order, read from prepared tokens or tokenized while training."""
    data = config.data
    if data.mode == "prepared":
        return ShuffledDataset(TokenDataset(tokens.train, data.sequence_length), config.seed)
    corpus, tokenizer = corpus_from(data).pinned_to(tokens.facts["commits"]), read_tokenizer(tokens.folder)
    threshold, block_tokens = tokens.facts["threshold"], int(data.shuffle_tokens)
    return StreamingDataset(corpus, tokenizer, threshold, data.sequence_length, config.seed, block_tokens)


def batch_corruption(
    config: Config, tokens: Tokens, rewinds: Sequence[Mapping[str, int]] = ()
) -> BatchCorruption | None:
    """Return what replaces batches in this run, after some rewinds; `None` if nothing does."""
    kinds = config.corrupted_batches
    steps = corrupted_steps(kinds, rewinds)
    if not steps:
        return None
    return BatchCorruption({step: kinds[step] for step in steps}, config.seed, read_tokenizer(tokens.folder))


def validation_set(config: Config, tokens: Tokens, console: Console, max_tokens: float | None) -> ValidationSet:
    """Return this process's batches of the held-out text; `max_tokens=None` is all of it."""
    trainer, sequences = config.trainer, TokenDataset(tokens.test, config.data.sequence_length)
    return ValidationSet(sequences, 4 * trainer.micro_batch_size, max_tokens, console, rank(), trainer.world_size)


def build_trainer(config: Config, run_dir: RunDir, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Return Lightning's Trainer, without what the callbacks do: logging, checkpoints, progress, signals."""
    strategy: Any = "auto"
    if config.trainer.sharded:
        # Lightning checks only the product of the two sizes; the mesh is made in `training/module.py`.
        strategy = ModelParallelStrategy(config.trainer.dp_replicate, config.trainer.dp_shard)
    elif config.trainer.strategy == "ddp":
        strategy = DDPStrategy(gradient_as_bucket_view=True)
    with no_trainer_variables():
        trainer = pl.Trainer(
            accelerator=config.trainer.accelerator,
            devices=config.trainer.devices,
            num_nodes=config.trainer.nodes,
            strategy=strategy,
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


def final_metrics(config: Config, tokens: Tokens, test_loss: float, test_set: ValidationSet) -> dict[str, Any]:
    """Return the results of the final evaluation, see `train`."""
    if rank() > 0:
        return {"test_loss": test_loss}
    predicted = tokens.test.read(1, test_set.tokens + 1)
    size = tokens.held_out_bytes(1, test_set.tokens + 1)
    return {
        "test_loss": test_loss,
        "test_bits_per_byte": bits_per_byte(test_loss, test_set.tokens, size),
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
    warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # A fork may have no rule over updates where the old run had one.
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*UpdateRuleCallback.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # see training/runtime/slurm.py
