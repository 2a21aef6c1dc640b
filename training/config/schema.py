"""The configuration of a run, typed: what `configs/train.yaml` and its groups may say.

`data`, `model` and `eval` belong to the packages that they configure. Everything that can be checked without looking at
the machine is checked when a `Config` is made; `training.config.checks` does the rest.
"""

from typing import Annotated, Any, Literal, Self, get_args

from annotated_types import Predicate
from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from common.corruption import MIXED, corrupted_batches, room
from common.errors import ConfigError, UserError
from common.run_files import folder_and_step
from common.settings import (
    Allowed,
    Count,
    Flag,
    Folder,
    FolderName,
    PathText,
    Positive,
    Settings,
)
from data import DataConfig
from data.config import CorruptionKind, Steps
from data.corruption import MIN_COUNT
from evaluation.config import EvalConfig
from models.config import ModelConfig
from training.config.optim import OptimConfig
from training.runtime.hardware import PEAK_FLOPS, peak_flops

#: Parallelism of a run: one process; a full model in each; sharded over all; sharded within each replica.
Strategy = Literal["single", "ddp", "fsdp", "hsdp"]


def _has_a_step(value: str) -> str:
    if folder_and_step(value) is None:
        raise PydanticCustomError("no_step", "no folder and step")
    return value


#: A run folder and a step of it, as FOLDER@STEP.
ForkSourceText = Annotated[PathText, AfterValidator(_has_a_step)]


class ClipConfig(Settings):
    """The clipping strategy. Further keys are the arguments of the class that `_target_` names."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    target: Annotated[str, Allowed("a class, as zclip.ZClip")] = Field(alias="_target_")
    """Import path of a subclass of `zclip.ClippingStrategy`."""
    name: FolderName
    """Name of the strategy in the run's name, tables and figures."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the strategy's class."""
        return dict(self.model_extra or {})


class UpdateConfig(Settings):
    """The rule over the optimizer's update. Further keys are the arguments of the class that `_target_` names."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    target: Annotated[str | None, Allowed("a class, as zclip.updates.UpdateClip, or null")] = Field(
        None, alias="_target_"
    )
    """Import path of a subclass of `zclip.updates.OptimizerRule`; null: no rule."""
    name: FolderName = "none"
    """Name of the rule in the run's name, tables and figures."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the rule's class."""
        return dict(self.model_extra or {})


class TrainerConfig(Settings):
    """How a run is executed: devices, parallelism, batch, checkpoints, validation."""

    accelerator: Literal["cpu", "gpu"]
    """Device type."""
    strategy: Strategy
    """single: one process; ddp: a full model in each; fsdp: sharded over all (FSDP2); hsdp: sharded in each replica."""
    nodes: Count
    """Number of machines."""
    devices: Count
    """Processes per node, each with a GPU of its own if `accelerator` is gpu."""
    dp_replicate: Count
    """Replicas of the whole model, in hsdp."""
    precision: Literal["32-true", "bf16-mixed"]
    """Arithmetic: float32, or bfloat16 with float32 weights."""
    activation_checkpointing: Literal["none", "selective", "full"]
    """Which activations are recomputed in the backward pass: less memory for more time."""
    compile: Flag
    """Whether the blocks are compiled with torch.compile."""
    max_steps: Count
    """Optimizer steps of the run."""
    global_batch_size: Count
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: Count
    """Sequences per forward pass of one process."""
    log_every: Count
    """Steps between two transfers of metrics from the device."""
    checkpoint_every: Count
    """Steps between two checkpoints."""
    keep_last: Count
    """Newest checkpoints that are kept. The last healthy one is kept as well, and the last at a regular step."""
    keep_every: Count | None
    """Checkpoints at multiples of this many steps are kept as well; null: none."""
    on_nonfinite: Literal["skip", "stop", "rewind"]
    """What happens after `max_consecutive_nonfinite` non-finite steps: nothing, an error, or a restart from the last
    healthy checkpoint without the batches since."""
    max_consecutive_nonfinite: Count
    """Non-finite steps in a row after which `on_nonfinite` acts."""
    max_rewinds: Count
    """Rewinds of a run after which it ends."""
    val_every: Count | None
    """Steps between two evaluations on held-out text; null: only at the end, on all of it."""
    val_tokens: Count
    """Held-out tokens of such an evaluation, at most."""
    eval_every: Count | None
    """Steps between two evaluations on the tasks of `eval`; null: none."""
    async_save: Flag
    """Whether a copy of the state is written while training continues; takes memory for the copy."""

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.nodes * self.devices

    @property
    def sharded(self) -> bool:
        """Whether no process holds the whole model."""
        return self.strategy in ("fsdp", "hsdp")

    @property
    def dp_shard(self) -> int:
        """Processes over which each replica of the model is sharded."""
        return self.world_size // self.dp_replicate if self.sharded else 1

    @property
    def grad_accum_steps(self) -> int:
        """Backward passes of each process in an optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            allowed = f"a multiple of trainer.checkpoint_every={self.checkpoint_every}, or null"
            raise ConfigError("keep_every", self.keep_every, allowed)
        if self.strategy == "single" and self.world_size > 1:
            processes = f"trainer.nodes={self.nodes} and trainer.devices={self.devices}"
            problem = f"is not possible with {processes}: it must be one of {', '.join(get_args(Strategy)[1:])}"
            raise ConfigError("strategy", "single", problem=problem)
        if (self.dp_replicate > 1) != (self.strategy == "hsdp"):
            hint = ": it must be from 2; fsdp has one replica" if self.strategy == "hsdp" else ""
            problem = f"is not possible with trainer.strategy={self.strategy}{hint}"
            raise ConfigError("dp_replicate", self.dp_replicate, problem=problem)
        if self.world_size % self.dp_replicate:
            problem = f"is not allowed: it must divide the {self.world_size} processes"
            raise ConfigError("dp_replicate", self.dp_replicate, problem=problem)
        return self


class LoggerConfig(Settings):
    """Where metrics go besides metrics.jsonl in the run folder."""

    name: Literal["jsonl", "wandb"]
    """jsonl: nowhere else; wandb: Weights & Biases."""
    project: Annotated[
        str,
        StringConstraints(pattern=r"^[^/\\#?%:]{1,128}$"),
        Allowed("a name of at most 128 characters without / \\ # ? % :"),
    ] = "zclip"
    """wandb's project."""
    entity: Annotated[str | None, Allowed("a wandb user or team, or null")] = None
    """wandb's user or team; null: the default of whoever is logged in."""
    tags: Annotated[
        tuple[Annotated[str, StringConstraints(min_length=1, max_length=64)], ...],
        Field(strict=False),
        Allowed("a list of words of at most 64 characters"),
    ] = ()
    """wandb's tags."""


class HardwareConfig(Settings):
    """The device for which `plan=true` computes."""

    device: Annotated[
        str, Predicate(lambda device: peak_flops(device) is not None), Allowed(f"one of {', '.join(PEAK_FLOPS)}")
    ]
    """Model of the device."""
    memory_gib: Positive
    """Memory of each device, GiB."""
    mfu: Annotated[float, Field(gt=0, le=1), Allowed("a number above 0 and at most 1")]
    """Share of its peak FLOP/s that training reaches."""


class PathsConfig(Settings):
    """Folders of runs and of data."""

    runs: Folder
    """Run folders are <runs>/<experiment>/<name>."""
    cache: Folder
    """Tokenizers and prepared tokens."""


class PaperConfig(Settings):
    """The paper's experiments (experiments/paper/tables_and_figures.py); `experiment=` and `scale=` set these."""

    suite: Annotated[str | None, Allowed("set by experiment=")]
    """Table or figure whose runs these are; null: none."""
    scale: FolderName
    """Scale of the experiments."""
    lr: Positive
    """Learning rate in the paper."""
    lr_scale: Positive
    """Factor from the paper's learning rate to the run's."""
    corruption_steps: Steps
    """Optimizer steps whose batches are replaced."""
    corruption_kind: CorruptionKind
    """What replaces them, see `data.corruption.kind`."""
    lab_steps: Steps
    """Optimizer steps whose batches are replaced in the spike lab."""


class Config(Settings):
    """A run."""

    lr: Positive
    """Peak learning rate."""
    seed: Annotated[int, Field(ge=0, lt=2**32), Allowed("an integer from 0 to 2**32 - 1")]
    """Seed of the initial weights and of the order of the data."""
    name: FolderName | None
    """Name of the run folder; null: <model>-<clip>-lr<lr>-seed<seed>-<hash of the settings>."""
    experiment: FolderName
    """Folder in `paths.runs` that groups runs."""
    resume: Annotated[PathText | None, Allowed("a run folder, or null")]
    """Run folder to continue, with the settings in its config.yaml."""
    fork_from: Annotated[ForkSourceText | None, Allowed("a run folder and a step, as FOLDER@STEP, or null")]
    """FOLDER@STEP: start a new run from a step of another. A name alone is a run next to this one."""
    fork_data: Literal["same", "new"] = "same"
    """Data of a run with `fork_from`: `same`: those of the other run, which go on; `new`: those of the settings `data`,
    which begin with their first batch."""
    fork_statistics: Literal["same", "reset"] = "same"
    """Statistics of the clipper and of a rule over updates in a run with `fork_from`: `same`: those of the other run,
    where the settings are the same; `reset`: none, as in a new run."""
    print_run_dir: Flag
    """Print the path of the run folder and exit."""
    plan: Flag
    """Print what the run needs and exit."""
    model: ModelConfig
    data: DataConfig
    clip: ClipConfig
    update: UpdateConfig = UpdateConfig(_target_=None)
    optim: OptimConfig
    trainer: TrainerConfig
    logger: LoggerConfig
    eval: EvalConfig
    hardware: HardwareConfig
    paths: PathsConfig
    paper: PaperConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.paper.suite is not None:
            raise UserError(
                f"experiment={self.paper.suite} is a set of runs: it needs -m; several are a list, as [table2,table3]"
            )
        self._check_corruption()
        for key in ("fork_data", "fork_statistics"):
            if (value := getattr(self, key)) != "same" and self.fork_from is None and self.resume is None:
                raise ConfigError(key, value, problem="is not possible without fork_from: it must be same")
        if self.data.sequence_length > self.model.max_position_embeddings:
            longest = f"model.max_position_embeddings={self.model.max_position_embeddings}"
            problem = f"is longer than the model's context: it must be at most {longest}"
            raise ConfigError("data.sequence_length", self.data.sequence_length, problem=problem)
        return self

    def _check_corruption(self) -> None:
        """Raise `ConfigError` if a batch that is to be corrupted does not exist, or is too short for that."""
        corruption, last = self.data.corruption, self.trainer.max_steps
        if late := [step for step in corruption.steps if step > last]:
            problem = f"is not allowed: step {late[0]} is after the last, trainer.max_steps={last}"
            raise ConfigError("data.corruption.steps", list(corruption.steps), problem=problem)
        first, length = corruption.random_first_step, corruption.burst_length
        if corruption.random_steps > (most := room(first, last, length)):
            problem = (
                f"is not allowed: from step {first} to the last, trainer.max_steps={last}, at most {most} can be drawn "
                f"in bursts of {length}"
            )
            raise ConfigError("data.corruption.random_steps", corruption.random_steps, problem=problem)
        is_corrupted, longest = corruption.steps or corruption.random_steps, self.data.sequence_length
        if is_corrupted and corruption.kind in ("repeated_ngrams", MIXED) and longest + 1 < MIN_COUNT:
            problem = f"is not possible with data.sequence_length={longest}: it must be at least {MIN_COUNT - 1}"
            raise ConfigError("data.corruption.kind", corruption.kind, problem=problem)

    @property
    def corrupted_batches(self) -> dict[int, str]:
        """Kind of each batch that is corrupted on purpose, by its step."""
        return corrupted_batches(self.data.corruption.model_dump(), self.seed, self.trainer.max_steps)
