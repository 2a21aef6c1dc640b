"""A run that goes on with other data: where the new text begins, when it is resumed or rewound, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import ConfigError, RunError
from models import Llama
from tests.helpers import compose_config, copy_run, read_jsonl, start, train, train_to_end, wait_for_steps
from training.checkpoint.fork import find_fork_source
from training.checkpoint.format import load_model_state
from training.checkpoint.load import RunCheckpoint
from training.checkpoint.resume import prepare_start
from training.config.identity import run_name
from training.run_dir import RunDir

#: The step of the fork, and the length of its sequences; those of the old run have 64 tokens.
STEP, LENGTH, ROWS = 24, 96, 8


@pytest.fixture(scope="module")
def text(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another text: half of the documents of the old one, in another folder."""
    folder = tmp_path_factory.mktemp("second")
    for file in sorted(corpus.iterdir())[::2]:
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def second(tiny, text: Path, finished_run: Path) -> tuple[str, ...]:
    """Settings of a run that goes on with that text, after step 24 of `runs/main/old`."""
    others = (setting for setting in tiny if not setting.startswith(("data.path", "data.sequence_length")))
    data = (f"data.path={text}", f"data.sequence_length={LENGTH}", f"data.tokenizer={finished_run / 'tokenizer'}")
    fork = ("fork_from=old@24", "fork_data=new", "name=new")
    return (*others, *data, *fork, "trainer.checkpoint_every=4", "trainer.keep_last=9")


@pytest.fixture(scope="module")
def forked(second, finished_run: Path, once) -> Path:
    """The folder in which that run is finished."""

    def fill(folder: Path) -> None:
        copy_run(finished_run, folder).rename(folder / "runs" / "main" / "old")
        (folder / "output").write_text(train_to_end(*second, cwd=folder))

    return once("forked-data", fill)


def rows_of(folder: Path) -> list[dict]:
    return read_jsonl(folder / "runs" / "main" / "new" / "metrics.jsonl")


def without_times(rows: list[dict]) -> list[dict]:
    return [{name: row[name] for name in ("step", "tokens", "loss", "lr", "grad_norm")} for row in rows]


def first_batches(text: Path, tokenizer_of: Path, count: int) -> torch.Tensor:
    """Return the first rows of training on a text: documents in the order of their files, cut and shuffled.

    None of its documents has a hash fraction below 0.05, so that with the lowest one is held out.
    """
    from data import ShuffledDataset, TokenArray, TokenDataset
    from data.sources import Source, Stream

    tokenizer = RunCheckpoint(tokenizer_of, None, print).tokenizer()
    documents = [*Stream(Source(name="text", path=str(text)))]
    held_out = min(document.hash_fraction for document in documents)
    documents = [document for document in documents if document.hash_fraction > held_out]
    assert held_out > 0.05
    ids = np.concatenate(tokenizer.encode([document.text for document in documents]))
    return ShuffledDataset(TokenDataset(TokenArray.in_memory(ids), LENGTH), seed=0).take(0, count)


def test_new_text_begins_with_its_first_batch(forked, finished_run, text):
    """The loss of the first step is that of the old run's weights on the first rows of the new text."""
    assert "on new data from step 25 on" in (forked / "output").read_text()
    old = RunCheckpoint(finished_run, STEP, print)
    model = Llama(old.config)
    model.load_state_dict(load_model_state(old.checkpoint))
    batch = first_batches(text, finished_run, ROWS).long()
    with torch.no_grad():
        _, loss = model(batch[:, :-1], batch[:, 1:], 0.0, None)
    rows = rows_of(forked)
    assert rows[STEP]["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert without_times(rows[:STEP]) == without_times(read_jsonl(finished_run / "metrics.jsonl")[:STEP])


def test_tokens_count_the_sequences_of_both_lengths(forked):
    counts = [row["tokens"] for row in rows_of(forked)]
    before = [step * ROWS * 64 for step in range(1, STEP + 1)]
    assert counts == [*before, *(before[-1] + step * ROWS * LENGTH for step in range(1, 17))]
    assert json.loads((forked / "runs/main/new/result.json").read_text())["tokens"] == counts[-1]


def test_interrupted_run_goes_on_in_the_new_text(forked, second, finished_run, tmp_path):
    copy_run(finished_run, tmp_path).rename(tmp_path / "runs" / "main" / "old")
    job = start(*second, "trainer.log_every=1", cwd=tmp_path)
    shutil.rmtree(tmp_path / "runs" / "main" / "old" / "plots")
    (tmp_path / "runs" / "main" / "old" / "metrics.jsonl").rename(tmp_path / "moved.jsonl")
    wait_for_steps(job, tmp_path, STEP + 6)
    job.terminate()
    job.wait()
    output = train_to_end(*second, cwd=tmp_path)
    assert "continuing" in output and without_times(rows_of(tmp_path)) == without_times(rows_of(forked))
    (again,) = {run.name for run in (tmp_path / "runs" / "main").glob("n*")}
    resumed = train("resume=runs/main/new", cwd=tmp_path)
    assert again == "new" and "finished already" in resumed.stdout, resumed.stderr


def test_fork_of_such_a_run_goes_on_where_it_was(forked, second, tmp_path):
    shutil.copytree(forked / "runs", tmp_path / "runs")
    data = tuple(setting for setting in second if not setting.startswith(("fork", "name")))
    train_to_end(*data, "fork_from=new@32", "name=third", cwd=tmp_path)
    third = read_jsonl(tmp_path / "runs" / "main" / "third" / "metrics.jsonl")
    assert without_times(third) == without_times(rows_of(forked))


def test_streamed_text_begins_with_the_same_batch(forked, second, finished_run, tmp_path):
    """A text that fits in one block has the order of a prepared one."""
    copy_run(finished_run, tmp_path).rename(tmp_path / "runs" / "main" / "old")
    train_to_end(*second, "data.mode=stream", cwd=tmp_path)
    assert [row["loss"] for row in rows_of(tmp_path)] == [row["loss"] for row in rows_of(forked)]


#: A clipper that makes the gradients of three steps non-finite, once.
FAILING = """
import torch
from pathlib import Path
from zclip import ZClip

class Failing(ZClip):
    taken = 0

    def step(self, parameters, optimizer=None, loss=None):
        parameters = list(parameters)
        Failing.taken += 1
        if Failing.taken <= 3:
            for parameter in parameters:
                parameter.grad.mul_(torch.nan)
        return super().step(parameters, optimizer=optimizer, loss=loss)
"""


def test_run_that_is_rewound_to_the_fork_skips_batches_of_the_new_text(second, finished_run, text, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    copy_run(finished_run, tmp_path).rename(tmp_path / "runs" / "main" / "old")
    rewinds = ("trainer.on_nonfinite=rewind", "trainer.max_consecutive_nonfinite=3")
    settings = (*second, *rewinds, "clip._target_=failing.Failing", "trainer.log_every=1")
    output = train_to_end(*settings, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert "rewinding to step 24 and skipping the 3 batches since" in output
    old = RunCheckpoint(finished_run, STEP, print)
    model = Llama(old.config)
    model.load_state_dict(load_model_state(old.checkpoint))
    batch = first_batches(text, finished_run, 4 * ROWS)[3 * ROWS :].long()
    with torch.no_grad():
        _, loss = model(batch[:, :-1], batch[:, 1:], 0.0, None)
    assert rows_of(tmp_path)[STEP]["loss"] == pytest.approx(float(loss), abs=1e-5)


def old_run(finished_run: Path, tmp_path: Path) -> Path:
    return copy_run(finished_run, tmp_path).rename(tmp_path / "runs" / "main" / "old")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("fork_data=same",), r"that run has data\.\S+; fork_data=new begins other data on purpose"),
        (
            ("data.tokenizer=null",),
            r"fork_data=new is not possible with data\.path=\S+, as that run has \S+ and its own",
        ),
        (("model.vocab_size=600",), r"with model\.vocab_size=600: that run has model\.vocab_size=512$"),
        (("data.corruption.steps=[3]",), r"data\.corruption\.steps=\[3\]: up to step 24, that run has \[\]"),
        (("seed=1",), r"with seed=1: that run has seed=0$"),
    ],
)
def test_what_other_data_do_not_allow_is_one_sentence(change, problem, second, finished_run, tmp_path):
    old_run(finished_run, tmp_path)
    with pytest.raises(ConfigError, match=problem) as error:
        find_fork_source(compose_config(*second, *change), RunDir(tmp_path / "runs" / "main" / "new"))
    assert len(str(error.value).splitlines()) == 1


def test_other_tokenizer_is_refused_before_training(second, finished_run, tmp_path):
    """One that is given by its content, and one that is trained on a text which has changed in its place."""
    from data.tokenizer import train_tokenizer

    old = old_run(finished_run, tmp_path)
    (tmp_path / "tokenizer").mkdir()
    train_tokenizer(["another text"], 512).save(tmp_path / "tokenizer")
    done = train(*second, f"data.tokenizer={tmp_path / 'tokenizer'}", cwd=tmp_path)
    assert done.returncode == 2 and "which has other ids than that run's tokenizer: it needs" in done.stderr
    assert f"data.tokenizer={Path('runs/main/old/tokenizer')}\n" in done.stderr and len(done.stderr.splitlines()) == 1
    shutil.copy(tmp_path / "tokenizer" / "tokenizer.json", old / "tokenizer")
    done = train(*second, cwd=tmp_path)
    assert done.returncode == 2 and "is not the tokenizer that the run was trained with" in done.stderr
    assert not (tmp_path / "runs" / "main" / "new").exists()


def test_tokenizer_that_was_trained_on_another_text_in_the_same_place_is_refused(tiny, corpus, finished_run, tmp_path):
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    data = (*(setting for setting in tiny if not setting.startswith("data.path")), f"data.path={text}")
    train_to_end(*data, "trainer.max_steps=4", "name=old", cwd=tmp_path)
    for file in sorted(text.iterdir())[::2]:
        file.write_text(file.read_text().swapcase())
    fork = ("name=new", "fork_from=old@4", "fork_data=new", "data.sequence_length=32")
    done = train(*data, *fork, cwd=tmp_path)
    assert done.returncode == 2 and "with data.tokenizer=null, which has other ids" in done.stderr, done.stderr
    assert not (tmp_path / "runs" / "main" / "new").exists()


@pytest.mark.parametrize(("key", "value"), [("fork_data", "new"), ("fork_statistics", "reset")])
def test_settings_of_forks_are_in_the_name_and_need_a_fork(key, value, tiny, refusal):
    assert f"{key}={value} is not possible without fork_from: it must be same" in refusal(*tiny, f"{key}={value}")
    named = [run_name(compose_config(*tiny, "fork_from=old@24", f"{key}={said}")) for said in ("same", value)]
    assert named[0] == run_name(compose_config(*tiny, "fork_from=old@24")) != named[1]


def test_old_run_that_is_rewound_to_the_step_of_the_fork_later_is_noticed(second, finished_run, tmp_path):
    """Otherwise the new text would begin at another batch when the fork starts again."""
    old, new = old_run(finished_run, tmp_path), RunDir(tmp_path / "runs" / "main" / "new")
    earlier = {"from_step": 12, "to_step": 8, "skipped_batches": 4}
    (old / "rewinds.json").write_text(json.dumps({"rewinds": [earlier]}))
    new.checkpoints.mkdir(parents=True)
    source = find_fork_source(compose_config(*second), new)
    assert prepare_start(new, source, print).new_data_after == STEP + 4
    own = {"from_step": 27, "to_step": STEP, "skipped_batches": 7}
    new.write_rewinds([earlier, own])
    started = prepare_start(new, source, print)
    assert (started.new_data_after, started.skipped_batches) == (STEP + 4, 7)
    later = {"from_step": 30, "to_step": STEP, "skipped_batches": 10}
    (old / "rewinds.json").write_text(json.dumps({"rewinds": [earlier, later]}))
    with pytest.raises(RunError, match=r"old was rewound to step 24 since .*new began there"):
        prepare_start(new, source, print)


def test_archived_run_cannot_be_forked(second, finished_run, tmp_path):
    old = old_run(finished_run, tmp_path)
    shutil.rmtree(old / "checkpoints")
    with pytest.raises(ConfigError, match=r"is not possible: \S+ has no checkpoints, as after scripts/archive\.py"):
        find_fork_source(compose_config(*second), RunDir(tmp_path / "runs" / "main" / "new"))
