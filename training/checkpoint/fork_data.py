"""A run that goes on with other data than the run from which it is forked: `fork_data=new`.

The new data begin with their first batch, in the order that the seed determines. The model knows the ids of one
tokenizer, so the new data must have the same.
"""

from common.errors import ConfigError, shown
from common.text import flatten
from data import Tokenizer, load_tokenizer, read_tokenizer
from training.config.identity import identity, saved_identity_of
from training.config.schema import Config
from training.run_dir import RunDir

#: Settings of `data` on which a tokenizer that is trained on the text does not depend.
NOT_OF_TOKENIZER = (
    "name",
    "shuffle_tokens",
    "sequence_length",
    "max_val_tokens",
    "max_tokens",
    "deduplicate",
    "corruption",
    "instance_filter",
)


def check_new_data(config: Config, old: Config, run_dir: RunDir) -> None:
    """Raise `ConfigError` if the settings alone tell that new data cannot have the tokenizer of the old run.

    `old` are the settings of that run, whose folder `run_dir` is. A tokenizer that is trained on the text is known only
    when the text has been read: see `check_same_tokenizer`.
    """
    if config.data.tokenizer is not None:
        check_same_tokenizer(config, run_dir, load_tokenizer(config.data.tokenizer))
        return
    ours, theirs = (flatten(each["data"]) for each in (identity(config), saved_identity_of(old, config)))
    for key in dict.fromkeys((*ours, *theirs)):
        if ours.get(key) != theirs.get(key) and key.split(".")[0] not in NOT_OF_TOKENIZER:
            changed = f"data.{key}={shown(ours.get(key))}, as that run has {shown(theirs.get(key))}"
            raise _another_tokenizer(config, run_dir, f"with {changed} and its own tokenizer")


def check_same_tokenizer(config: Config, run_dir: RunDir, tokenizer: Tokenizer) -> None:
    """Raise `ConfigError` unless the tokenizer of new data is that of the run in `run_dir`.

    Raises:
        UserError: that run has lost its tokenizer, or it was changed.
    """
    run_dir.check_tokenizer()
    try:
        own = read_tokenizer(run_dir.tokenizer)
    except ValueError as error:
        problem = f"is not possible with fork_data=new: {run_dir.tokenizer} is missing, or damaged"
        raise ConfigError("fork_from", config.fork_from, problem=problem) from error
    if tokenizer.content != own.content:
        named = f"data.tokenizer={shown(config.data.tokenizer)}"
        raise _another_tokenizer(config, run_dir, f"with {named}, which has other ids than that run's tokenizer")


def _another_tokenizer(config: Config, run_dir: RunDir, why: str) -> ConfigError:
    must = f"it needs data.tokenizer={run_dir.tokenizer}"
    return ConfigError("fork_data", config.fork_data, problem=f"is not possible {why}: {must}")
