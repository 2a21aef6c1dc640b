"""Datasets on the hub, read by the real client libraries from a local hub (see hub.py)."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import Corpus, Mixture, Source, corpus_from
from data.tokenizer import train_tokenizer
from tests.data import hub_client
from tests.data.hub import commit_of, serving
from tests.data.processes import Job
from tests.helpers import TINY, compose_config, train_command, train_to_end

SUBSETS = ("cosmopedia-v2", "fineweb-edu-dedup")
CARD = "---\nconfigs:\n" + "".join(
    f"- config_name: {subset}\n  data_files:\n  - split: train\n    path: {subset}/train-*\n" for subset in SUBSETS
)


def smollm(folder: Path, texts: list[str]) -> None:
    """Write a dataset with the layout of SmolLM-corpus: two subsets of Parquet files, and a card that names them."""
    for subset in SUBSETS:
        (folder / subset).mkdir(parents=True)
        for i in range(2):
            table = pa.table({"id": list(map(str, range(len(texts)))), "text": [f"{subset} {i} {t}" for t in texts]})
            pq.write_table(table, folder / subset / f"train-{i:05}-of-00002.parquet", row_group_size=50)
    (folder / "README.md").write_text(CARD + "---\nText.\n")


@pytest.fixture(scope="module")
def texts(corpus) -> list[str]:
    words = " ".join(document.text for document in Mixture([Source(name="s", path=str(corpus))])).split()
    rng = random.Random(0)
    return [" ".join(words[i : i + rng.randint(5, 60)]) for i in rng.sample(range(len(words) - 60), 300)]


@pytest.fixture(scope="module")
def files(tmp_path_factory, texts) -> Path:
    """The files of the dataset and of a tokenizer on the hub."""
    folder = tmp_path_factory.mktemp("served")
    smollm(folder / "HuggingFaceTB" / "smollm-corpus" / "main", texts)
    tokenizer = folder / "somebody" / "tokenizer" / "main"
    tokenizer.mkdir(parents=True)
    train_tokenizer(texts, 500).save(tokenizer)
    return folder


def use_hub(address: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Set the variables that clients of the hub read when they are imported."""
    patch.setenv("HF_ENDPOINT", address)
    patch.setenv("HF_HOME", str(folder / "home"))


def last_line(job: Job) -> dict[str, Any]:
    output = job.wait()
    assert job.status == 0, output
    return json.loads(output.splitlines()[-1])


def smollm_settings(files: Path) -> list[str]:
    """Overrides that replace the subsets of `data=smollm` by their files."""
    return [
        f"data.sources.{name}.{setting}"
        for name, subset in zip(("cosmopedia", "fineweb_edu"), SUBSETS, strict=True)
        for setting in ("hub=null", f"path={files}/HuggingFaceTB/smollm-corpus/main/{subset}")
    ]


def corpus_of(*settings: str) -> Corpus:
    return corpus_from(compose_config("data=smollm", "data.val_fraction=0.1", "model.vocab_size=400", *settings).data)


@pytest.fixture(scope="module")
def results(files, tmp_path_factory) -> dict[str, Any]:
    """What a process prints that prepares the dataset and its local files, each with both tokenizers, and streams it.

    Also what one prints that resumes the stream after the dataset has changed.
    """
    folder = tmp_path_factory.mktemp("clients")
    tokenizers = ("null", "somebody/tokenizer", f"{files}/somebody/tokenizer/main")
    corpora = [
        corpus_of(*smollm_settings(files)),
        *(corpus_of(f"data.tokenizer={tokenizer}") for tokenizer in tokenizers),
    ]
    streamed = corpus_of("data.mode=stream")
    with pytest.MonkeyPatch.context() as patch, serving(files) as address:
        use_hub(address, folder, patch)
        first = Job(folder / "first", hub_client.prepare_and_stream, corpora, streamed, folder, fresh=True)
        first_results = last_line(first)
        dataset = files / "HuggingFaceTB" / "smollm-corpus"
        commit = commit_of(dataset / "main")
        (dataset / "main").rename(dataset / "before")
        smollm(dataset / "main", ["other words"] * 200)
        second = Job(folder / "second", hub_client.resume, streamed, folder, first_results["state"], fresh=True)
        return first_results | {"resumed": last_line(second), "commit": commit, "new": commit_of(dataset / "main")}


def test_smollm_from_the_hub_equals_its_local_files(results):
    (from_files, _), (from_hub, facts), *_ = results["prepared"]
    assert from_hub == from_files
    assert facts["train"]["documents"] > 500
    assert facts["commits"] == {"cosmopedia": results["commit"], "fineweb_edu": results["commit"]}


def test_tokenizer_from_the_hub_equals_its_local_files(results):
    (trained, _), (from_hub, _), (from_files, _) = results["prepared"][1:]
    assert from_hub == from_files != trained


def test_stream_from_the_hub_resumes_with_its_first_commit(results):
    assert results["resumed"] == {name: results[name] for name in ("rows", "state", "commits")}
    assert set(results["resumed"]["commits"].values()) == {results["commit"]} != {results["new"]}
    assert len(results["rows"]) == hub_client.AFTER and results["state"]["stream"]["block"] > 0


@pytest.mark.slow
def test_killed_run_streams_on_from_the_first_commit(texts, tmp_path):
    dataset = tmp_path / "served" / "HuggingFaceTB" / "smollm-corpus"
    smollm(dataset / "main", texts)
    with serving(tmp_path / "served") as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        check_killed_run(dataset, environment, texts, tmp_path)


def check_killed_run(dataset: Path, environment: dict[str, str], texts: list[str], tmp_path: Path) -> None:
    """Compare a run that was killed while the dataset changed with one of the first commit's files on this machine."""
    settings = (
        *TINY, "data=smollm", "data.mode=stream", "data.val_fraction=0.1", "data.shuffle_tokens=3000",
        "trainer.checkpoint_every=5", "trainer.log_every=1",
    )  # fmt: skip
    command = train_command(*settings)

    def losses(folder: Path) -> list[float]:
        (file,) = folder.glob("runs/main/*/metrics.jsonl")
        return [json.loads(line)["loss"] for line in file.read_text().splitlines()]

    for name in ("reference", "killed"):
        (tmp_path / name).mkdir()
    train_to_end(*settings, *smollm_settings(tmp_path / "served"), cwd=tmp_path / "reference")
    job = subprocess.Popen(command, cwd=tmp_path / "killed", env=environment, stdout=subprocess.DEVNULL)
    while job.poll() is None and not list(tmp_path.glob("killed/runs/main/*/checkpoints/step-00000010.ckpt")):
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    commit = commit_of(dataset / "main")
    (dataset / "main").rename(dataset / "before")
    smollm(dataset / "main", [text.upper() for text in texts])
    resumed = subprocess.run(command, cwd=tmp_path / "killed", env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0 and "continuing" in resumed.stdout, resumed.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "reference")
    (manifest,) = (tmp_path / "killed" / "cache").glob("stream-*/tokens.json")
    facts = json.loads(manifest.read_text())
    assert set(facts["commits"].values()) == {commit} != {commit_of(dataset / "main")}
    assert resumed.stderr == ""
