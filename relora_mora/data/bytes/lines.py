"""Splits the decompressed pieces of a shard into lines of limited length.

A fault in a shard becomes a skipped line at a fixed place, so every later decision about it is the same each time the
shard is read.
"""

from relora_mora.data.bytes.decompress import DamagedShardError, ShardBytes, decompress, foreign_format
from relora_mora.data.bytes.local import LocalBytes
from relora_mora.data.errors import Skipped
from relora_mora.data.shard import Shard


class ShardLines:
    """The lines of one shard, in order. ``row`` is the number of the line that ``take`` returns next, from 0.

    ``foreign_format`` is the reason to skip every line if the text begins like a format that has no lines.
    """

    foreign_format: str | None = None

    def __init__(self, shard: Shard, *, max_line_bytes: int, timeout_seconds: float) -> None:
        self.row = 0
        self._bytes = _open(shard, timeout_seconds)
        self._pieces = decompress(self._bytes, shard)
        self._limit = max_line_bytes
        self._lines: list[bytes | Skipped] = []  # complete lines; those before _next were taken
        self._next = 0
        self._partial: list[bytes] = []  # the beginning of a line whose newline has not been read yet
        self._partial_bytes = 0
        self._ended = False

    @property
    def progress(self) -> float:
        """The fraction of the shard's bytes that was read, 0 to 1; 0 as long as its size is not known."""
        return self._bytes.position / self._bytes.size if self._bytes.size else 0.0

    def close(self) -> None:
        self._bytes.close()

    def begin(self, head: bytes) -> None:
        """Called with the first piece of the text, before its lines are returned."""

    def skip(self, count: int) -> bool:
        """Skips lines without decoding them; False if the shard ends first."""
        while count:
            if self._next == len(self._lines) and not self._refill():
                return False
            step = min(count, len(self._lines) - self._next)
            self._next += step
            self.row += step
            count -= step
        return True

    def take(self) -> bytes | Skipped | None:
        """The next line without its newline; None at the end."""
        if self._next == len(self._lines) and not self._refill():
            return None
        line = self._lines[self._next]
        self._next += 1
        self.row += 1
        return Skipped("too_long") if isinstance(line, bytes) and len(line) > self._limit else line

    def _refill(self) -> bool:
        """Reads pieces until there is a complete line; False at the end of the shard."""
        self._lines = []
        self._next = 0
        while not self._lines and not self._ended:
            try:
                piece = next(self._pieces, None)
            except DamagedShardError as damage:
                self._lines = [Skipped(damage.reason)]  # the line that contains the damage is lost
                self._ended = True
                break
            if piece is not None:
                self._cut(piece)
                continue
            self._ended = True
            if self._partial_bytes:
                self._lines = [self._finish_partial()]
        return bool(self._lines)

    def _cut(self, piece: bytes) -> None:
        if not self.row and not self._partial_bytes:
            self.foreign_format = foreign_format(piece)
            self.begin(piece)
        first, *others = piece.split(b"\n")
        self._extend_partial(first)
        if others:
            self._lines = [self._finish_partial(), *others[:-1]]
            self._extend_partial(others[-1])

    def _extend_partial(self, data: bytes) -> None:
        self._partial_bytes += len(data)
        if self._partial_bytes > self._limit:
            self._partial = []  # too long already: keep only its length
        elif data:
            self._partial.append(data)

    def _finish_partial(self) -> bytes | Skipped:
        too_long = self._partial_bytes > self._limit
        line = Skipped("too_long") if too_long else b"".join(self._partial)
        self._partial = []
        self._partial_bytes = 0
        return line


def _open(shard: Shard, timeout_seconds: float) -> ShardBytes:
    if not shard.is_remote:
        return LocalBytes(shard)
    from relora_mora.data.bytes.remote import RemoteBytes  # late, because local text needs none of its libraries

    return RemoteBytes(shard, timeout_seconds)
