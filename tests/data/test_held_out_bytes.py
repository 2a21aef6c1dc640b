"""Held-out bytes are counted where text is tokenized: tokenizers that change text can then be compared."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from data import Corpus, Mixture, Source, Tokens, prepare
from data.tokenizer import END_OF_TEXT

TEXTS = [f"{n} Ώδε ἡ Ῥόδος: 吾輩は猫である ①②③ ㎏ ﬁne, naïve Café 🙂 " + "Déjà vu " * (n % 7) for n in range(120)]


def byte_level(normalizer=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def all_unknown() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, END_OF_TEXT: 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


TOKENIZERS = {
    "lossless": byte_level,
    "nfkc": lambda: byte_level(normalizers.NFKC()),
    "accents-stripped": lambda: byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
    "all-unknown": all_unknown,
}


@pytest.fixture(params=TOKENIZERS)
def tokens(request, tmp_path) -> Tokens:
    """The texts in parts of some documents, with each tokenizer."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    TOKENIZERS[request.param]().save(str(tmp_path / "tokenizer.json"))
    source = Source(name="text", path=str(tmp_path / "text.jsonl"))
    corpus = Corpus((source,), str(tmp_path / "tokenizer.json"), val_fraction=0.5)
    return prepare(corpus, tmp_path, 8, part_tokens=800)


def test_bytes_are_those_of_the_text_for_any_tokenizer(tokens):
    held_out = [d for d in Mixture(tokens_source(tokens)) if d.hash_fraction < 0.5]
    assert len(held_out) > 30
    total = len(tokens.test)
    assert tokens.held_out_bytes(0, total) == pytest.approx(sum(document.size for document in held_out))
    ids = tokens.test.read(0, total)
    end = int(tokens.facts["end_of_text"])
    ends = (np.flatnonzero(ids == end) + 1).tolist()
    sizes = [document.size for document in held_out]
    assert tokens.held_out_bytes(ends[2], ends[9]) == pytest.approx(sum(sizes[3:10])), "whole documents"
    middle = (ends[4] + ends[5]) // 2
    share = (middle - ends[4]) / (ends[5] - ends[4])
    assert tokens.held_out_bytes(ends[2], middle) == pytest.approx(sum(sizes[3:5]) + share * sizes[5])
    assert tokens.held_out_bytes(7, 7) == 0
    parts = [tokens.held_out_bytes(start, start + 100) for start in range(0, total, 100)]
    assert sum(parts) == pytest.approx(sum(sizes)), "a text is the sum of its parts"


def tokens_source(tokens: Tokens) -> list[Source]:
    return [Source(name="text", path=str(tokens.folder.parent / "text.jsonl"))]
