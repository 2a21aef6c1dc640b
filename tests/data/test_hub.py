"""Datasets on the hub, read by the real client libraries from a local hub (see hub.py)."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import Mixture, Source, open_tokens
from data.tokenizer import train_tokenizer
from tests.data.hub import commit_of, serving
from tests.helpers import CHECKOUT, TINY, train_command

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


@pytest.fixture
def hub(tmp_path, texts):
    """The dataset's folder on the hub, and the environment variables of its clients."""
    dataset = tmp_path / "served" / "HuggingFaceTB" / "smollm-corpus"
    smollm(dataset / "main", texts)
    with serving(tmp_path / "served") as address:
        yield dataset, {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}


def manifest(folder: Path, kind: str) -> Path:
    (file,) = (folder / "cache").glob(f"{kind}-*/tokens.json")
    return file


def test_smollm_from_the_hub_equals_its_local_files(hub, tmp_path):
    dataset, environment = hub
    local = [
        f"data.sources.{name}.{setting}"
        for name, subset in zip(("cosmopedia", "fineweb_edu"), SUBSETS, strict=True)
        for setting in ("hub=null", f"path={dataset}/main/{subset}")
    ]
    for name, more in (("hub", []), ("files", local)):
        (tmp_path / name).mkdir()
        command = [sys.executable, str(CHECKOUT / "scripts" / "prepare_data.py"), "data=smollm", *more]
        command += ["data.val_fraction=0.1", "model.vocab_size=600"]
        done = subprocess.run(command, cwd=tmp_path / name, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    from_hub, from_files = (open_tokens(manifest(tmp_path / name, "tokens").parent) for name in ("hub", "files"))
    assert from_hub.fingerprint == from_files.fingerprint
    assert from_hub.facts["train"]["documents"] > 500
    commit = commit_of(dataset / "main")
    assert from_hub.facts["commits"] == {"cosmopedia": commit, "fineweb_edu": commit}


def test_tokenizer_from_the_hub_equals_its_local_files(hub, corpus, tmp_path):
    _, environment = hub
    files = tmp_path / "served" / "somebody" / "tokenizer" / "main"
    files.mkdir(parents=True)
    train_tokenizer([document.text for document in Mixture([Source(name="s", path=str(corpus))])], 500).save(files)
    fingerprints = []
    for name in ("somebody/tokenizer", str(files)):
        command = [sys.executable, str(CHECKOUT / "scripts" / "prepare_data.py"), f"data.path={corpus}"]
        command += [f"data.tokenizer={name}", f"paths.cache=cache-{len(fingerprints)}"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        fingerprints.append(done.stdout.split("fingerprint ")[1])
    assert fingerprints[0] == fingerprints[1]


def test_stream_from_the_hub_resumes_with_its_first_commit(hub, texts, tmp_path):
    dataset, environment = hub
    command = train_command(
        *TINY, "data=smollm", "data.mode=stream", "data.val_fraction=0.1", "data.shuffle_tokens=3000",
        "trainer.checkpoint_every=5", "trainer.log_every=1",
    )  # fmt: skip

    def losses(folder: Path) -> list[float]:
        (file,) = folder.glob("runs/main/*/metrics.jsonl")
        return [json.loads(line)["loss"] for line in file.read_text().splitlines()]

    for name in ("reference", "killed"):
        (tmp_path / name).mkdir()
    reference = subprocess.run(command, cwd=tmp_path / "reference", env=environment, capture_output=True, text=True)
    assert reference.returncode == 0, reference.stderr
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
    facts = json.loads(manifest(tmp_path / "killed", "stream").read_text())
    assert set(facts["commits"].values()) == {commit} != {commit_of(dataset / "main")}
    assert resumed.stderr == ""
