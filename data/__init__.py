"""From a corpus to token sequences whose order is arithmetic.

`prepare` turns documents into cached tokens, or `StreamingDataset` tokenizes them on the way; `TrainLoader` deals them out.
What comes next depends on the text and tokenizer, the sequence length, the seed and the number of sequences consumed,
and where the text is streamed on the size of its blocks.
"""

from data.batch import Batch
from data.corpus import Corpus, corpus_tokenizer
from data.corruption import KINDS, BatchCorruption
from data.loader import TrainLoader
from data.prepare import prepare
from data.sequences import ShuffledDataset, TokenDataset, unigram_entropy
from data.sources import Document, Mixture, Source, SourceError, sources_of
from data.stream import StreamingDataset
from data.tokenizer import TOKENIZER_FILES, TextEncoder, load_tokenizer
from data.tokens import TokenArray, Tokens, open_tokens

__all__ = [
    "KINDS",
    "TOKENIZER_FILES",
    "Batch",
    "BatchCorruption",
    "Corpus",
    "Document",
    "Mixture",
    "ShuffledDataset",
    "Source",
    "SourceError",
    "StreamingDataset",
    "TextEncoder",
    "TokenArray",
    "TokenDataset",
    "Tokens",
    "TrainLoader",
    "corpus_tokenizer",
    "load_tokenizer",
    "open_tokens",
    "prepare",
    "sources_of",
    "unigram_entropy",
]
