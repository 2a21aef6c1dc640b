"""From a corpus to token sequences whose order is arithmetic.

`prepare` turns documents into cached tokens; `SequenceLoader` deals them out. What comes next depends on the
tokens' fingerprint, the seed and the number of sequences consumed, and on nothing else.
"""

from data.corpus import Document, read_documents, split_documents
from data.loader import SequenceLoader
from data.sequences import Sequences, unigram_entropy
from data.tokens import Tokens, check_text, prepare

__all__ = [
    "Document",
    "SequenceLoader",
    "Sequences",
    "Tokens",
    "check_text",
    "prepare",
    "read_documents",
    "split_documents",
    "unigram_entropy",
]
