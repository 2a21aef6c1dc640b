"""Tokenizers: any of Hugging Face's, or a byte-level BPE trained on a corpus.

A tokenizer is read from its `tokenizer.json`, and from the `tokenizer_config.json` that names its end-of-text token. A
special token that is spelled out in a text is encoded as plain characters, so that no text can end a document early.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from common.errors import ConfigError, UserError, one_line
from common.files import is_local, write_atomic
from common.reading import parse_json, read_bytes

END_OF_TEXT = "<|endoftext|>"

#: Files of a tokenizer, in the order in which they are written.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

#: All bytes and the end-of-text token.
MIN_VOCAB_SIZE = 257


class Tokenizer(NamedTuple):
    """A tokenizer that appends the end-of-text token, with the id `end`, to each text. The largest id is `size` - 1."""

    tokenizer: tokenizers.Tokenizer
    end: int
    size: int

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smaller of uint16 and uint32 that holds every id."""
        return np.uint16 if self.size <= 1 << 16 else np.uint32

    @property
    def content(self) -> tuple[str, int]:
        """What decides on the ids of a text: tokenizers of the same content encode alike."""
        return self.tokenizer.to_str(), self.end

    @property
    def end_token(self) -> str:
        """The end-of-text token as it is spelled."""
        return str(self.tokenizer.id_to_token(self.end))

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, (tokens,), with the end-of-text token last. Runs on all cores.

        Raises:
            UserError: a text has a word that the tokenizer has no token for.
        """
        try:
            with _as_exceptions():
                encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare exceptions
            reason = one_line(error, 200)
            raise UserError(f"the tokenizer cannot encode the text ({reason}): it needs an unknown token") from error
        return [np.array([*encoding.ids, self.end], dtype=self.dtype) for encoding in encoded]

    def save(self, folder: Path) -> None:
        """Write `TOKENIZER_FILES`, which `load_tokenizer` and transformers' AutoTokenizer read."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end_token,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # as in training; tokenizer.json has no such field
        }
        contents = (self.tokenizer.to_str(pretty=True), json.dumps(config, indent=1))
        for name, content in zip(TOKENIZER_FILES, contents, strict=True):
            write_atomic(folder / name, content)


def wrap_tokenizer(tokenizer: tokenizers.Tokenizer, end: int) -> Tokenizer:
    """Return a tokenizer of the `tokenizers` library that appends the token with the id `end` to each text.

    Tokens that its template adds around a text, such as a begin token, are not used, and not saved either: an exported
    tokenizer then encodes a prompt as training did. Merges that are dropped at random (BPE dropout) are not: a text has
    the same tokens in every process, and whenever it is read again.
    """
    tokenizer.encode_special_tokens = True
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    if tokenizer.num_special_tokens_to_add(False):
        tokenizer.post_processor = None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return Tokenizer(tokenizer, end, max(tokenizer.get_vocab().values()) + 1)


def train_tokenizer(texts: Iterable[str], vocab_size: int, progress: bool = False) -> Tokenizer:
    """Train a byte-level BPE. It encodes and decodes any text in any script without loss.

    It has `vocab_size` ids, at least `MIN_VOCAB_SIZE`, `END_OF_TEXT` (id 0) included; a small text may yield fewer.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return wrap_tokenizer(tokenizer, end=0)


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that the setting `data.tokenizer` names: a local one, or one on the Hugging Face hub.

    A name on the hub is `owner/name`, unless there is a file or folder of that name or of that owner's. What else is
    given is local, whether it exists or not: code that has a folder takes `read_tokenizer`.

    Raises:
        ConfigError: the tokenizer does not exist, is damaged, or has no end-of-text token.
    """
    return _load(name, *_files(name))


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer in a local folder, which is never sought on the hub; raises as `load_tokenizer` does."""
    return _load(str(folder), *_local_files(str(folder)))


def _load(name: str, file: Path, config: Path | None) -> Tokenizer:
    try:
        with _as_exceptions():
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare exceptions
        raise _error(name, f"cannot be read ({one_line(error)})") from error
    settings = _read_json(config) if config else {}
    if not isinstance(settings, dict):
        raise _error(name, f"cannot be read ({config} holds no JSON object)")
    eos_token = settings.get("eos_token")
    eos_token = eos_token.get("content") if isinstance(eos_token, dict) else eos_token
    end = tokenizer.token_to_id(eos_token if isinstance(eos_token, str) else END_OF_TEXT)
    if end is None:
        raise _error(
            name,
            "has no end-of-text token: it must come with a tokenizer_config.json whose eos_token is in its "
            f"vocabulary, or have a token {END_OF_TEXT}",
        )
    return wrap_tokenizer(tokenizer, end)


def tokenizer_identity(name: str) -> Any:
    """Return the SHA-256 of what a tokenizer's files say, or its name if it is on the hub."""
    if not is_local(name):
        return name
    file, config = _files(name)
    content = json.dumps([_read_json(file), _read_json(config) if config else None], sort_keys=True)
    return {"content": hashlib.sha256(content.encode()).hexdigest()}


@contextmanager
def _as_exceptions() -> Iterator[None]:
    """Make an exception of a panic in the library's Rust code, which is none in Python."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library panics: {error}") from error


def _error(name: str, problem: str) -> ConfigError:
    return ConfigError("tokenizer", name, problem=problem)


def _local_files(name: str) -> tuple[Path, Path | None]:
    path = Path(name).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        allowed = "it must be a tokenizer.json, a folder that holds one, or owner/name on the Hugging Face hub"
        raise _error(name, f"does not exist: {allowed}")
    config = file.with_name("tokenizer_config.json")
    return file, config if config.is_file() else None


def _files(name: str) -> tuple[Path, Path | None]:
    """Return the paths of tokenizer.json and of tokenizer_config.json, `None` if there is none."""
    if is_local(name):
        return _local_files(name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = Path(hf_hub_download(name, "tokenizer.json"))
        try:
            return file, Path(hf_hub_download(name, "tokenizer_config.json"))
        except EntryNotFoundError:
            return file, None
    except Exception as error:
        problem = f"cannot be downloaded from the Hugging Face hub ({one_line(error, 200)})"
        raise _error(name, problem) from error


def _read_json(file: Path) -> Any:
    try:
        return parse_json(read_bytes(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)})") from error
