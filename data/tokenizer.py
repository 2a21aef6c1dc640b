"""Tokenizers: any of Hugging Face's, or a byte-level BPE trained on a corpus.

What is used of a tokenizer is its `tokenizer.json` and which token ends a text. Special tokens that a text spells out
are encoded as the characters they are, so that no document ends before its end.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common.errors import ConfigError, UserError

END_OF_TEXT = "<|endoftext|>"

#: Of a folder that holds a tokenizer, in the order in which they are written.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

#: All bytes and the end-of-text token.
SMALLEST_VOCABULARY = 257


class TextEncoder(NamedTuple):
    """A tokenizer ready for use.

    Attributes:
        tokenizer: of the `tokenizers` library.
        end: id of the token that ends a document.
        size: number of ids: the largest id and one.
    """

    tokenizer: Tokenizer
    end: int
    size: int

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.uint16 if self.size <= 1 << 16 else np.uint32

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, end-of-text included. All cores work at once."""
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self.end], dtype=self.dtype) for encoding in encoded]

    def save(self, folder: Path) -> None:
        """Write the files from which `load_tokenizer`, or transformers' AutoTokenizer, makes it again."""
        # The library's own save would not say why it could not write.
        (folder / "tokenizer.json").write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.tokenizer.id_to_token(self.end),
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def text_encoder(tokenizer: Tokenizer, end: int) -> TextEncoder:
    """Return a tokenizer whose texts end with the token of this id."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return TextEncoder(tokenizer, end, max(tokenizer.get_vocab().values()) + 1)


def train_tokenizer(texts: Iterable[str], vocab_size: int, progress: bool = False) -> TextEncoder:
    """Train a byte-level BPE; any text, in any script, can be encoded and decoded without loss.

    Args:
        texts: the documents to learn merges from.
        vocab_size: number of ids, `END_OF_TEXT` (id 0) included; at least `SMALLEST_VOCABULARY`. A small corpus
            may yield fewer.
        progress: whether to show bars on standard error.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return text_encoder(tokenizer, end=0)


def load_tokenizer(name: str) -> TextEncoder:
    """Return a tokenizer that somebody else made.

    Args:
        name: a `tokenizer.json`, a folder that holds one, or a name on the Hugging Face hub.

    Raises:
        ValueError: there is none, it is damaged, or nothing says which token ends a text.
    """
    file, config = _files(name)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare exceptions
        raise _error(name, f"cannot be read ({error})") from error
    end = _read(config).get("eos_token", END_OF_TEXT) if config else END_OF_TEXT
    end = end.get("content") if isinstance(end, dict) else end
    identity = tokenizer.token_to_id(end) if isinstance(end, str) else None
    if identity is None:
        raise _error(
            name,
            "does not say which token ends a text: it must come with a tokenizer_config.json whose "
            f"eos_token is in its vocabulary, or have a token {END_OF_TEXT}",
        )
    return text_encoder(tokenizer, identity)


def tokenizer_identity(name: str) -> Any:
    """Return what tells a tokenizer from another: the content of its files, or its name on the hub.

    Raises:
        ValueError: there is none at that path.
    """
    if not _is_path(name):
        return name
    file, config = _files(name)
    return [_read(file), _read(config) if config else None]


def _error(name: str, problem: str) -> ConfigError:
    return ConfigError("tokenizer", name, problem=problem)


def _is_path(name: str) -> bool:
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.endswith(".json") or name.count("/") > 1


def _files(name: str) -> tuple[Path, Path | None]:
    """Return the paths of tokenizer.json and, if there is one, tokenizer_config.json."""
    path = Path(name).expanduser()
    if _is_path(name):
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            allowed = "it must be a tokenizer.json, a folder that holds one, or a name on the Hugging Face hub"
            raise _error(name, f"is not there: {allowed}")
        config = file.with_name("tokenizer_config.json")
        return file, config if config.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = Path(hf_hub_download(name, "tokenizer.json"))
        try:
            return file, Path(hf_hub_download(name, "tokenizer_config.json"))
        except EntryNotFoundError:
            return file, None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise _error(name, f"cannot be had from the Hugging Face hub ({reason})") from error


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error})") from error
