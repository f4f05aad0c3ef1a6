"""A fingerprint of the training text itself, from samples of it: it notices other text under the same names and sizes.

Hub files need none: their commit is part of their name.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import xxhash

from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.shard import Shard, Version
from relora_mora.data.tokens.index import COMMAND

if TYPE_CHECKING:
    import requests


log = logging.getLogger(__name__)

T = TypeVar("T")
THREADS = 16
WHOLE_BYTES = 1 << 16  # a file up to this size is looked at as a whole
PIECE_BYTES = 1 << 12  # of a larger one this much at its head, its tail and at some places between
PIECES_BETWEEN = 4
END_BYTES = 8  # enough for how any format ends


def local_content(shards: Sequence[Shard]) -> str:
    """32 hex digits over the names of local files, their sizes and pieces of their content; "" where no shard is local.

    A gzip or zstd file ends with a checksum of all of its text; in plain text a change in the middle may be missed. Of
    tokens made in advance that of their text counts, and is kept with them; the tokens are looked at in the same way.
    Raises SourceError for a file that cannot be read, for tokens that are not what they were, and for those of a text
    that is there as well, on a disk or on the hub.
    """
    near = [shard for shard in shards if not shard.is_remote]
    seen = dict(zip(near, _each(near, _seen_here), strict=True))
    _refuse_twice(seen | {shard: b"" for shard in shards if shard.hub})  # as their tokens say of these, too
    return _digest([shard for shard in near if shard.origin == "local"], seen)


def _refuse_twice(seen: Mapping[Shard, bytes]) -> None:
    """Raises SourceError if a folder of tokens is listed together with its text, or with other tokens of that.

    Local names are short, and two trees may hold the same license: text is listed twice if one side has all files of
    the other, and some files in common are only warned about. The name of a remote file is its address.
    """
    if not any(shard.tokens for shard in seen):
        return
    files = {shard: (shard.name, content) for shard, content in seen.items()}
    empty = {file for shard, file in files.items() if shard.tokens and not shard.tokens.totals.documents}
    groups = defaultdict[tuple[bool, str], dict[tuple[str, bytes], Shard]](dict)
    for shard, file in files.items():
        if file not in empty:
            group = (True, str(Path(shard.location).parent)) if shard.tokens else (False, shard.source)
            groups[group].setdefault(file, shard)
    for first, second in itertools.combinations(groups, 2):
        if not (first[0] or second[0]):
            continue
        ones, others = groups[first], groups[second]
        both = ones.keys() & others.keys()
        if not both:
            continue
        file = min(both)
        given = f"{_place(ones[file])} and {_place(others[file])} hold the same text, once or twice as tokens"
        if any(ones[each].origin != "local" for each in both) or len(both) in (len(ones), len(others)):
            raise SourceError(f"{given}; it would be read twice: give one of them")
        _warn(f"{given}, and both are read; files in common: {len(both)}")


@functools.cache  # a start looks at the same text several times
def _warn(text: str) -> None:
    log.warning("%s", text)


def _place(shard: Shard) -> str:
    return shard.name if shard.is_remote else shard.location  # a url may hold a secret


def remote_versions(shards: Sequence[Shard], timeout_seconds: float) -> dict[int, Version]:
    """What servers say of the versions of http(s) files, by the number of the shard. For ``at_versions``.

    Asks for each file once, several at the same time; meant for one rank, not for all. Raises SourceError for a file
    that is not there.
    """
    asked = {number: shard for number, shard in enumerate(shards) if shard.origin == "server" and shard.tokens is None}
    if not asked:
        return {}
    import requests

    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=THREADS))
        ask = functools.partial(_version_at_server, session=session, timeout_seconds=timeout_seconds)
        return dict(zip(asked, _each(list(asked.values()), ask), strict=True))


def at_versions(shards: Sequence[Shard], versions: Mapping[int, Version]) -> list[Shard]:
    """The shards, of which those at servers are read in these versions alone."""
    return [
        replace(shard, version=versions[number]) if number in versions else shard for number, shard in enumerate(shards)
    ]


def remote_content(shards: Sequence[Shard]) -> str:
    """32 hex digits over the names and the versions of http(s) files; "" if there are none.

    Raises SourceError for tokens of a text that is there as well.
    """
    urls = [shard for shard in shards if shard.origin == "server"]
    seen = {shard: _seen_at_server(shard) for shard in urls}
    _refuse_twice(seen)
    return _digest(urls, seen)


def content_digests(shards: Sequence[Shard]) -> list[str]:
    """What ``local_content`` or ``remote_content`` sees of each shard of text: 32 hex digits, "" for one of the hub."""
    local = [shard for shard in shards if shard.origin == "local"]
    seen = dict(zip(local, _each(local, _seen_here), strict=True))
    seen |= {shard: _seen_at_server(shard) for shard in shards if shard.origin == "server"}
    return [seen[shard].hex() if shard in seen else "" for shard in shards]


def samples_digest(path: str) -> str:
    """32 hex digits over the size of a file and pieces of its content. Raises SourceError where it cannot be read."""
    return xxhash.xxh3_128_hexdigest(_samples(path))


def _each(shards: Sequence[Shard], look: Callable[[Shard], T]) -> list[T]:
    with ThreadPoolExecutor(THREADS) as threads:  # after an error map() starts no more of them
        return list(threads.map(look, shards))


def _digest(shards: Sequence[Shard], seen: Mapping[Shard, bytes]) -> str:
    if not shards:
        return ""
    digest = xxhash.xxh3_128()
    for shard in shards:
        digest.update(xxhash.xxh3_128_digest(shard.name.encode("utf-8", "surrogatepass")) + seen[shard])
    return digest.hexdigest()


def _seen_here(shard: Shard) -> bytes:
    if shard.tokens is None:
        if shard.format.ends:
            _check_end(shard)
        return xxhash.xxh3_128_digest(_samples(shard.location))
    if samples_digest(shard.location) != shard.tokens.totals.digest:
        raise SourceError(
            f"{shard.location} is not what it was when its tokens were made; remove it and make it again: {COMMAND}"
        )
    return _text_of_tokens(shard)


def _text_of_tokens(shard: Shard) -> bytes:
    """The digest of their text, as it was seen when they were made."""
    assert shard.tokens is not None
    return bytes.fromhex(shard.tokens.text.content)


def _seen_at_server(shard: Shard) -> bytes:
    if shard.tokens is not None:
        return _text_of_tokens(shard)
    assert shard.version is not None, "see at_versions"
    etag, modified, size = shard.version
    return xxhash.xxh3_128_digest((etag or f"{modified} {size}").encode())


def _samples(path: str) -> bytes:
    with _opened(path) as file:
        size = os.fstat(file).st_size
        if size <= WHOLE_BYTES:
            return os.pread(file, size, 0)
        last = size - PIECE_BYTES
        between = [xxhash.xxh64_intdigest(b"%d %d" % (size, number)) % last for number in range(PIECES_BETWEEN)]
        return b"%d " % size + b"".join(os.pread(file, PIECE_BYTES, place) for place in (0, *between, last))


def _check_end(shard: Shard) -> None:
    """A copy that broke off is found before the run comes to it, where every file of its format ends alike."""
    with _opened(shard.location) as file:
        end = os.pread(file, END_BYTES, max(0, os.fstat(file).st_size - END_BYTES))
    if not end.endswith(shard.format.ends):
        raise SourceError(
            f"{shard.location} is no {shard.format.name} or cut short: it ends in {end!r}, "
            f"not in {' or '.join(map(repr, shard.format.ends))}; fetch or write it again"
        )


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield file
        finally:
            os.close(file)
    except OSError as error:
        raise unreadable(path, error, "check the path and its permissions") from error


def _version_at_server(shard: Shard, *, session: requests.Session, timeout_seconds: float) -> Version:
    from relora_mora.data.bytes.retry import retrying
    from relora_mora.data.bytes.transport import check_status, send, version_of

    def ask() -> Version:
        # where a server refuses HEAD: one byte, whose answer has the same headers
        for method, headers in (("HEAD", {}), ("GET", {"Range": "bytes=0-0"})):
            with send(
                method, shard.location, shard.name, headers=headers, timeout_seconds=timeout_seconds, session=session
            ) as response:
                if response.ok:
                    break
        if response.status_code != 416:  # an empty file has no first byte
            check_status(response, shard.name, hub=shard.hub)
        return version_of(response)

    return retrying(ask, shard.name, timeout_seconds)
