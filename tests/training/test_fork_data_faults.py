"""A run that goes on with other data is killed at any moment, or loses the run from which it is forked."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import RunError, UserError
from tests.helpers import compose_config, copy_run, final_state, read_jsonl, same, start, train_to_end
from tests.process_pool import Job
from training.checkpoint.fork import find_fork_source
from training.run_dir import RunDir

STEP, STEPS = 24, 40

#: Read in several passes, and streamed in blocks of twenty sequences.
MIXTURES = {
    "stream": ("data.mode=stream", "data.shuffle_tokens=2000", "data.max_tokens=5000"),
    "prepared": ("data.max_tokens=5000",),
}


@pytest.fixture(scope="module")
def sources(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Settings of a mixture of two parts of the text."""
    folder = tmp_path_factory.mktemp("sources")
    for number, file in enumerate(sorted(corpus.iterdir())):
        (folder / f"part{number % 3 // 2}").mkdir(exist_ok=True)
        shutil.copy(file, folder / f"part{number % 3 // 2}")
    weights = {"part0": 3, "part1": 1}
    texts = (f"+data.sources.{part}={{path: {folder / part}, weight: {weight}}}" for part, weight in weights.items())
    return ("data.sources.text=null", *texts)


@pytest.fixture
def mixed(tiny, sources, finished_run: Path) -> Callable[[str], tuple[str, ...]]:
    """Return a function that returns the settings of a run that goes on with a mixture after step 24 of `old`."""
    others = [setting for setting in tiny if not setting.startswith(("data.path", "data.sequence_length"))]
    data = (*sources, "data.sequence_length=96", f"data.tokenizer={finished_run / 'tokenizer'}")
    fork = (f"fork_from=old@{STEP}", "fork_data=new", "name=new", "trainer.checkpoint_every=4", "trainer.log_every=1")
    return lambda mode: (*others, *data, *MIXTURES[mode], *fork)


def with_old_run(finished_run: Path, folder: Path) -> Path:
    """Put the run from which the others are forked into a folder."""
    folder.mkdir(exist_ok=True)
    copy_run(finished_run, folder).rename(folder / "runs" / "main" / "old")
    return folder


def kill_when(ready: Callable[[Path], bool], *settings: str, cwd: Path) -> None:
    """Start training, and send SIGKILL when the run folder is ready for it."""
    job: Job = start(*settings, cwd=cwd)
    folder = cwd / "runs" / "main" / "new"
    while job.poll() is None and not ready(folder):
        time.sleep(0.001)
    job.kill()
    assert job.wait() == -signal.SIGKILL, f"the run ended before it could be killed: {job.output()}"


def has_steps(steps: int) -> Callable[[Path], bool]:
    """Return a function that says whether a run has the metrics of so many steps."""
    return lambda folder: len(RunDir(folder).metrics_rows()) >= steps


def end_of(folder: Path) -> tuple[dict, list[dict], float]:
    """Return what `final_state` returns for the fork."""
    (folder / "alone" / "runs" / "main").mkdir(parents=True)
    (folder / "runs" / "main" / "new").rename(folder / "alone" / "runs" / "main" / "new")
    return final_state(folder / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MIXTURES)
def test_killed_run_goes_on_in_the_mixture_to_the_same_bits(mode, mixed, finished_run, tmp_path):
    whole, killed = (with_old_run(finished_run, tmp_path / name) for name in ("whole", "killed"))
    train_to_end(*mixed(mode), cwd=whole)
    moments = [
        lambda folder: folder.is_dir(),  # before anything is written
        lambda folder: (folder / "metrics.jsonl").exists(),  # the lines of the old run are copied
        has_steps(STEP + 2),  # before the first checkpoint
        lambda folder: any((folder / "checkpoints").glob("*")),  # while that is written, or shortly after
        has_steps(STEP + 7),
        has_steps(STEP + 13),
    ]
    for moment in moments:
        kill_when(moment, *mixed(mode), cwd=killed)
    train_to_end(*mixed(mode), cwd=killed)
    (state, rows, loss), (other_state, other_rows, other_loss) = end_of(whole), end_of(killed)
    assert rows == other_rows and loss == other_loss and [row["step"] for row in rows] == [*range(1, STEPS + 1)]
    assert same(state["state_dict"], other_state["state_dict"])
    assert rows[STEP]["loss"] != read_jsonl(finished_run / "metrics.jsonl")[STEP]["loss"]


DAMAGES = {
    "removed": lambda old: shutil.rmtree(old),
    "other tokenizer": lambda old: (old / "tokenizer" / "tokenizer.json").write_text("{}"),
    "no tokenizer": lambda old: shutil.rmtree(old / "tokenizer"),
    "damaged rewinds": lambda old: (old / "rewinds.json").write_text("{"),
    "damaged checkpoint": lambda old: (old / "checkpoints" / f"step-{STEP:08d}.ckpt").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_run_with_a_checkpoint_of_its_own_needs_the_old_run_no_more(damage, mixed, finished_run, tmp_path):
    with_old_run(finished_run, tmp_path)
    new = RunDir(tmp_path / "runs" / "main" / "new")
    config = compose_config(*mixed("stream"))
    assert find_fork_source(config, new) is not None
    DAMAGES[damage](tmp_path / "runs" / "main" / "old")
    with pytest.raises((UserError, RunError)):
        find_fork_source(config, new)
    new.checkpoints.mkdir(parents=True)
    shutil.copy(finished_run / "checkpoints" / f"step-{STEP + 8:08d}.ckpt", new.checkpoints)
    assert find_fork_source(config, new) is None


def test_killed_run_resumes_without_the_tokenizer_of_the_old_run(tiny, finished_run, tmp_path):
    """Its own folder has the same one. The text, from which it is trained, has not changed."""
    with_old_run(finished_run, tmp_path)
    fork = (f"fork_from=old@{STEP}", "fork_data=new", "name=new", "data.sequence_length=32")
    settings = (*tiny, *fork, "trainer.checkpoint_every=4", "trainer.log_every=1")
    kill_when(lambda folder: len(RunDir(folder).checkpoint_steps()) > 0, *settings, cwd=tmp_path)
    shutil.rmtree(tmp_path / "runs" / "main" / "old" / "tokenizer")
    assert "continuing runs/main/new after step" in train_to_end(*settings, cwd=tmp_path)
