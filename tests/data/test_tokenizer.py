"""Tokenizers: trained or given, nothing is lost, and no text can spell a boundary."""

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def encoder():
    return train_tokenizer(["the quick brown fox " * 50], 300)


def test_any_bytes_come_back(encoder):
    draw = random.Random(0)
    planes = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = [
        "naïve café — 東京 🎉\x00\x01\r\n\t  spaces",
        "\U0010ffff\ud7ff",
        END_OF_TEXT,
        "".join(map(chr, range(0x250))),
    ]
    texts += [draw.randbytes(200).decode("latin-1") for _ in range(50)]
    texts += ["".join(draw.choices(planes, k=60)) for _ in range(50)]
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        assert encoder.tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == text


def test_a_document_cannot_spell_a_boundary(encoder):
    (ids,) = encoder.encode([f"before{END_OF_TEXT}after"])
    assert (ids == encoder.end).nonzero()[0].tolist() == [len(ids) - 1]


def test_what_is_saved_is_loaded_here_and_by_transformers(encoder, tmp_path):
    encoder.save(tmp_path)
    again, theirs = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert (again.end, again.size, again.dtype) == (encoder.end, encoder.size, np.uint16)
    text = "the quick brown fox  jumps, naïvely"
    ids = encoder.encode([text])[0].tolist()
    assert again.encode([text])[0].tolist() == ids
    assert theirs(text).input_ids == ids[:-1] and theirs.eos_token_id == ids[-1] and theirs.decode(ids[:-1]) == text
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).end == encoder.end


def words(count: int, folder, config=None):
    vocabulary = {f"w{i}": i for i in range(count)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def test_more_than_65536_ids_take_four_bytes(tmp_path):
    encoder = load_tokenizer(words(70_000, tmp_path, {"eos_token": {"content": "w5"}}))
    (ids,) = encoder.encode(["w69999 w1"])
    assert ids.dtype == np.uint32 and ids.tolist() == [69_999, 1, 5]


def test_a_tokenizer_must_be_there_whole_and_say_how_a_text_ends(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer=\S+ does not say which token ends a text: it must come with"):
        load_tokenizer(words(10, tmp_path))
    with pytest.raises(ValueError, match="does not say which token ends a text"):
        load_tokenizer(words(10, tmp_path, {"eos_token": "not a word"}))
    with pytest.raises(ValueError, match=r"tokenizer=/nope is not there: it must be a tokenizer\.json, a folder"):
        load_tokenizer("/nope")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(str(tmp_path))
