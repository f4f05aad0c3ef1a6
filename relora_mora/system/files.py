"""Small files that are written whole or not at all, and stay on the disk through a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path

from relora_mora.system.disk_errors import LOST_DISK, disk_faults_named
from relora_mora.system.logs import log


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
