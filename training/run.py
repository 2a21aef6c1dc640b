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
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch.distributed.device_mesh import init_device_mesh

from common.errors import UserError
from data import (
    BatchCorruption,
    ShuffledDataset,
    SourceError,
    StreamingDataset,
    TokenDataset,
    Tokens,
    TrainLoader,
    load_tokenizer,
    prepare,
    unigram_entropy,
)
from models import Llama
from models.hugging_face import load
from models.parallel import apply_activation_checkpointing, assign, compile_model, materialize, shard
from training.checkpoint.fork import ForkSource
from training.checkpoint.format import step_of
from training.checkpoint.manager import Checkpoints
from training.config.checks import clipping_strategy, corpus_of, fewshot_list, model_config, section, settings_of
from training.config.parallelism import micro_batches, sharded, shards, world_size
from training.launch.plan import tight
from training.module import PretrainingModule
from training.monitor.metrics import ClipCallback, Metrics, Row
from training.monitor.nonfinite import Nonfinite, RestartFromCheckpoint
from training.monitor.progress import ProgressDisplay
from training.run_dir import RunDir
from training.runtime.coordinated_stop import CoordinatedStop
from training.runtime.distributed import broadcast_from_rank0, connect, is_distributed, rank
from training.runtime.hardware import flops_per_token, peak
from training.runtime.memory import available_memory
from training.runtime.signals import Interrupted, override_handler
from training.validation.evaluations import Evaluations, Tasks
from training.validation.validation_set import ValidationSet, bits_per_byte


def prepare_tokens(cfg: DictConfig, console: Console) -> Tokens:
    """Return the tokens of `cfg.data`, prepared if they are not in the cache yet."""
    with section("data"):
        tokens = prepare(corpus_of(cfg), Path(cfg.paths.cache), cfg.data.sequence_length, console)
        batch_corruption(cfg, tokens)  # whether they are possible depends on the tokenizer
        return tokens


def batch_corruption(cfg: DictConfig, tokens: Tokens) -> BatchCorruption | None:
    """Return what replaces batches in this run, if anything does."""
    steps = list(cfg.data.corruption.steps)
    if not steps:
        return None
    return BatchCorruption(steps, cfg.data.corruption.kind, cfg.seed, load_tokenizer(str(tokens.folder)))


def training_sequences(cfg: DictConfig, tokens: Tokens) -> ShuffledDataset | StreamingDataset:
    """Return the sequences of a run in their order, read from the prepared tokens or tokenized on the way."""
    data = cfg.data
    if data.mode == "prepared":
        return ShuffledDataset(TokenDataset(tokens.train, data.sequence_length), cfg.seed)
    return StreamingDataset(
        corpus_of(cfg).pinned_to(tokens.facts["commits"]),
        load_tokenizer(str(tokens.folder)),
        threshold=tokens.facts["threshold"],
        length=data.sequence_length,
        seed=cfg.seed,
        block_tokens=int(data.shuffle_tokens),
    )


def lightning_strategy(cfg: DictConfig) -> Any:
    """Return what the Trainer takes for `cfg.trainer.strategy`."""
    if sharded(cfg):
        # Lightning checks the product of the two sizes only; the mesh is made in `prepare_model`.
        return ModelParallelStrategy(cfg.trainer.dp_replicate, shards(cfg))
    return DDPStrategy(gradient_as_bucket_view=True) if cfg.trainer.strategy == "ddp" else "auto"


def prepare_model(cfg: DictConfig, model: Llama, fresh: bool) -> None:
    """Make of a model what the configuration says that it must be: recomputing, compiled, sharded, with weights.

    Args:
        cfg: checked configuration.
        model: on the meta device. If it is sharded, no process ever holds more than one of its weights whole.
        fresh: whether it needs weights to start from; else those of a checkpoint will be loaded.
    """
    trainer = cfg.trainer
    apply_activation_checkpointing(model, trainer.activation_checkpointing)
    if trainer.compile:
        torch.compiler.reset()  # of an earlier run of a sweep
        compile_model(model)
    device = torch.device("cpu")  # from which Lightning moves a model that is whole
    if sharded(cfg):
        sizes = (trainer.dp_replicate, shards(cfg))
        names = ("replicate", "shard")
        device = torch.device("cuda" if trainer.accelerator == "gpu" else "cpu")
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        dtype = torch.bfloat16 if trainer.precision == "bf16-mixed" else torch.float32
        shard(model, mesh if trainer.strategy == "hsdp" else mesh["shard"], dtype)
    materialize(model, device)
    if fresh and cfg.model.init_from is None:
        torch.manual_seed(cfg.seed)
        model.init_weights(assign)
    elif fresh:
        with section("model"):
            load(model, Path(cfg.model.init_from), assign)


def train(
    cfg: DictConfig,
    folder: RunDir,
    tokens: Tokens,
    console: Console,
    listeners: Sequence[Callable[[Row], None]] = (),
    start: ForkSource | None = None,
) -> dict[str, Any]:
    """Train, continuing from the folder's last checkpoint, and evaluate.

    Args:
        cfg: checked configuration.
        folder: run folder, owned by this process.
        tokens: prepared tokens.
        console: where to show progress.
        listeners: called on rank 0 with each row of metrics.jsonl once it is written.
        start: of another run, from which to start.

    Returns:
        `test_loss` and `unigram_entropy` (nats per token), `test_bits_per_byte`, `test_tokens`, `parameters`, and the
        tokens' fingerprint.
    """
    quieten_libraries()
    while True:
        try:
            return _train(cfg, folder, tokens, console, listeners, start)
        except RestartFromCheckpoint:
            pass


def _train(
    cfg: DictConfig,
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
    pl.seed_everything(cfg.seed, verbose=False)
    trainer_cfg = cfg.trainer
    model = model_config(cfg)
    connect(trainer_cfg.accelerator == "gpu")
    resumed = start
    checkpoint, skipped_batches, start = broadcast_from_rank0(partial(_beginning, folder, start, console))
    done = step_of(checkpoint) if checkpoint else 0
    with torch.device("meta"):
        llama = Llama(model)
    module = PretrainingModule(
        llama,
        lr=cfg.lr,
        steps=trainer_cfg.max_steps,
        **settings_of(cfg.optim),
        prepare_model=lambda built: prepare_model(cfg, built, fresh=checkpoint is None),
        micro_batches=micro_batches(cfg),
    )
    sequences = training_sequences(cfg, tokens)
    loader = TrainLoader(
        sequences,
        fingerprint=tokens.fingerprint,
        steps=trainer_cfg.max_steps,
        global_batch_size=trainer_cfg.global_batch_size,
        micro_batch_size=trainer_cfg.micro_batch_size,
        rank=rank(),
        world_size=world_size(cfg),
        corruption=batch_corruption(cfg, tokens),
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
            f"{trainer_cfg.global_batch_size} x {cfg.data.sequence_length} tokens"
            + (f", {passes:.1f} passes over the text" if passes > 1 else "")
        )

    if said := tight(cfg, available_memory(cfg)):
        console.print(said)
    if checkpoint is None and cfg.model.init_from is not None:
        console.print(f"starting from the weights in {cfg.model.init_from}")

    strategy = clipping_strategy(cfg)
    strategy.max_consecutive_nonfinite = None  # a run that diverges is a result too, and ends like any other
    wandb_run = _wandb_run(cfg, folder, console)
    metrics = Metrics(
        folder,
        strategy,
        tokens_per_step=trainer_cfg.global_batch_size * cfg.data.sequence_length,
        peak_tokens_per_second=peak_tokens_per_second(cfg),
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
        config=OmegaConf.to_container(cfg, resolve=True),  # type: ignore[arg-type]
        sharded=sharded(cfg),
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
        held_out_text(cfg, tokens, console, trainer_cfg.val_tokens),
        trainer_cfg.val_every,
        tasks_of(cfg),
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
        strategy=lightning_strategy(cfg),
        precision="32-true" if sharded(cfg) else trainer_cfg.precision,  # FSDP2 sees to it
        max_steps=trainer_cfg.max_steps,
        accumulate_grad_batches=micro_batches(cfg),
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
    held_out = held_out_text(cfg, tokens, console, cfg.data.max_val_tokens)
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


def held_out_text(cfg: DictConfig, tokens: Tokens, console: Console, most_tokens: float | None) -> ValidationSet:
    """Return what this process evaluates of the held-out text."""
    return ValidationSet(
        TokenDataset(tokens.test, cfg.data.sequence_length),
        4 * cfg.trainer.micro_batch_size,
        most_tokens,
        console,
        rank(),
        world_size(cfg),
    )


def tasks_of(cfg: DictConfig) -> Tasks | None:
    """Return the tasks that are scored while the run trains, with their data; `None` if none are."""
    if cfg.trainer.eval_every is None:
        return None
    from evaluation.tasks import TaskError, data_folders, load_tasks

    given = cfg.eval
    folders = data_folders(given.data_dir, cfg.paths.cache)
    try:
        loaded = {
            (name, number): load_tasks(name, folders, number) for name in given.tasks for number in fewshot_list(given)
        }
    except TaskError as error:
        raise UserError(str(error)) from error
    return Tasks(loaded, given.limit, given.seed, given.batch_tokens)


def _beginning(
    folder: RunDir, start: ForkSource | None, console: Console
) -> tuple[Path | None, int, ForkSource | None]:
    """Return the checkpoint from which a run goes on, the batches left out by then, and the other run it is of."""
    checkpoint = folder.last_checkpoint(say=console.print, start=0 if start is None else start.step)
    if checkpoint is None and start is not None:
        start.begin(folder)
        return start.checkpoint, folder.skipped_batches(start.step), start
    return checkpoint, folder.skipped_batches(step_of(checkpoint) if checkpoint else 0), None


def _wandb_run(cfg: DictConfig, folder: RunDir, console: Console) -> Any:
    """Return the run's listener that logs to wandb, on rank 0 if that is chosen."""
    if cfg.logger.name != "wandb" or rank() > 0:
        return None
    from training.monitor.wandb_run import WandbRun

    return WandbRun(cfg, folder.path, console)


def peak_tokens_per_second(cfg: DictConfig) -> float | None:
    """Return the tokens that the devices of a run would process if they did nothing but multiply, if that is known."""
    each = peak(torch.cuda.get_device_name()) if cfg.trainer.accelerator == "gpu" else None
    return (
        None if each is None else world_size(cfg) * each / flops_per_token(model_config(cfg), cfg.data.sequence_length)
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
