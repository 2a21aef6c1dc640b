"""From a corpus to token sequences in an order that is computed, not stored.

`prepare` turns documents into cached tokens; `StreamingDataset` tokenizes them while training. `TrainLoader` yields the
batches of a run.
"""

from data.config import CacheConfig, DataConfig
from data.corpus import Corpus, corpus_from, corpus_tokenizer
from data.corruption import BatchCorruption
from data.loader import BatchShare, TrainLoader
from data.prepare import prepare
from data.sequences import Batch, ShuffledDataset, TokenDataset, unigram_entropy
from data.sources import Mixture, Source, SourceError
from data.stream import StreamingDataset
from data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer, read_tokenizer
from data.tokens import TokenArray, Tokens, changes, open_tokens

__all__ = [
    "TOKENIZER_FILES",
    "Batch",
    "BatchCorruption",
    "BatchShare",
    "CacheConfig",
    "Corpus",
    "DataConfig",
    "Mixture",
    "ShuffledDataset",
    "Source",
    "SourceError",
    "StreamingDataset",
    "TokenArray",
    "TokenDataset",
    "Tokenizer",
    "Tokens",
    "TrainLoader",
    "changes",
    "corpus_from",
    "corpus_tokenizer",
    "load_tokenizer",
    "open_tokens",
    "prepare",
    "read_tokenizer",
    "unigram_entropy",
]
