"""Output folders that appear whole or not at all, also where the process is interrupted."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from relora_mora.system.disk_errors import disk_errno
from relora_mora.system.files import ordinary_mode, sync

ENDINGS = (signal.SIGTERM, signal.SIGHUP)
_unfinished: set[str] = set()


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write into: renamed to ``out`` when the block ends, removed when it raises.

    It is made at once, so that hours of work are not spent on a place that cannot be written. Raises FileExistsError
    when something is at ``out`` already, and for a disk error an OSError that names ``out``.
    """
    target = Path(os.path.realpath(out))
    with _temporary_parent(out, target) as parent, _removed_at_hard_exit(parent):
        try:
            work = Path(parent, "new")
            work.mkdir()  # the parent is readable by its owner alone, this one as the umask says
            yield work
            mode = ordinary_mode()
            for path in work.rglob("*"):
                if path.is_file():
                    path.chmod(mode)  # safetensors makes files that only their owner reads
                sync(path)  # some file systems notice only now that they are full
            work.rename(target)
        except Exception as error:
            number = disk_errno(error, Path(parent))
            if number is None:
                raise
            raise OSError(number, os.strerror(number), str(out)) from error
    sync(target.parent)


def _temporary_parent(out: Path, target: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder on the file system of ``target``, so that what is inside can be renamed to it."""
    try:
        if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
            raise FileExistsError(f"{out}: exists and is not empty; give a new folder, or remove it")
        if target.is_mount():
            raise FileExistsError(
                f"{out}: is a mount point, which cannot be replaced as a whole; give a new folder below it"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        if error.errno is None:  # one of ours
            raise
        # mkdir says EEXIST where a file is in the place of a parent
        number = errno.ENOTDIR if isinstance(error, FileExistsError) else error.errno
        raise OSError(number, os.strerror(number), str(out)) from error


@contextlib.contextmanager
def _removed_at_hard_exit(folder: str) -> Iterator[None]:
    """Within the block, :func:`remove_unfinished` removes the folder, and so does a signal that ends the process."""
    _unfinished.add(folder)
    in_main_thread = threading.current_thread() is threading.main_thread()
    ending = [each for each in ENDINGS if in_main_thread and signal.getsignal(each) is signal.SIG_DFL]
    for number in ending:
        signal.signal(number, remove_and_end)
    try:
        yield
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)
        _unfinished.discard(folder)


def remove_and_end(number: int, frame: FrameType | None) -> None:
    """Handles a signal as by default, but removes the folders still being written before."""
    remove_unfinished()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def remove_unfinished() -> None:
    """Removes the folders still being written; for a process that exits without unwinding its blocks."""
    for folder in _unfinished:
        shutil.rmtree(folder, ignore_errors=True)
