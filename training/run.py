"""One training run, from a checked configuration to held-out loss."""

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from rich.console import Console
from torch.distributed.device_mesh import init_device_mesh

from common.errors import UserError, prefix_errors
from data import (
    BatchCorruption,
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
from models import Llama
from models.hugging_face import load
from models.parallel import (
    apply_activation_checkpointing,
    apply_fsdp,
    compile_model,
    copy_full_weight,
    materialize,
)
from training.checkpoint.fork import ForkSource
from training.checkpoint.format import step_of
from training.checkpoint.manager import Checkpoints
from training.checkpoint.resume import resume_checkpoint
from training.config.schema import Config
from training.config.strategy import clipping_strategy
from training.launch.plan import memory_warning
from training.module import PretrainingModule
from training.monitor.metrics import ClipCallback, Metrics, Row
from training.monitor.nonfinite import Nonfinite, RestartFromCheckpoint
from training.monitor.progress import ProgressDisplay
from training.run_dir import RunDir
from training.runtime.coordinated_stop import CoordinatedStop
from training.runtime.distributed import broadcast_from_rank0, init_process_group, is_distributed, rank
from training.runtime.hardware import available_memory, flops_per_token, peak_flops
from training.runtime.signals import Interrupted, override_handler
from training.validation.evaluations import Evaluations, Tasks
from training.validation.validation_set import ValidationSet, bits_per_byte


def prepare_tokens(config: Config, console: Console) -> Tokens:
    """Return the tokens of `config.data`, prepared if they are not in the cache yet."""
    with prefix_errors("data"):
        tokens = prepare(corpus_from(config.data), Path(config.paths.cache), config.data.sequence_length, console)
        batch_corruption(config, tokens)  # whether they are possible depends on the tokenizer
        return tokens


def batch_corruption(config: Config, tokens: Tokens) -> BatchCorruption | None:
    """Return what replaces batches in this run, if anything does."""
    steps = list(config.data.corruption.steps)
    if not steps:
        return None
    return BatchCorruption(steps, config.data.corruption.kind, config.seed, load_tokenizer(str(tokens.folder)))


def training_sequences(config: Config, tokens: Tokens) -> ShuffledDataset | StreamingDataset:
    """Return the sequences of a run in their order, read from the prepared tokens or tokenized on the way."""
    data = config.data
    if data.mode == "prepared":
        return ShuffledDataset(TokenDataset(tokens.train, data.sequence_length), config.seed)
    return StreamingDataset(
        corpus_from(config.data).at(tokens.facts["commits"]),
        load_tokenizer(str(tokens.folder)),
        threshold=tokens.facts["threshold"],
        length=data.sequence_length,
        seed=config.seed,
        block_tokens=int(data.shuffle_tokens),
    )


def lightning_strategy(config: Config) -> Any:
    """Return what the Trainer takes for `config.trainer.strategy`."""
    if config.trainer.sharded:
        # Lightning checks the product of the two sizes only; the mesh is made in `prepare_model`.
        return ModelParallelStrategy(config.trainer.dp_replicate, config.trainer.dp_shard)
    return DDPStrategy(gradient_as_bucket_view=True) if config.trainer.strategy == "ddp" else "auto"


def prepare_model(config: Config, model: Llama, fresh: bool) -> None:
    """Make of a model what the configuration says that it must be: recomputing, compiled, sharded, with weights.

    Args:
        config: checked configuration.
        model: on the meta device. If it is sharded, no process ever holds more than one of its weights whole.
        fresh: whether it needs weights to start from; else those of a checkpoint will be loaded.
    """
    trainer = config.trainer
    apply_activation_checkpointing(model, trainer.activation_checkpointing)
    if trainer.compile:
        torch.compiler.reset()  # of an earlier run of a sweep
        compile_model(model)
    device = torch.device("cpu")  # from which Lightning moves a model that is whole
    if config.trainer.sharded:
        sizes = (trainer.dp_replicate, config.trainer.dp_shard)
        names = ("replicate", "shard")
        device = torch.device("cuda" if trainer.accelerator == "gpu" else "cpu")
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        dtype = torch.bfloat16 if trainer.precision == "bf16-mixed" else torch.float32
        apply_fsdp(model, mesh if trainer.strategy == "hsdp" else mesh["shard"], dtype)
    materialize(model, device)
    if fresh and config.model.init_from is None:
        torch.manual_seed(config.seed)
        model.init_weights(copy_full_weight)
    elif fresh:
        with prefix_errors("model"):
            load(model, Path(str(config.model.init_from)), copy_full_weight)


def train(
    config: Config,
    folder: RunDir,
    tokens: Tokens,
    console: Console,
    listeners: Sequence[Callable[[Row], None]] = (),
    fork: ForkSource | None = None,
) -> dict[str, Any]:
    """Train, continuing from the folder's last checkpoint, and evaluate.

    Args:
        config: checked configuration.
        folder: run folder, owned by this process.
        tokens: prepared tokens.
        console: where to show progress.
        listeners: called on rank 0 with each row of metrics.jsonl once it is written.
        fork: step of another run from which to start.

    Returns:
        `test_loss` and `unigram_entropy` (nats per token), `test_bits_per_byte`, `test_tokens`, `parameters`, and the
        tokens' fingerprint.
    """
    quieten_libraries()
    while True:
        try:
            return _train(config, folder, tokens, console, listeners, fork)
        except RestartFromCheckpoint:
            pass


def _train(
    config: Config,
    folder: RunDir,
    tokens: Tokens,
    console: Console,
    listeners: Sequence[Callable[[Row], None]],
    start: ForkSource | None,
) -> dict[str, Any]:
    """Do what `train` does, until it is done or the run is to go on from an earlier step.

    Raises:
        RestartFromCheckpoint: it is.
    """
    pl.seed_everything(config.seed, verbose=False)
    trainer_cfg = config.trainer
    model = config.model.llama
    init_process_group(trainer_cfg.accelerator == "gpu")
    resumed = start
    checkpoint, skipped_batches, start = broadcast_from_rank0(partial(_beginning, folder, start, console))
    done = step_of(checkpoint) if checkpoint else 0
    with torch.device("meta"):
        llama = Llama(model)
    module = PretrainingModule(
        llama,
        lr=config.lr,
        steps=trainer_cfg.max_steps,
        **config.optim.model_dump(exclude={"name"}),
        prepare_model=lambda built: prepare_model(config, built, fresh=checkpoint is None),
        micro_batches=config.trainer.grad_accum_steps,
    )
    sequences = training_sequences(config, tokens)
    loader = TrainLoader(
        sequences,
        fingerprint=tokens.fingerprint,
        steps=trainer_cfg.max_steps,
        global_batch_size=trainer_cfg.global_batch_size,
        micro_batch_size=trainer_cfg.micro_batch_size,
        rank=rank(),
        world_size=config.trainer.world_size,
        corruption=batch_corruption(config, tokens),
        skipped_batches=skipped_batches,
    )
    anew = start is not None and not start.same_clipping
    if start is not None:
        console.print(
            f"training {folder.path} from {checkpoint}" + (", the clipper's statistics from nothing" if anew else "")
        )
    elif checkpoint:
        console.print(f"continuing {folder.path} after step {done} of {trainer_cfg.max_steps}")
    else:
        passes = loader.total / len(sequences) if isinstance(sequences, ShuffledDataset) else 0.0
        console.print(
            f"training {folder.path}: {model.parameters / 1e6:.2f}M parameters, {trainer_cfg.max_steps} steps of "
            f"{trainer_cfg.global_batch_size} x {config.data.sequence_length} tokens"
            + (f", {passes:.1f} passes over the text" if passes > 1 else "")
        )

    if said := memory_warning(config, available_memory(config.trainer.accelerator, config.trainer.devices)):
        console.print(said)
    if checkpoint is None and config.model.init_from is not None:
        console.print(f"starting from the weights in {config.model.init_from}")

    strategy = clipping_strategy(config.clip)
    strategy.max_consecutive_nonfinite = None  # a run that diverges is a result too, and ends like any other
    wandb_run = _wandb_run(config, folder, console)
    metrics = Metrics(
        folder,
        strategy,
        tokens_per_step=trainer_cfg.global_batch_size * config.data.sequence_length,
        peak_tokens_per_second=peak_tokens_per_second(config),
        log_every=trainer_cfg.log_every,
        max_consecutive_nonfinite=trainer_cfg.max_consecutive_nonfinite,
        listeners=list(listeners),
        console=console,
    )
    stopping = CoordinatedStop()
    nonfinite = Nonfinite(
        trainer_cfg.on_nonfinite,
        trainer_cfg.max_rewinds,
        metrics,
        trainer_cfg.checkpoint_every,
        0 if resumed is None else resumed.step,
    )
    checkpoints = Checkpoints(
        folder,
        metrics,
        config=config.model_dump(mode="json", by_alias=True),
        sharded=config.trainer.sharded,
        every=trainer_cfg.checkpoint_every,
        keep=trainer_cfg.keep_last,
        keep_every=trainer_cfg.keep_every,
        beside=trainer_cfg.async_save,
        console=console,
    )
    tokenizer = load_tokenizer(str(tokens.folder))
    evaluations = Evaluations(
        folder,
        metrics,
        held_out_text(config, tokens, console, trainer_cfg.val_tokens),
        trainer_cfg.val_every,
        tasks_of(config),
        trainer_cfg.eval_every,
        tokenizer,
        "float32" if trainer_cfg.precision == "32-true" else "training",
        stopping,
        checkpoints,
        wandb_run.log if wandb_run is not None else lambda numbers, step: None,
        console,
    )
    trainer = pl.Trainer(
        accelerator=trainer_cfg.accelerator,
        devices=trainer_cfg.devices,
        num_nodes=trainer_cfg.nodes,
        strategy=lightning_strategy(config),
        precision="32-true" if config.trainer.sharded else trainer_cfg.precision,  # FSDP2 sees to it
        max_steps=trainer_cfg.max_steps,
        accumulate_grad_batches=config.trainer.grad_accum_steps,
        callbacks=[
            ClipCallback(strategy, metrics, anew),
            metrics,
            stopping,
            checkpoints,
            nonfinite,
            evaluations,
        ],
        logger=False,
        default_root_dir=folder.path,
        use_distributed_sampler=False,
        plugins=[TorchElasticEnvironment() if is_distributed() else LightningEnvironment()],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lightning's handler of SIGTERM broadcasts within the handler, which can deadlock: ours stay. So there is nothing
    # to look for with every batch, waiting for the device.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    if wandb_run is not None:
        metrics.listeners.append(wandb_run)
    display = ProgressDisplay(trainer_cfg.max_steps, done, console)
    metrics.listeners.append(display)
    held_out = held_out_text(config, tokens, console, config.data.max_val_tokens)
    try:
        # Checkpoints are our own files, and hold more than tensors.
        with override_handler(stopping.tell):
            trainer.fit(module, train_dataloaders=loader, ckpt_path=checkpoint, weights_only=False)
        display.close()
        back_to = nonfinite.go_back(folder, console) if nonfinite.tripped else None
        if signum := stopping.agreed or stopping.told:
            raise Interrupted(signum, trainer.global_step if back_to is None else back_to)
        if back_to is not None:
            raise RestartFromCheckpoint
        console.print(f"evaluating on {held_out.tokens:,} held-out tokens")
        trainer.test(module, dataloaders=held_out, verbose=False)
        if wandb_run is not None:
            wandb_run.log({"test_loss": module.test_loss}, trainer_cfg.max_steps)
    except SystemExit as stop:  # what Lightning makes of a signal during the evaluation
        if not isinstance(stop.__context__, Interrupted):
            raise
        raise Interrupted(stop.__context__.signum, trainer.global_step) from stop
    except SourceError as error:
        raise UserError(f"data.{error} (after step {trainer.global_step})") from error
    finally:
        sequences.close()
        display.close()
        if wandb_run is not None:
            wandb_run.finish()
    evaluated = tokens.test.read(1, held_out.tokens + 1)
    bits = bits_per_byte(module.test_loss, held_out.tokens, held_out.bytes(tokenizer)) if rank() == 0 else None
    return {
        "test_loss": module.test_loss,
        "test_bits_per_byte": bits,
        "unigram_entropy": unigram_entropy(evaluated),
        "test_tokens": len(evaluated),
        "parameters": model.parameters,
        "data_fingerprint": tokens.fingerprint,
    }


def held_out_text(config: Config, tokens: Tokens, console: Console, most_tokens: float | None) -> ValidationSet:
    """Return what this process evaluates of the held-out text."""
    return ValidationSet(
        TokenDataset(tokens.test, config.data.sequence_length),
        4 * config.trainer.micro_batch_size,
        most_tokens,
        console,
        rank(),
        config.trainer.world_size,
    )


def tasks_of(config: Config) -> Tasks | None:
    """Return the tasks that are scored while the run trains, with their data; `None` if none are."""
    if config.trainer.eval_every is None:
        return None
    from evaluation.tasks import TaskError, data_folders, load_tasks

    given = config.eval
    folders = data_folders(given.data_dir, config.paths.cache)
    try:
        loaded = {
            (name, number): load_tasks(name, folders, number) for name in given.tasks for number in given.fewshot_list
        }
    except TaskError as error:
        raise UserError(str(error)) from error
    return Tasks(loaded, given.limit, given.seed, given.batch_tokens)


def _beginning(
    folder: RunDir, start: ForkSource | None, console: Console
) -> tuple[Path | None, int, ForkSource | None]:
    """Return the checkpoint from which a run goes on, the batches left out by then, and the other run it is of."""
    checkpoint = resume_checkpoint(folder, console.print, start=0 if start is None else start.step)
    if checkpoint is None and start is not None:
        start.copy_history(folder)
        return start.checkpoint, folder.skipped_batches(start.step), start
    return checkpoint, folder.skipped_batches(step_of(checkpoint) if checkpoint else 0), None


def _wandb_run(config: Config, folder: RunDir, console: Console) -> Any:
    """Return the run's listener that logs to wandb, on rank 0 if that is chosen."""
    if config.logger.name != "wandb" or rank() > 0:
        return None
    from training.monitor.wandb_run import WandbRun

    return WandbRun(config, folder.path, console)


def peak_tokens_per_second(config: Config) -> float | None:
    """Return the tokens that the devices of a run would process if they did nothing but multiply, if that is known."""
    each = peak_flops(torch.cuda.get_device_name()) if config.trainer.accelerator == "gpu" else None
    return (
        None
        if each is None
        else config.trainer.world_size * each / flops_per_token(config.model, config.data.sequence_length)
    )


def quieten_libraries() -> None:
    """Silence notices that are not about this run; warnings that could matter stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)  # selective recomputing, compiled
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # slurm.py sees to it
