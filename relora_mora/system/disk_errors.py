"""Which file a disk error is about, and whether the disk or the user is at fault."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

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
