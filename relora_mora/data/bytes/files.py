"""Opens the bytes of a shard, on a disk or on a server."""

from relora_mora.data.bytes.local import LocalFile, RandomAccessFile
from relora_mora.data.shard import Shard


def open_file(shard: Shard, timeout_seconds: float, *, in_order: bool = False) -> RandomAccessFile:
    """``in_order``: the file will be read from its beginning to its end."""
    if not shard.is_remote:
        return LocalFile(shard)
    from relora_mora.data.bytes.remote import RemoteFile  # late, because local text needs none of its libraries

    return RemoteFile(shard, timeout_seconds, in_order=in_order)
