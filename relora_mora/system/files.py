"""Files and folders that appear whole or not at all, and are on the disk for good."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_to_remove: set[str] = set()
_OF_RUST = re.compile(
    r"\(os error (\d+)\)"
)  # safetensors and tokenizers raise plain Exceptions for the errors of a disk


def place_of(error: OSError) -> str | None:
    """The file that an error of the system names; of two, as for a copy, the one that is written."""
    name = error.filename if error.filename2 is None else error.filename2
    return os.fsdecode(name) if isinstance(name, str | bytes) else None


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write into; it gets the name ``out`` when the block has ended without an error, and goes else.

    Made before the block, so that what takes hours is not done for a place that cannot be written to. Raises FileExistsError
    when something is at ``out`` already, and for a fault of the disk an OSError that names ``out``.
    """
    target = Path(os.path.realpath(out))
    with _holder(out, target) as holder, at_hard_exit_remove(holder):
        try:
            work = Path(holder, "new")
            work.mkdir()  # the holder is for its owner alone, this one is as the umask says
            yield work
            mode = ordinary_mode()
            for path in work.rglob("*"):
                if path.is_file():
                    path.chmod(mode)  # safetensors makes files that only their owner reads
                sync(path)  # some file systems notice only now that they are full
            work.rename(target)
        except Exception as error:
            number = _fault_of_disk(error, Path(holder))
            if number is None:
                raise
            raise OSError(number, os.strerror(number), str(out)) from error
    sync(target.parent)


def _holder(out: Path, target: Path) -> tempfile.TemporaryDirectory[str]:
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
        if error.errno is None:
            raise
        number = (
            errno.ENOTDIR if isinstance(error, FileExistsError) else error.errno
        )  # a file stands where a parent should
        raise OSError(number, os.strerror(number), str(out)) from error


@contextlib.contextmanager
def disk_faults_named(folder: Path) -> Iterator[None]:
    """While ``folder`` is written: an error of its disk becomes an OSError that names a place, which writes and libraries leave out."""
    try:
        yield
    except Exception as error:
        number = _fault_of_disk(error, folder)
        if number is None or (isinstance(error, OSError) and place_of(error)):
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


def _fault_of_disk(error: Exception, folder: Path) -> int | None:
    """The errno of what went wrong while ``folder`` was written; None when it was something else."""
    if isinstance(error, OSError):
        place = place_of(error)
        inside = place is not None and Path(place).is_relative_to(folder)
        return error.errno if inside or (place is None and error.errno in _OF_WRITING) else None
    found = None if isinstance(error, ValueError) else _OF_RUST.search(str(error))
    return int(found[1]) if found and int(found[1]) in _OF_WRITING else None


def ordinary_mode() -> int:
    """The mode that the umask gives a new file."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def sync(path: Path) -> None:
    """Makes what a file holds, or renames and new names in a folder, last over a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
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


def remove(path: Path) -> None:
    """Removes a folder, a file or a link (never what it leads to), as far as that goes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink()


# of a network file system that goes and comes again; no mistake of the user
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


@contextlib.contextmanager
def at_hard_exit_remove(folder: str) -> Iterator[None]:
    """The folder also goes where the process ends without leaving the block."""
    _to_remove.add(folder)
    try:
        yield
    finally:
        _to_remove.discard(folder)


def remove_unfinished() -> None:
    """For a process that ends without leaving its blocks."""
    for folder in _to_remove:
        shutil.rmtree(folder, ignore_errors=True)
