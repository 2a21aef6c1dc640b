"""A checkpoint that stays while a script needs it, though the run is still training and keeps only its last ones."""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from common.files import temporary_folder
from training.checkpoint.load import RunCheckpoint

#: Name of the folder with a script's own links, behind the beginning and token of a temporary name.
NAME = "held"

#: Error numbers of file systems, and of places on them, that take no link to a file; and no new folder.
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
NO_FOLDER = (errno.EACCES, errno.EPERM, errno.EROFS)

#: How often another checkpoint is chosen because the one before was removed while it was linked.
ATTEMPTS = 5


@contextmanager
def held(run: Path, step: int | None, report: Callable[[str], None]) -> Iterator[RunCheckpoint]:
    """Yield a checkpoint of a run, whose files no other process removes until the block ends.

    The run folder gets a hidden folder with hard links to them, or copies where links are impossible. In a folder that
    cannot be written, the checkpoint is that of the run.

    Raises:
        UserError: see `RunCheckpoint`, of which these are the arguments.
    """
    checkpoint = RunCheckpoint(run, step, report)
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_folder(run / NAME))
        except OSError as error:
            if error.errno not in NO_FOLDER:
                raise
            yield checkpoint
            return
        for attempt in range(ATTEMPTS):
            try:
                checkpoint.checkpoint = _link(checkpoint.checkpoint, folder / str(attempt))
                break
            except FileNotFoundError:
                checkpoint = RunCheckpoint(run, step, report)
        yield checkpoint


def _link(checkpoint: Path, target: Path) -> Path:
    """Link the file or files of a checkpoint, and return the link; `FileNotFoundError` if it is removed meanwhile."""
    real = checkpoint.resolve(strict=True)
    if real.is_dir():
        target.mkdir()
        for file in real.iterdir():
            _link_file(file, target / file.name)
    else:
        _link_file(real, target)
    if not checkpoint.exists():  # a folder loses its name before its files
        raise FileNotFoundError(errno.ENOENT, "removed", str(checkpoint))
    return target


def _link_file(file: Path, target: Path) -> None:
    real = file.resolve(strict=True)
    try:
        target.hardlink_to(real)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(real, target)
