"""A fingerprint of the training text itself, from samples of it: it notices other text under the same names and sizes.

Hub files need none: their commit is part of their name.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import xxhash

from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.sources import Shard

if TYPE_CHECKING:
    import requests

THREADS = 16
WHOLE_BYTES = 1 << 16  # a file up to this size is looked at as a whole
PIECE_BYTES = 1 << 12  # of a larger one this much at its head, its tail and at some places between
PIECES_BETWEEN = 4
END_BYTES = 8  # enough for how any format ends


def local_content(shards: Sequence[Shard]) -> str:
    """32 hex digits over the names of local files, their sizes and pieces of their content; "" where no shard is local.

    A gzip or zstd file ends with a checksum of all of its text; in plain text a change in the middle may be missed.
    Raises SourceError for a file that cannot be read.
    """
    return _digest_of_each([shard for shard in shards if not shard.is_remote], _samples)


def remote_content(shards: Sequence[Shard], timeout_seconds: float) -> str:
    """32 hex digits over the names of http(s) files and what servers say of their versions; "" where there are none.

    Asks for each file once, several at the same time; meant for one rank, not for all. Raises SourceError for a file
    that is not there.
    """
    urls = [shard for shard in shards if shard.is_remote and not shard.hub]
    if not urls:
        return ""
    import requests

    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=THREADS))
        return _digest_of_each(
            urls, functools.partial(_version_at_server, session=session, timeout_seconds=timeout_seconds)
        )


def _digest_of_each(shards: Sequence[Shard], look: Callable[[Shard], bytes]) -> str:
    if not shards:
        return ""
    digest = xxhash.xxh3_128()
    with ThreadPoolExecutor(THREADS) as threads:  # after an error map() starts no more of them
        for shard, seen in zip(shards, threads.map(look, shards), strict=True):
            name = shard.name.encode("utf-8", "surrogatepass")
            digest.update(xxhash.xxh3_128_digest(name) + xxhash.xxh3_128_digest(seen))
    return digest.hexdigest()


def _samples(shard: Shard) -> bytes:
    try:
        file = os.open(shard.location, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(file).st_size
            if shard.format.ends:
                _check_end(shard, os.pread(file, END_BYTES, max(0, size - END_BYTES)))
            if size <= WHOLE_BYTES:
                return os.pread(file, size, 0)
            last = size - PIECE_BYTES
            between = [xxhash.xxh64_intdigest(b"%d %d" % (size, number)) % last for number in range(PIECES_BETWEEN)]
            return b"%d " % size + b"".join(os.pread(file, PIECE_BYTES, place) for place in (0, *between, last))
        finally:
            os.close(file)
    except OSError as error:
        raise unreadable(shard.location, error, "check the path and its permissions") from error


def _check_end(shard: Shard, end: bytes) -> None:
    """A copy that broke off is found before the run comes to it, where every file of its format ends alike."""
    if not end.endswith(shard.format.ends):
        raise SourceError(
            f"{shard.location} is no {shard.format.name} or cut short: it ends in {end!r}, "
            f"not in {' or '.join(map(repr, shard.format.ends))}; fetch or write it again"
        )


def _version_at_server(shard: Shard, *, session: requests.Session, timeout_seconds: float) -> bytes:
    from relora_mora.data.retry import retrying
    from relora_mora.data.transport import check_status, etag_of, send, size_of

    def ask() -> bytes:
        # where a server refuses HEAD: one byte, whose answer has the same headers
        for method, headers in (("HEAD", {}), ("GET", {"Range": "bytes=0-0"})):
            with send(
                method, shard.location, shard.name, headers=headers, timeout_seconds=timeout_seconds, session=session
            ) as response:
                if response.ok:
                    break
        if response.status_code != 416:  # an empty file has no first byte
            check_status(response, shard.name, hub=shard.hub)
        return (etag_of(response) or f"{response.headers.get('Last-Modified')} {size_of(response)}").encode()

    return retrying(ask, shard.name, timeout_seconds)
