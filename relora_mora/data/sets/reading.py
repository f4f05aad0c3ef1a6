"""Reads and tokenizes the rows of shards once, in order, for evaluation, for counting and to show them.

A run with ``train.epochs`` needs the number of tokens of an epoch before it can plan its schedule.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from relora_mora.config.data import DataConfig, Packing, Split, TextSource
from relora_mora.data.bad_rows import NOTES_PER_REASON, RecordsFound, too_many_records
from relora_mora.data.errors import ENCODING_REASONS, Skipped, SourceError
from relora_mora.data.lanes import Cursor, LanePlan, LaneRows, lane_plans
from relora_mora.data.read import check_is_text, open_rows
from relora_mora.data.records.encoders import encoder_of, packing_of
from relora_mora.data.rows import Encode, Encoded, in_calls
from relora_mora.data.shard import Record, Shard
from relora_mora.data.sources.resolve import configured_shards, shards_of
from relora_mora.data.stream.encoded_rows import judged
from relora_mora.data.stream.packing import Mask, with_end
from relora_mora.data.stream.whole import CountedLane, of_epoch
from relora_mora.data.tokens.checks import epoch_tokens
from relora_mora.data.tokens.rows import open_any, open_tokens
from relora_mora.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)

_ROWS_PER_CALL = 64


class TokenizedRow(NamedTuple):
    encoded: Encoded
    utf8_bytes: int | None  # of its text; None if not all of the text is scored


def read_rows(
    shards: Iterable[Shard], config: DataConfig, *, note: Callable[[str], object] = log.warning
) -> Iterator[tuple[Any, int | None]]:
    """The rows of shards of any kind that hold something, each with the UTF-8 bytes of its text if it is plain text.

    ``note`` gets the messages about the others. Raises SourceError if a shard cannot be read or too many rows are bad.
    """
    for shard in shards:
        if shard.tokens is not None:
            with closing(open_tokens(shard)) as tokens:
                yield from tokens.documents()
            continue
        with closing(open_rows(config, shard, note=note)) as rows:
            # one row at a time, so that nothing after the last wanted row is waited for or reported
            while taken := rows.take(1):
                for row in taken:
                    if not isinstance(row, Skipped):
                        yield row, len(row.encode()) if isinstance(row, str) else None


def iter_texts(sources: str | Sequence[str | TextSource], *, split: Split, config: DataConfig) -> Iterator[str]:
    """Every text of the sources, with the limits, revision and text column of ``config``. Raises SourceError."""
    shards = shards_of(sources, config, split)
    for shard in shards:
        check_is_text(shard)
    return (text for text, _ in read_rows(shards, config))


def rows_in_order(
    shards: Sequence[Shard],
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    packing: Packing,
    counts: RecordsFound | None = None,
    *,
    rows: Iterable[tuple[Any, int | None]] | None = None,
    note: Callable[[str], object] = log.warning,
) -> Iterator[TokenizedRow]:
    """The usable rows of the shards, or the usable ones of ``rows``. Records that cannot be used are counted.

    Raises SourceError as ``read_rows``, if more than ``max_bad_fraction`` of the records cannot be used, and if none
    can.
    """
    counts = RecordsFound() if counts is None else counts
    encode = encoder_of(tokenizer, (shard.records for shard in shards), packing, config.sequence_length)
    rows = read_rows(shards, config, note=note) if rows is None else rows
    for group in in_calls(rows, _ROWS_PER_CALL, lambda row: len(row[0])):
        for (_, size), row in zip(group, encode([row for row, _ in group]), strict=True):
            counts.add(row)
            if isinstance(row, Encoded):
                yield TokenizedRow(row, None if row.cut else size)
            elif row.reason in ENCODING_REASONS:
                if counts.bad <= NOTES_PER_REASON:
                    note(f"{row.detail}; skipped")
                if fault := too_many_records(counts.bad, counts.seen, config.max_bad_fraction, row.detail):
                    raise fault
    counts.check_usable(shards[0].label)


def scored_mask(row: Encoded, packing: Packing) -> Mask:
    """Which tokens of a row are predicted and count. In a stream, an EOS is before it and another after it."""
    if packing == "stream":
        return np.ones(len(row.ids) + 1, np.bool_) if row.scored is None else with_end(row.scored)
    mask = np.ones(len(row.ids), np.bool_)
    if row.scored is not None:
        mask[:] = row.scored
    mask[:1] = False
    return mask


class Epochs(NamedTuple):
    """The length of each of the first epochs; later epochs are as long as the last of these.

    ``tokens`` includes the EOS after each document in a stream, and the padding of sequences with whole rows.
    ``blocks`` is the number of blocks that the epoch takes from every lane of whole rows; None for a stream.
    """

    tokens: Sequence[int]
    blocks: Sequence[int] | None

    def tokens_of(self, epochs: float) -> float:
        """The tokens of the first ``epochs`` epochs."""
        whole = int(epochs)
        lengths = [of_epoch(self.tokens, number) for number in range(whole + 1)]
        return sum(lengths[:whole]) + (epochs - whole) * lengths[whole]


def count_epochs(
    config: DataConfig,
    tokenizer_path: str,
    *,
    lanes: int,
    blocks_per_lane: int = 1,
    epochs: int = 1,
    shards: Sequence[Shard] | None = None,
) -> Epochs:
    """The length of each of the first epochs, for whole rows in the lane that has the most blocks.

    Lanes of whole rows begin each epoch together and at a global batch, which takes ``blocks_per_lane`` blocks of each.
    Epochs differ in length because rows are packed in another order. Reads the whole text and checks all of its
    records; for a stream of pre-tokenized text the number is known. ``shards`` are the shards of ``config``, if they
    are already resolved. Raises SourceError, also if there is no text.
    """
    shards = configured_shards(config, "train") if shards is None else shards
    packing = packing_of(config, shards)
    plans = lane_plans(config, lanes, len(shards), packing)
    if packing == "stream":
        counted = _epochs_of_stream(shards, config, tokenizer_path, plans)
    else:
        counts = _count_lanes(shards, config, tokenizer_path, plans, packing, epochs)
        counted = _epochs_of_lanes(counts, blocks_per_lane, config.sequence_length)
    if not counted.tokens[0]:
        sources = ", ".join(source.source for source in config.train)
        raise SourceError(f"the training data {sources} holds no text; give a source with at least one document")
    return counted


def _epochs_of_stream(
    shards: Sequence[Shard], config: DataConfig, tokenizer_path: str, plans: Sequence[LanePlan]
) -> Epochs:
    """Reads the text, unless it is pre-tokenized. Warns if lanes have unequal shares of it."""
    tokens = epoch_tokens(shards)
    if tokens is None:
        rows = rows_in_order(shards, config, load_tokenizer(tokenizer_path), "stream")
        tokens = sum(len(row.encoded.ids) + 1 for row in rows)
    late = _read_late(shards, plans)
    if late > 0.05:
        log.warning(
            "lanes have unequal shares of %s files: about %.0f %% of the text is read only after the end of an epoch, "
            "and other text twice before it; give files of equal sizes, or a few files as records with "
            "data.concatenate=true",
            len(shards),
            100 * late,
        )
    return Epochs([tokens], None)


def _read_late(shards: Sequence[Shard], plans: Sequence[LanePlan]) -> float:
    """The fraction of a stream that is still unread when the lanes together have read as much as there is.

    An estimate from the sizes of the files. If any size is unknown, all files count as equally large.
    """
    sizes = [shard.size or 0 for shard in shards]
    if not all(sizes):
        sizes = [1] * len(shards)
    shares = [sum(sizes[part.shard] / part.stride for part in plan.parts) for plan in plans]
    mean = sum(shares) / len(shares)
    return sum(max(0.0, share - mean) for share in shares) / sum(shares)


class _LaneCount(NamedTuple):
    """What was read of a lane of whole rows."""

    blocks: list[int]  # of each epoch
    tokens: int  # of the first epoch
    end: Cursor  # the position after the first epoch
    last_bad: str


def _count_lanes(
    shards: Sequence[Shard],
    config: DataConfig,
    tokenizer_path: str,
    plans: Sequence[LanePlan],
    packing: Packing,
    epochs: int,
) -> list[_LaneCount]:
    """Reads each lane of whole rows. Raises SourceError if too many records are bad."""
    tokenizer = load_tokenizer(tokenizer_path)
    encode = encoder_of(tokenizer, (shard.records for shard in shards), packing, config.sequence_length)
    fills = packing == "whole"
    epochs = epochs if fills else 1  # if each row is a block, all epochs have the same length
    counts = []
    for plan in plans:
        lane = CountedLane(
            LaneRows(plan, shards, config, functools.partial(open_any, config)),
            _cached(encode) if epochs > 1 else encode,
            eos=int(tokenizer.eos_token_id),  # type: ignore[arg-type]
            sequence_length=config.sequence_length,
            fills=fills,
        )
        with closing(lane):
            blocks = lane.epoch_blocks(epochs)
        counts.append(_LaneCount(blocks, lane.tokens, lane.encoded.first_epoch, lane.encoded.last_bad))
    bad, seen = map(sum, zip(*(judged(count.end) for count in counts), strict=True))
    last_bad = next((count.last_bad for count in reversed(counts) if count.last_bad), "")
    if fault := too_many_records(bad, seen, config.max_bad_fraction, last_bad):
        raise fault
    sequences = sum(count.blocks[0] for count in counts)
    skipped = Counter[str]()
    for count in counts:
        skipped.update(count.end.skipped_by_reason())
    log.info(
        "%s records in %s sequences, %.0f %% full%s",
        f"{sum(count.end.documents for count in counts):,}",
        f"{sequences:,}",
        100 * sum(count.tokens for count in counts) / (sequences * config.sequence_length),
        "".join(f"; {reason}: {number:,}" for reason, number in skipped.items() if number),
    )
    return counts


def _epochs_of_lanes(counts: Sequence[_LaneCount], blocks_per_lane: int, sequence_length: int) -> Epochs:
    """Each epoch is as long as its longest lane. Warns if this leaves many sequences empty."""
    lanes = len(counts)
    most = [max(blocks) for blocks in zip(*(count.blocks for count in counts), strict=True)]
    blocks = [-(-longest // blocks_per_lane) * blocks_per_lane for longest in most]
    filled = sum(count.blocks[0] for count in counts)
    if filled < 0.9 * blocks[0] * lanes:
        why = "the end of an epoch does not fill a global batch; lower train.batch_size"
        if filled < 0.9 * most[0] * lanes:
            why = f"{lanes} lanes wait for the one with the most records; lower data.lanes"
        empty = 100 - 100 * filled / (blocks[0] * lanes)
        log.warning("%.0f %% of the sequences of an epoch are empty: %s", empty, why)
    return Epochs([each * lanes * sequence_length for each in blocks], blocks)


def _cached(encode: Encode[Any]) -> Encode[Any]:
    """Tokenizes each row only once and keeps its length, because other epochs only pack it with other rows."""
    lengths: dict[int, Encoded | Skipped] = {}

    def key_of(row: Any) -> int:
        if isinstance(row, Record):
            return hash((str(row.fields), row.format))
        return hash(row if isinstance(row, str) else bytes(row))  # a text, or tokens

    def cached(rows: list[Any]) -> list[Encoded | Skipped]:
        keys = [key_of(row) for row in rows]
        new = [at for at, key in enumerate(keys) if key not in lengths]
        for at, row in zip(new, encode([rows[at] for at in new]), strict=True):
            lengths[keys[at]] = row if isinstance(row, Skipped) else Encoded(range(len(row.ids)), cut=row.cut)
        return [lengths[key] for key in keys]

    return cached
