"""From a corpus to token sequences in an order that is computed, not stored.

`prepare` turns documents into cached tokens; `StreamingDataset` tokenizes them while training. `TrainLoader` yields the
batches of a run. The order depends on the text, the tokenizer, the sequence length, the seed and the number of
sequences consumed, and for a stream also on its block size.
"""

from data.batch import Batch
from data.config import CacheConfig, CorruptionConfig, DataConfig, SourceConfig
from data.corpus import Corpus, corpus_from, corpus_tokenizer
from data.corruption import KINDS, BatchCorruption
from data.loader import BatchShare, TrainLoader
from data.prepare import prepare
from data.sequences import ShuffledDataset, TokenDataset, unigram_entropy
from data.sources import Document, Mixture, Source, SourceError
from data.stream import StreamingDataset
from data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from data.tokens import TokenArray, Tokens, open_tokens

__all__ = [
    "KINDS",
    "TOKENIZER_FILES",
    "Batch",
    "BatchCorruption",
    "BatchShare",
    "CacheConfig",
    "Corpus",
    "CorruptionConfig",
    "DataConfig",
    "Document",
    "Mixture",
    "ShuffledDataset",
    "Source",
    "SourceConfig",
    "SourceError",
    "StreamingDataset",
    "TokenArray",
    "TokenDataset",
    "Tokenizer",
    "Tokens",
    "TrainLoader",
    "corpus_from",
    "corpus_tokenizer",
    "load_tokenizer",
    "open_tokens",
    "prepare",
    "unigram_entropy",
]
