"""Writes files and folders completely or not at all, so that they survive a power cut; errors name the path."""

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

# errors of a network file system that may come back; not a user's mistake
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
_LOST_NETWORK = LOST_DISK - {errno.EIO}  # EIO is also what a damaged file on a local disk gives
# Only a write raises these, so an error without a file name must be about the file being written.
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
# safetensors and tokenizers are written in Rust and raise plain Exceptions for disk errors
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


def raise_if_lost(error: Exception) -> None:
    """Raises the error if a network file system is gone: its content is not damaged and may come back."""
    if isinstance(error, OSError) and error.errno in _LOST_NETWORK:
        raise error


def place_of(error: OSError) -> str | None:
    """The file that an OSError names; of two, as for a copy, the one being written."""
    name = error.filename if error.filename2 is None else error.filename2
    return os.fsdecode(name) if isinstance(name, str | bytes) else None


@contextlib.contextmanager
def disk_faults_named(place: Path) -> Iterator[None]:
    """Adds the path to disk errors raised in the block that name no file, as errors of ``write`` do not."""
    try:
        yield
    except Exception as error:
        number = _errno_without_file(error)
        if number not in _WRITE_ERRORS:
            raise
        raise OSError(number, os.strerror(number), str(place)) from error


def _errno_without_file(error: Exception) -> int:
    """The errno of an error that names no file; 0 for any other error."""
    if isinstance(error, OSError):
        return 0 if place_of(error) else error.errno or 0
    match = None if isinstance(error, ValueError) else _RUST_ERROR.search(str(error))
    return int(match[1]) if match else 0


def without_disk_errors(args: threading.ExceptHookArgs) -> None:
    """A ``threading.excepthook`` for use with a SummaryWriter: it ignores disk errors.

    The writer's thread ends with such an error, and the next write, or closing the writer, raises it again.
    """
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def write_synced(path: Path, content: str | bytes) -> None:
    """Writes a small file completely or not at all; if several processes write it at once, the last one wins.

    Raises OSError with the path; the file is then unchanged.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with disk_faults_named(path):
        try:
            with temporary.open("wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def make_folder(path: Path) -> None:
    """Creates a missing folder and its parents, also if the path goes through a dangling symbolic link."""
    Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)


def append_line(path: Path, line: str) -> None:
    """Appends a line, completely or not at all, to a file that need not exist yet. Raises OSError with the path."""
    content = f"{line}\n".encode()
    with disk_faults_named(path), path.open("ab", buffering=0) as stream:
        before = os.fstat(stream.fileno()).st_size
        if os.write(stream.fileno(), content) < len(content):  # a disk that fills up takes a part of it
            stream.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def append_synced(path: Path, line: str) -> None:
    """Appends a line as :func:`append_line` does, and flushes it to the disk."""
    append_line(path, line)
    with disk_faults_named(path):
        sync(path)


def sync(path: Path) -> None:
    """Flushes the content of a file, or the names in a folder, to the disk, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems cannot flush folders
            raise
    finally:
        os.close(handle)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Makes a hard link, or a copy if the file system has no hard links; ``target`` must not exist."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)


def remove(path: Path) -> None:
    """Removes a file, a link (never its target) or a folder (as much of it as can be removed)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink()


def from_home(path: str) -> str:
    """The path with a leading ``~`` or ``~user`` replaced by the home folder; unchanged for an unknown user.

    ``Path.expanduser`` raises in that case, and it changes texts that are not paths, such as urls.
    """
    return os.path.expanduser(path)  # noqa: PTH111


_unfinished: set[str] = set()


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder next to ``out``: renamed to ``out`` when the block ends, removed if it raises.

    A signal that ends the process leaves it behind, with a name that begins with a dot.

    It is created immediately, so that no hours of work go into a place that cannot be written. Raises FileExistsError
    if ``out`` exists and is not empty, and OSError for a disk error.
    """
    target = Path(os.path.realpath(out))
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{out}: exists and is not empty; give a new folder, or remove it")
    if target.is_mount():
        raise FileExistsError(f"{out}: is a mount point, which cannot be replaced; give a new folder inside it")
    make_folder(target.parent)
    # on the same file system, so that the folder inside it can be renamed
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as parent:
        _unfinished.add(parent)
        try:
            work = Path(parent, "new")
            work.mkdir()  # only the owner can read the parent; this folder follows the umask
            with disk_faults_named(out):
                yield work
                mode = work.stat().st_mode & 0o666
                for path in work.rglob("*"):
                    if path.is_file():
                        path.chmod(mode)  # safetensors writes files that only their owner can read
                    sync(path)  # some file systems notice only now that they are full
                work.rename(target)
        finally:
            _unfinished.discard(parent)
    sync(target.parent)


def remove_unfinished() -> None:
    """Removes the folders still being written, for a process that exits without leaving its ``with`` blocks."""
    for folder in _unfinished:
        shutil.rmtree(folder, ignore_errors=True)
