"""From a corpus to token sequences whose order is arithmetic.

`prepare` turns documents into cached tokens; `SequenceLoader` deals them out. What comes next depends on the
tokens' fingerprint, the seed and the number of sequences consumed, and on nothing else.
"""

from data.bad_batches import KINDS, BadBatches, Batch
from data.loader import SequenceLoader
from data.prepare import Corpus, corpus_tokenizer, prepare
from data.sequences import Sequences, unigram_entropy
from data.sources import Document, Mixture, Source, sources_of
from data.tokenizer import load_tokenizer
from data.tokens import TokenArray, Tokens, open_tokens

__all__ = [
    "KINDS",
    "BadBatches",
    "Batch",
    "Corpus",
    "Document",
    "Mixture",
    "SequenceLoader",
    "Sequences",
    "Source",
    "TokenArray",
    "Tokens",
    "corpus_tokenizer",
    "load_tokenizer",
    "open_tokens",
    "prepare",
    "sources_of",
    "unigram_entropy",
]
