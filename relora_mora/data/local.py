"""The bytes of a file on a disk."""

from __future__ import annotations

import os
from pathlib import Path

from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.sources import Shard


class LocalBytes:
    """``read(n)`` gives n bytes of a local file, fewer only at its end.

    Raises SourceError where the file is not what it was, OSError where its disk is gone (``LOST_DISK``).
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        try:
            self._file = Path(shard.location).open("rb")  # noqa: SIM115
        except OSError as error:
            raise unreadable(shard.location, error, "check the path and its permissions") from error
        self._check_size()

    def read(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            raise unreadable(self.shard.location, error, "check the disk") from error
        if len(data) < size:
            self._check_size()
        return data

    def recheck_end(self) -> bool:
        return False  # a disk tells the end of a file the first time

    def close(self) -> None:
        self._file.close()

    def _check_size(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if self.shard.size is not None and size != self.shard.size:
            self.close()
            raise SourceError(
                f"{self.shard.location} changed since the start: {self.shard.size:,} bytes then, {size:,} now; "
                "start with data that does not change"
            )
