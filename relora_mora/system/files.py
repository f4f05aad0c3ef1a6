"""Files and folders that appear whole or not at all, survive a power cut, and name themselves in errors."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from relora_mora.system.logs import log

# a network file system that may come back; no mistake of the user
LOST_DISK = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EREMOTEIO,
}
# without the error of a local disk whose file is damaged
_LOST_NETWORK = LOST_DISK - {errno.EIO}
# what only a write meets, so that an error without a file name is known to be about the file that is being written
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
# safetensors and tokenizers are written in Rust and raise plain Exceptions for disk errors
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


def raise_if_lost(error: Exception) -> None:
    """Raises the error where a network file system is gone: what it holds is not damaged, and may come back."""
    if isinstance(error, OSError) and error.errno in _LOST_NETWORK:
        raise error


def place_of(error: OSError) -> str | None:
    """The file that an OSError names; where it names two, as for a copy, the one that is written."""
    name = error.filename if error.filename2 is None else error.filename2
    return os.fsdecode(name) if isinstance(name, str | bytes) else None


@contextlib.contextmanager
def disk_faults_named(place: Path) -> Iterator[None]:
    """While a file or folder is written: a disk error that names no file, as those of writes do not, gets its name."""
    try:
        yield
    except Exception as error:
        number = disk_errno(error, place)
        if number is None or (isinstance(error, OSError) and place_of(error)):
            raise
        raise OSError(number, os.strerror(number), str(place)) from error


def without_disk_errors(args: threading.ExceptHookArgs) -> None:
    """A ``threading.excepthook`` beside a SummaryWriter: its thread ends with an error of the disk, which the next
    write, or its end, meets again."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def disk_errno(error: Exception, folder: Path) -> int | None:
    """The errno of a disk error met while ``folder`` was written; None for an error of another kind or place."""
    if isinstance(error, OSError):
        place = place_of(error)
        if place is None:
            return error.errno if error.errno in _WRITE_ERRORS else None
        return error.errno if Path(place).is_relative_to(folder) else None
    found = None if isinstance(error, ValueError) else _RUST_ERROR.search(str(error))
    if found is None:
        return None
    number = int(found[1])
    return number if number in _WRITE_ERRORS else None


def write_synced(path: Path, text: str) -> None:
    """Writes a small file whole or not at all; of several processes that write it at once, the last one's stays.

    Raises OSError that names a file, with the file as it was before.
    """
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with disk_faults_named(path):
        try:
            with beside.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_if_possible(path: Path, text: str, without: str) -> None:
    """As :func:`write_synced`; a disk that is full, or takes nothing, costs no more than the error says: ``without``.

    Raises OSError where the disk is gone and may come back (``LOST_DISK``).
    """
    try:
        write_synced(path, text)
    except OSError as error:
        if error.errno in LOST_DISK:
            raise
        log.error("%s: cannot be written (%s): %s", path, error.strerror, without)


def make_folder(path: Path) -> None:
    """With its parents, where it is not there yet; also where a symbolic link on the way leads to what was removed."""
    Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)


def append_whole(handle: int, line: bytes) -> None:
    """Writes a line at the end of an open file, whole or not at all: a disk that fills up would take a part of it.

    Raises OSError.
    """
    before = os.fstat(handle).st_size
    if os.write(handle, line) < len(line):
        os.ftruncate(handle, before)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def append_synced(path: Path, line: str) -> None:
    """A line of a file that may not be there yet, as :func:`append_whole` writes it. Raises OSError that names it."""
    with disk_faults_named(path):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            append_whole(handle, f"{line}\n".encode())
            os.fsync(handle)
        finally:
            os.close(handle)


def sync(path: Path) -> None:
    """Makes the content of a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Removes a folder, a file or a link (never what it points to); of a folder, as much as can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink()


def ordinary_mode() -> int:
    """The permissions that the umask gives a new file."""
    umask = os.umask(0)  # it can only be read by setting it
    os.umask(umask)
    return 0o666 & ~umask


def from_home(path: str) -> str:
    """With the home folder in place of a leading ``~`` or ``~user``; as it is where there is neither, or no such user.

    ``Path.expanduser`` raises for that, and changes texts that are no paths, such as urls.
    """
    return os.path.expanduser(path)  # noqa: PTH111


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
