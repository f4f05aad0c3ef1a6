"""Fingerprints of the training text, from samples of it, and of the stream of blocks that is made of it.

The former notices other text under the same names and sizes. Files on the hub need none, because their commit is part
of their name. A run resumes only on a stream whose blocks are decided by the same things.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import xxhash

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.network import version_of
from relora_mora.data.records.encoders import how_written, packing_of
from relora_mora.data.shard import PLAIN_TEXT, TEXT, Shard
from relora_mora.data.tokens.index import COMMAND

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# version of the rule that turns shards into lanes and lanes into blocks; a change that moves a token needs a new name
RULE = "lanes-4"
THREADS = 16
WHOLE_BYTES = 1 << 16  # a file up to this size is read as a whole
PIECE_BYTES = 1 << 12  # the size of each sample of a larger file: its head, its tail and pieces between
PIECES_BETWEEN = 4


def content_of(shards: Sequence[Shard]) -> str:
    """32 hex digits over the names of shards and their ``contents``; "" if none of them has one."""
    digest = xxhash.xxh3_128()
    known = [(shard.name, content) for shard, content in zip(shards, contents(shards), strict=True) if content]
    for name, content in known:
        digest.update(xxhash.xxh3_128_digest(name.encode("utf-8", "surrogatepass")) + bytes.fromhex(content))
    return digest.hexdigest() if known else ""


def contents(shards: Sequence[Shard]) -> list[str]:
    """32 hex digits of what each shard holds: of samples of a local file, or of the version of another.

    "" on the hub, where the commit is part of the name, and for versions that were not asked for (``with_versions``). A
    gzip or zstd file ends with a checksum of its text; in plain text a change in the middle may be missed. Raises
    SourceError for a file that cannot be read, and for a token file that has changed since it was made.
    """
    with ThreadPoolExecutor(THREADS) as threads:  # after an error, map() starts no further calls
        return list(threads.map(_content, shards))


def with_versions(shards: Sequence[Shard], timeout_seconds: float) -> list[Shard]:
    """The shards, with those on servers and in stores restricted to the versions that these have now.

    Asks for several files at the same time, but not for versions that are known; only one rank should call it. Raises
    SourceError for a missing file.
    """

    def with_version(shard: Shard) -> Shard:
        if not shard.is_remote or shard.hub or shard.version is not None:
            return shard
        return replace(shard, version=version_of(shard, timeout_seconds))

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(with_version, shards))


def samples_digest(path: str) -> str:
    """32 hex digits over the size of a file and samples of its content. Raises SourceError if it cannot be read."""
    return xxhash.xxh3_128_hexdigest(_samples(path))


def _content(shard: Shard) -> str:
    if shard.is_remote:
        if shard.hub or shard.version is None:
            return ""
        return xxhash.xxh3_128_hexdigest(shard.version.encode())
    samples = _samples(shard.location)
    endings = shard.format.endings
    if endings and shard.tokens is None and not samples.endswith(endings):  # an incomplete copy
        raise SourceError(f"{shard.location} is not {shard.format.name} or was cut short; fetch or write it again")
    digest = xxhash.xxh3_128_hexdigest(samples)
    if shard.tokens is not None and digest != shard.tokens.totals.digest:
        raise SourceError(f"{shard.location} has changed since its tokens were made; make it again: {COMMAND}")
    return digest


def _samples(path: str) -> bytes:
    """A small file, or pieces of a larger one, the last of which is its end."""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - the path may be any bytes
            size = os.fstat(file.fileno()).st_size
            if size <= WHOLE_BYTES:
                return os.pread(file.fileno(), size, 0)
            last = size - PIECE_BYTES
            between = [xxhash.xxh64_intdigest(b"%d %d" % (size, number)) % last for number in range(PIECES_BETWEEN)]
            pieces = [os.pread(file.fileno(), PIECE_BYTES, place) for place in (0, *between, last)]
            return b"%d " % size + b"".join(pieces)
    except OSError as error:
        raise unreadable(path, error, "check the path and its permissions") from error


def order_fingerprint(
    config: DataConfig,
    *,
    tokenizer_fingerprint: str,
    batch_lanes: int,
    shards: Sequence[Shard],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> str:
    """A fingerprint of 32 hex digits of what decides which document and which token come at a saved position.

    That is the tokenizer, the names of shards and sources, text columns, lanes and seed, and for records everything
    that decides their tokens (only they need ``tokenizer``). Ranks, workers and the folders of the files do not matter,
    and neither do the sizes of shards whose rows follow each other, so a shard that was repaired or has grown can be
    read on from the same line. Raises SourceError.
    """
    order: dict[str, Any] = {
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
    by_source = {shard.source: shard for shard in shards}
    records = {source: shard.records for source, shard in by_source.items() if shard.records != PLAIN_TEXT}
    if records:
        assert tokenizer is not None, "its encoding of records is part of the fingerprint"
        order["records"] = {  # how_written has the text of the template
            source: [each.settings.model_dump(exclude={"template"}), *how_written(tokenizer, each)]
            for source, each in records.items()
        }
    packings = {source: packing_of(config, [shard]) for source, shard in by_source.items()}
    if set(packings.values()) != {"stream"}:  # then a position depends on what fits into a sequence: on all lengths
        order |= {"packing": packings, "planned": [shard.size for shard in shards]}
        order |= {"sequence_length": config.sequence_length, "max_line_bytes": config.max_line_bytes}
    return xxhash.xxh3_128_hexdigest(json.dumps(order, sort_keys=True).encode())
