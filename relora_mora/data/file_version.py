"""The version of a file on a disk or at a server, and that it stays the same."""

from __future__ import annotations

import os
from typing import NamedTuple

from relora_mora.data.errors import SourceError


class Version(NamedTuple):
    """What a server or a disk says about the version of a file."""

    etag: str | None
    modified: str | None
    size: int | None  # bytes; the answer of a server may be wrong here

    @staticmethod
    def on_disk(status: os.stat_result) -> Version:
        """The inode is left out: FAT, SMB and FUSE give the same file another one once the kernel has forgotten it."""
        return Version(None, str(status.st_mtime_ns), status.st_size)

    def is_other_than(self, other: Version) -> bool:
        """Whether they cannot be of the same version. An answer may lack what another one has."""
        if self.etag and other.etag:
            return self.etag != other.etag
        return bool(self.modified and other.modified) and self.modified != other.modified


class FileVersion:
    """What the answers for one file say of its version; ``known``: what was said before. ``name`` is for messages."""

    def __init__(self, name: str, known: Version | None) -> None:
        self._name = name
        self._known = known

    def check(self, version: Version) -> None:
        """Raises SourceError for another version than that of the answers before."""
        known = self._known or version
        if version.is_other_than(known):
            raise SourceError(
                f"{self._name} changed while it was read (its ETag or date is another one); "
                "start with data that does not change"
            )
        self._known = Version(known.etag or version.etag, known.modified or version.modified, known.size)
