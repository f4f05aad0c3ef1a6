"""Fingerprints of the training text, from samples of it, and of the stream of blocks that is made of it.

The former notices other text under the same names and sizes. Files on the hub need none, because their commit is part
of their name. A run resumes only on a stream whose blocks are decided by the same things.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.records.encoders import how_written, packing_of
from relora_mora.data.shard import TEXT, Shard, Version
from relora_mora.data.tokens.index import COMMAND

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")
# version of the rule that turns shards into lanes and lanes into blocks; a change that moves a token needs a new name
RULE = "lanes-4"
THREADS = 16
WHOLE_BYTES = 1 << 16  # a file up to this size is read as a whole
PIECE_BYTES = 1 << 12  # the size of each sample of a larger file: its head, its tail and pieces between
PIECES_BETWEEN = 4
END_BYTES = 8  # enough for the end marker of any format


def local_content(shards: Sequence[Shard]) -> str:
    """32 hex digits over the names of local files, their sizes and samples of their content; "" if no shard is local.

    A gzip or zstd file ends with a checksum of its text. In plain text a change in the middle may be missed.
    Raises SourceError for a file that cannot be read, and for a token file that has changed since it was made.
    """
    local = [shard for shard in shards if shard.origin == "local"]
    return _digest(local, _map_in_threads(_local_digest, local))


def remote_versions(shards: Sequence[Shard], timeout_seconds: float) -> dict[int, Version]:
    """The versions of files on servers and in stores, by the number of the shard. For ``at_versions``.

    Sends one request per file, several at the same time; only one rank should call it. Raises SourceError for a file
    that is missing.
    """
    asked = {number: shard for number, shard in enumerate(shards) if shard.origin == "server"}
    if not asked:
        return {}
    import requests

    from relora_mora.data.remote import version_of

    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=THREADS))
        ask = functools.partial(version_of, session=session, timeout_seconds=timeout_seconds)
        return dict(zip(asked, _map_in_threads(ask, list(asked.values())), strict=True))


def at_versions(shards: Sequence[Shard], versions: Mapping[int, Version]) -> list[Shard]:
    """The shards, with those on servers restricted to these versions."""
    return [
        replace(shard, version=versions[number]) if number in versions else shard for number, shard in enumerate(shards)
    ]


def remote_content(shards: Sequence[Shard]) -> str:
    """32 hex digits over the names and the versions of files on servers and in stores; "" if there are none."""
    urls = [shard for shard in shards if shard.origin == "server"]
    return _digest(urls, map(_server_digest, urls))


def content_digests(shards: Sequence[Shard]) -> list[str]:
    """The digest of each shard in ``local_content`` or ``remote_content``: 32 hex digits, "" for the hub."""
    digests = {"local": _local_digest, "server": _server_digest, "hub": lambda shard: b""}
    return [digest.hex() for digest in _map_in_threads(lambda shard: digests[shard.origin](shard), shards)]


def samples_digest(path: str) -> str:
    """32 hex digits over the size of a file and samples of its content. Raises SourceError if it cannot be read."""
    return xxhash.xxh3_128_hexdigest(_samples(path))


def _map_in_threads(function: Callable[[Shard], T], shards: Sequence[Shard]) -> list[T]:
    with ThreadPoolExecutor(THREADS) as threads:  # after an error, map() starts no further calls
        return list(threads.map(function, shards))


def _digest(shards: Sequence[Shard], contents: Iterable[bytes]) -> str:
    if not shards:
        return ""
    digest = xxhash.xxh3_128()
    for shard, content in zip(shards, contents, strict=True):
        digest.update(xxhash.xxh3_128_digest(shard.name.encode("utf-8", "surrogatepass")) + content)
    return digest.hexdigest()


def _local_digest(shard: Shard) -> bytes:
    if shard.format.endings and shard.tokens is None:
        _check_end(shard)
    digest = xxhash.xxh3_128_digest(_samples(shard.location))
    if shard.tokens is not None and digest.hex() != shard.tokens.totals.digest:
        raise SourceError(
            f"{shard.location} has changed since its tokens were made; remove it and make it again: {COMMAND}"
        )
    return digest


def _server_digest(shard: Shard) -> bytes:
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
    """Finds an incomplete copy before the run reaches it, if all files of its format have the same end."""
    with _opened(shard.location) as file:
        end = os.pread(file, END_BYTES, max(0, os.fstat(file).st_size - END_BYTES))
    if not end.endswith(shard.format.endings):
        raise SourceError(
            f"{shard.location} is not {shard.format.name} or was cut short: it ends in {end!r}, "
            f"not in {' or '.join(map(repr, shard.format.endings))}; fetch or write it again"
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


def fingerprints(
    config: DataConfig,
    *,
    tokenizer_fingerprint: str,
    batch_lanes: int,
    shards: Sequence[Shard],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> tuple[str, str]:
    """Two fingerprints of 32 hex digits: of the blocks of a stream, and of the meaning of a saved position.

    The first covers the tokenizer, the shards (names, sizes of local ones, text columns), lanes, sequence length, seed
    and the limits on lines; for a mixture also its weights, and for records everything that decides their tokens (only
    they need ``tokenizer``). Ranks, workers and the folders of the files do not matter. The second covers which
    document and which token come at a position. It leaves out the sizes of shards, so a shard that was repaired or has
    grown can be read on from the same line. Raises SourceError.
    """
    order = {
        "rule": RULE,
        "tokenizer": tokenizer_fingerprint,
        "shards": [[shard.name, shard.source, shard.text_column] for shard in shards],
        "lanes": batch_lanes,
        "seed": config.seed,
        "shuffle_documents": config.shuffle_documents,
        "concatenate": config.concatenate,
    }
    if any(shard.format is TEXT for shard in shards):
        order["sample_by"] = config.sample_by
    if any(shard.in_ranges for shard in shards):
        order["shares"] = "ranges"  # release 0.2 split a file with columns by its groups
    order |= _record_order(config, shards, tokenizer)
    blocks = order | {
        "split": "train",
        "sizes": [shard.size for shard in shards],
        "sequence_length": config.sequence_length,
        "max_line_bytes": config.max_line_bytes,
    }
    if config.is_mixture:
        blocks["weights"] = {source.label: source.weight for source in config.train}
        blocks["stages"] = [stage.model_dump() for stage in config.stages]
    return _json_digest(blocks), _json_digest(order)


def _record_order(
    config: DataConfig, shards: Sequence[Shard], tokenizer: "PreTrainedTokenizerBase | None"
) -> dict[str, Any]:
    """The additional entries for records, and for rows that are not packed as a stream."""
    order: dict[str, Any] = {}
    by_source = {shard.source: shard for shard in shards}
    records = {source: shard.records for source, shard in by_source.items() if shard.records is not None}
    if records:
        assert tokenizer is not None, "its encoding of records is part of the fingerprint"
        order["records"] = {
            source: [
                each.settings.model_dump(exclude={"template"}),  # not its name: how_written has its text
                *([] if each.is_text else how_written(tokenizer, each)),
            ]
            for source, each in records.items()
        }
    packings = {source: packing_of(config, [shard]) for source, shard in by_source.items()}
    if set(packings.values()) != {"stream"}:  # then a position depends on what fits into a sequence
        order["packing"] = packings
        order["planned"] = [shard.size for shard in shards]  # and on the lengths of all rows
        order["sequence_length"] = config.sequence_length
        order["max_line_bytes"] = config.max_line_bytes
    return order


def _json_digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
