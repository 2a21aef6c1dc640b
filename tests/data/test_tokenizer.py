"""Tokenizers, trained or existing, are lossless, and no text can spell the end-of-text token."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from huggingface_hub.errors import EntryNotFoundError
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoTokenizer

from common.errors import ConfigError, UserError
from data.tokenizer import END_OF_TEXT, load_tokenizer, read_tokenizer, tokenizer_identity, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the quick brown fox " * 50], 300)


def test_any_text_is_decoded_without_loss(tokenizer):
    rng = random.Random(0)
    planes = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = [
        "naïve café — 東京 🎉\x00\x01\r\n\t  spaces",
        "\U0010ffff\ud7ff",
        END_OF_TEXT,
        "".join(map(chr, range(0x250))),
    ]
    texts += [rng.randbytes(200).decode("latin-1") for _ in range(50)]
    texts += ["".join(rng.choices(planes, k=60)) for _ in range(50)]
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert tokenizer.tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == text


def test_text_cannot_spell_the_end_of_text_token(tokenizer):
    (ids,) = tokenizer.encode([f"before{END_OF_TEXT}after"])
    assert (ids == tokenizer.end).nonzero()[0].tolist() == [len(ids) - 1]


def test_saved_tokenizer_is_loaded_here_and_by_transformers(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded, hf_tokenizer = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.end, loaded.size, loaded.dtype) == (tokenizer.end, tokenizer.size, np.uint16)
    text = "the quick brown fox  jumps , naïvely"
    ids = tokenizer.encode([text])[0].tolist()
    assert loaded.encode([text])[0].tolist() == ids
    assert hf_tokenizer(text).input_ids == ids[:-1] and hf_tokenizer.eos_token_id == ids[-1]
    assert hf_tokenizer.decode(ids[:-1]) == text
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).end == tokenizer.end


def test_saved_tokenizer_encodes_a_prompt_as_training_does(tokenizer, tmp_path):
    """A template, as of LLaMA's tokenizer, adds tokens that training never saw; a spelled out token is characters."""
    template = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, tokenizer.end)]
    )
    for number, post_processor in enumerate((template, processors.Sequence([processors.ByteLevel(), template]))):
        folder = tmp_path / str(number)
        folder.mkdir()
        backend = tokenizers.Tokenizer.from_str(tokenizer.tokenizer.to_str())
        backend.post_processor = post_processor
        assert len(backend.encode("the").ids) > 2
        backend.save(str(folder / "given.json"))
        load_tokenizer(str(folder / "given.json")).save(folder)
        hf_tokenizer = AutoTokenizer.from_pretrained(folder)
        for text in ("the quick fox", f"a {END_OF_TEXT} b"):
            ids = tokenizer.encode([text])[0].tolist()[:-1]
            assert hf_tokenizer(text).input_ids == hf_tokenizer.encode(text, add_special_tokens=False) == ids


def save_word_tokenizer(count: int, folder, config=None) -> str:
    """Write a tokenizer of the words w0, w1, ... and return its folder."""
    vocabulary = {f"w{i}": i for i in range(count)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def test_vocabulary_above_65536_ids_uses_uint32(tmp_path, tokenizer):
    assert tokenizer._replace(size=1 << 16).dtype == np.uint16
    tokenizer = load_tokenizer(save_word_tokenizer(70_000, tmp_path, {"eos_token": {"content": "w5"}}))
    (ids,) = tokenizer.encode(["w69999 w1"])
    assert ids.dtype == np.uint32 and ids.tolist() == [69_999, 1, 5]


def test_missing_or_damaged_tokenizer_is_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer=\S+ has no end-of-text token: it must come with"):
        load_tokenizer(save_word_tokenizer(10, tmp_path))
    with pytest.raises(ValueError, match="has no end-of-text token"):
        load_tokenizer(save_word_tokenizer(10, tmp_path, {"eos_token": "not a word"}))
    with pytest.raises(ValueError, match=r"tokenizer=/nope does not exist: it must be a tokenizer\.json, a folder"):
        load_tokenizer("/nope")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_without_a_usable_config_or_an_unknown_token_is_one_sentence(tmp_path):
    vocabulary = {"known": 0, END_OF_TEXT: 1}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"
    for content in ('{"eos_token": null}', "{}"):
        config.write_text(content)
        tokenizer = load_tokenizer(str(tmp_path))
        assert tokenizer.end == 1
    assert tokenizer.encode(["known"])[0].tolist() == [0, 1]
    with pytest.raises(UserError, match=r"^the tokenizer cannot encode the text \(.*\): it needs an unknown token$"):
        tokenizer.encode(["foreign words"])
    for content in ("[]", '"text"', "3"):
        config.write_text(content)
        with pytest.raises(ConfigError, match=r"tokenizer=\S+ cannot be read \(\S+ holds no JSON object\)"):
            load_tokenizer(str(tmp_path))


def test_text_is_neither_padded_nor_cut_nor_decorated(tmp_path):
    """Whatever tokenizer.json says; and a vocabulary may have gaps."""
    folder = save_word_tokenizer(10, tmp_path, {"eos_token": "w7"})
    backend = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    backend.enable_padding(length=9)
    backend.enable_truncation(2)
    backend.post_processor = processors.TemplateProcessing("w9 $A w9", special_tokens=[("w9", 9)])
    backend.add_special_tokens(["extra"])
    saved = json.loads(backend.to_str())
    saved["model"]["vocab"]["w20"] = 20
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = load_tokenizer(folder)
    assert [ids.tolist() for ids in tokenizer.encode(["w1 w2 w3 w20", "w4"])] == [[1, 2, 3, 20, 7], [4, 7]]
    assert tokenizer.size == 21


def test_merges_are_not_dropped_at_random(tokenizer, tmp_path):
    """Each process of a run tokenizes a stream for itself."""
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (ids,), (expected,) = (t.encode(["the state of the union"]) for t in (read_tokenizer(tmp_path), tokenizer))
    assert ids.tolist() == expected.tolist()


def test_end_of_text_is_the_usual_one_if_the_tokenizer_names_none(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(str(tmp_path)).end == tokenizer.end

    def download(name: str, file: str) -> str:
        if file == "tokenizer_config.json":
            raise EntryNotFoundError(f"{name} has no {file}")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_tokenizer("somebody/tokenizer").end == tokenizer.end


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The names that are asked of the hub, which knows none."""
    names: list[str] = []

    def download(name: str, file: str) -> str:
        names.append(name)
        raise EntryNotFoundError(f"{name} has no {file}")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return names


@pytest.mark.parametrize(
    "name",
    ["nothing", "nothing.json", "a/nothing.json", "./nothing", "../nothing", "~/nothing", "a/b/c", "nothing/", "/x"],
)
def test_path_is_not_sought_on_the_hub(name, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"^tokenizer={name} does not exist: it must be a tokenizer\.json"):
        load_tokenizer(name)
    assert not asked


def test_folder_that_is_gone_is_not_sought_on_the_hub(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^tokenizer=run1/tokenizer cannot be downloaded from the Hugging Face hub"):
        load_tokenizer("run1/tokenizer")
    assert asked == ["run1/tokenizer"]
    (tmp_path / "run1").mkdir()
    (tmp_path / "run2").symlink_to("gone")
    for name in ("run1/tokenizer", "run2/tokenizer"):
        with pytest.raises(ConfigError, match=rf"^tokenizer={name} does not exist: it must be a tokenizer\.json"):
            load_tokenizer(name)
        with pytest.raises(ConfigError, match=rf"^tokenizer={name} does not exist: it must be a tokenizer\.json"):
            tokenizer_identity(name)
    for name in ("run3/tokenizer", "owner/name"):
        with pytest.raises(ConfigError, match=rf"^tokenizer={name} does not exist: it must be a tokenizer\.json"):
            read_tokenizer(Path(name))
    assert asked == ["run1/tokenizer"]


def test_home_folder_is_a_tilde(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_tokenizer("~").size == tokenizer.size == load_tokenizer("~/tokenizer.json").size


def test_identity_is_the_content_of_the_files(tokenizer, tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
    train_tokenizer(["other words " * 50], 300).save(tmp_path / "b")
    (tmp_path / "c" / "tokenizer_config.json").write_text('{"eos_token": "fox"}')
    a, b, c, d = (tokenizer_identity(str(tmp_path / name)) for name in ("a", "b", "c", "d"))
    assert a == d != b != c != a and tokenizer_identity("somebody/tokenizer") == "somebody/tokenizer"
    (tmp_path / "d" / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"^\S+/d/tokenizer_config\.json cannot be read \("):
        tokenizer_identity(str(tmp_path / "d"))
