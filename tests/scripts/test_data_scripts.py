"""The scripts train a tokenizer and prepare tokens that a run trains on; mistakes are one sentence."""

import json
import shutil
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from common.errors import UserError
from data import Mixture, Source
from tests.helpers import CHECKOUT, SLOW, TINY, script, train
from tests.scripts.loading import load_script

SHARED = CHECKOUT.parent / "shared" / "data" / "corpus"


def test_run_uses_the_prepared_tokenizer_and_tokens(corpus, tmp_path):
    trained = script("train_tokenizer.py", f"data.path={corpus}", "vocab_size=400", "out=mine", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.splitlines()[-1] == "400 tokens: data.tokenizer=mine"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "mine")) == 400
    settings = (f"data.path={corpus}", "data.tokenizer=mine")
    first = script("prepare_data.py", *settings, "model.vocab_size=512", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "vocabulary 400" in first.stdout and "checksums right" in first.stdout
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    second = script("prepare_data.py", *settings, cwd=tmp_path)
    assert second.stdout in first.stdout, "the second time the tokens are only verified"
    run = train(*TINY, *settings, "trainer.max_steps=2", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert before == {path: time for path, time in after.items() if path in before}
    assert len([path for path in after if path.name == "tokens.json"]) == 1, "the run trains on the prepared tokens"


@pytest.fixture
def run_main(tmp_path, monkeypatch) -> Callable[..., None]:
    """Run the main function of a script with overrides, in the folder `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *overrides: str) -> None:
        with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
            values = OmegaConf.to_container(compose(name, [*overrides]), resolve=True)
        load_script(name).main(values)

    return run


def test_tokenizer_is_trained_on_the_bytes_of_the_setting(run_main, tmp_path, capsys):
    rows = [*["first words and more first words"] * 20, *["later sentences, later sentences"] * 20]
    lines = [json.dumps({"text": f"{i} {text}"}) for i, text in enumerate(rows)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    (tmp_path / ".saving-0123-early").mkdir()
    (tmp_path / ".saving-0123-early" / "left").touch()
    settings = ("data.path=text.jsonl", "data.val_fraction=1e-9", "vocab_size=5000")
    run_main("train_tokenizer", *settings, "max_bytes=300", "out=early")
    run_main("train_tokenizer", *settings, "out=all")
    early, late = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("early", "all"))
    assert capsys.readouterr().out.splitlines()[1::2] == [
        f"{len(tokenizer)} tokens (the text has no more, of 5,000): data.tokenizer={name}"
        for name, tokenizer in (("early", early), ("all", late))
    ]
    assert "Ġfirst" in early.get_vocab() and "Ġlater" not in early.get_vocab() and "Ġlater" in late.get_vocab()
    assert {path.name for path in tmp_path.iterdir()} == {"text.jsonl", "early", "all"}
    assert {path.name for path in (tmp_path / "early").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_paths_are_no_markup_and_tokens_are_found_in_a_copied_cache(run_main, tmp_path, capsys):
    (tmp_path / "text [/b]").mkdir(parents=True)
    rows = "".join(json.dumps({"text": f"{i} words and more of them"}) + "\n" for i in range(60))
    (tmp_path / "text [/b]" / "[red].jsonl").write_text(rows)
    settings = ("data.path='text [/b]'", "data.val_fraction=0.2")
    run_main("train_tokenizer", *settings, "vocab_size=300", "out='mine [/b]'")
    assert capsys.readouterr().out.splitlines()[-1].endswith("data.tokenizer=mine [/b]")
    run_main("prepare_data", *settings, "data.tokenizer='mine [/b]'", "paths.cache='[/b]'")
    (folder,) = (tmp_path / "[").glob("b]/tokens-*")
    out = capsys.readouterr().out
    assert str(folder.relative_to(tmp_path)) in out and "checksums right" in out
    shutil.copytree(tmp_path / "[" / "b]", tmp_path / "copied")
    shutil.rmtree(tmp_path / "text [")
    shutil.rmtree(tmp_path / "[")
    run_main("prepare_data", *settings, "data.tokenizer='mine [/b]'", "paths.cache=copied")
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "data.sources.text.path=text [/b] is not there: using the tokens that were prepared from it"
    )
    assert rest[-1] == out.splitlines()[-1]


def test_checksums_of_large_tokens_are_compared_too(run_main, corpus, tmp_path, monkeypatch, capsys):
    """Training compares them for at most 2 GiB."""
    monkeypatch.setattr("data.tokens.MAX_VERIFIED_BYTES", 0)
    settings = (f"data.path={corpus}", "data.deduplicate=true", "model.vocab_size=300", "paths.cache=cache")
    run_main("prepare_data", *settings)
    (folder,) = (tmp_path / "cache").glob("tokens-*")
    facts = json.loads((folder / "tokens.json").read_text())
    size = sum(file.stat().st_size for file in folder.iterdir() if file.name != "tokens.json")
    out = " ".join(capsys.readouterr().out.split())
    assert f"{len(facts['files'])} files, {size / 1e6:,.1f} MB, checksums right; vocabulary 300, 0 duplicates" in out
    for key in ("documents", "bytes", "tokens"):
        assert f"│ {key} │ {facts['train'][key]:,} │ {facts['test'][key]:,} │" in out
    content = bytearray((folder / "train-00000.npy").read_bytes())
    content[-1] ^= 1
    (folder / "train-00000.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000\.npy does not have the checksum it was written with"):
        run_main("prepare_data", *settings)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train_tokenizer.py", ["out=existing"], "out=existing exists already"),
        SLOW("train_tokenizer.py", ["vocab_size=100"], "data.vocab_size=100 is not allowed: it must be at least 257"),
        SLOW("train_tokenizer.py", ["max_bytes=no"], "max_bytes=no is not allowed"),
        SLOW("prepare_data.py", ["data.path=/nope"], "data.sources.text.path=/nope does not exist"),
        SLOW("prepare_data.py", ["data.val_fraction=2"], "data.val_fraction=2 is not allowed"),
        SLOW("prepare_data.py", ["data.tokenizer=/nope"], "data.tokenizer=/nope does not exist"),
        SLOW("prepare_data.py", ["data=smollm"], "data.sources.cosmopedia.hub=HuggingFaceTB/smollm-corpus cannot be"),
        ("prepare_data.py", ["data.mode=stream"], "data.mode=stream is not possible"),
        SLOW("prepare_data.py", ["dta=smollm"], "dta=smollm is not possible"),
    ],
)
def test_mistakes_are_one_sentence(name, arguments, message, tmp_path):
    (tmp_path / "existing").mkdir()
    offline = {"HF_HUB_OFFLINE": "1"} if "data=smollm" in arguments else {}
    done = script(name, *arguments, cwd=tmp_path, **offline)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["existing"]


def test_smollm_from_local_files(corpus, tmp_path):
    """Files with the columns of SmolLM-corpus's two subsets are mixed by their weights."""
    texts = [document.text[:2000] for document in Mixture([Source(name="s", path=str(corpus))])]
    texts = [text[i : i + 500] for text in texts for i in range(0, 2000, 500)]
    for name, extra in (("cosmopedia", "prompt"), ("fineweb_edu", "id")):
        rows = [{extra: "x", "text": f"{name} {text}", "token_length": 5} for text in texts]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    local = [
        f"data.sources.{name}.{key}"
        for name in ("cosmopedia", "fineweb_edu")
        for key in ("hub=null", f"path={name}.parquet")
    ]
    done = script("prepare_data.py", "data=smollm", *local, "data.val_fraction=0.1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (manifest,) = (tmp_path / "cache").glob("tokens-*/tokens.json")
    facts = json.loads(manifest.read_text())
    documents = facts["train"]["documents"] + facts["test"]["documents"]
    assert documents == pytest.approx(len(texts) * (1 + 28 / 220), abs=3)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the corpus of prose is missing")
def test_vocabulary_of_the_paper_on_prose(tmp_path):
    """openstax.jsonl.xz has enough text for 65,536 tokens, and is small enough for a test."""
    settings = (f"data.path={SHARED}/openstax.jsonl.xz", "data.name=prose")
    trained = script("train_tokenizer.py", *settings, cwd=tmp_path)
    assert trained.returncode == 0 and "65,536 tokens: data.tokenizer=cache/tokenizers/prose-65536" in trained.stdout
    done = script("prepare_data.py", *settings, "data.tokenizer=cache/tokenizers/prose-65536", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (manifest,) = (tmp_path / "cache").glob("tokens-*/tokens.json")
    facts = json.loads(manifest.read_text())
    assert facts["vocab_size"] == 65_536 and facts["dtype"] == "uint16"
    assert facts["train"]["bytes"] / facts["train"]["tokens"] > 4
