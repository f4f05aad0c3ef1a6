"""Counts the tokens of an epoch, which a run with ``train.epochs`` needs before it can plan its schedule."""

import functools
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple

from relora_mora.config.data import DataConfig, Packing
from relora_mora.data.bad_rows import too_many_records
from relora_mora.data.errors import Skipped, SourceError
from relora_mora.data.lanes import LanePlan, LaneRows, lane_plans
from relora_mora.data.records.encoders import encoder_of, packing_of
from relora_mora.data.rows import Encode, Encoded
from relora_mora.data.sets.rows_in_order import rows_in_order
from relora_mora.data.shard import Record, Shard
from relora_mora.data.sources.resolve import configured_shards
from relora_mora.data.stream.encoded_rows import judged
from relora_mora.data.stream.whole import CountedLane, of_epoch
from relora_mora.data.tokens.checks import epoch_tokens
from relora_mora.data.tokens.rows import open_any

log = logging.getLogger(__name__)


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
    from relora_mora.tokenizer.load import load_tokenizer

    shards = configured_shards(config, "train") if shards is None else shards
    packing = packing_of(config, shards)
    if packing == "stream":
        tokens = epoch_tokens(shards)
        if tokens is None:
            rows_read = rows_in_order(shards, config, load_tokenizer(tokenizer_path), "stream")
            tokens = sum(len(row.encoded.ids) + 1 for row in rows_read)
        counted = Epochs([tokens], None)
        late = _read_late(shards, lane_plans(config, lanes, len(shards), packing))
        if late > 0.05:
            log.warning(
                "lanes have unequal shares of %s files: about %.0f %% of the text is read only after the end of an "
                "epoch, and other text twice before it; give files of equal sizes, or a few files as records with "
                "data.concatenate=true",
                len(shards),
                100 * late,
            )
    else:
        most, rows = _most_blocks(shards, config, tokenizer_path, lanes, packing, epochs)
        blocks = [-(-longest // blocks_per_lane) * blocks_per_lane for longest in most]
        counted = Epochs([each * lanes * config.sequence_length for each in blocks], blocks)
        if rows < 0.9 * blocks[0] * lanes:
            why = "the end of an epoch does not fill a global batch; lower train.batch_size"
            if rows < 0.9 * most[0] * lanes:
                why = f"{lanes} lanes wait for the one with the most records; lower data.lanes"
            empty = 100 - 100 * rows / (blocks[0] * lanes)
            log.warning("%.0f %% of the sequences of an epoch are empty: %s", empty, why)
    if not counted.tokens[0]:
        sources = ", ".join(source.source for source in config.train_sources)
        raise SourceError(f"the training data {sources} holds no text; give a source with at least one document")
    return counted


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


def _most_blocks(
    shards: Sequence[Shard], config: DataConfig, tokenizer_path: str, lanes: int, packing: Packing, epochs: int
) -> tuple[list[int], int]:
    """(for each epoch the blocks of the lane that has the most, the blocks of all lanes in the first epoch).

    Raises SourceError if too many records are bad.
    """
    from relora_mora.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path)
    encode = encoder_of(tokenizer, (shard.records for shard in shards), packing, config.sequence_length)
    fills = packing == "whole"
    counted = epochs if fills else 1  # if each row is a block, all epochs have the same length
    most = [0] * counted
    first = bad = seen = used = tokens = 0
    skipped = Counter[str]()
    last_bad = ""
    for plan in lane_plans(config, lanes, len(shards), packing):
        lane = CountedLane(
            LaneRows(plan, shards, config, functools.partial(open_any, config)),
            _cached(encode) if counted > 1 else encode,
            eos=int(tokenizer.eos_token_id),  # type: ignore[arg-type]
            sequence_length=config.sequence_length,
            fills=fills,
        )
        with closing(lane):
            blocks = lane.epoch_blocks(counted)
        most = list(map(max, most, blocks))
        first += blocks[0]
        lane_bad, lane_seen = judged(lane.encoded.first_epoch)
        bad += lane_bad
        seen += lane_seen
        used += lane.encoded.first_epoch.documents
        tokens += lane.tokens
        skipped.update(lane.encoded.first_epoch.skipped_by_reason())
        last_bad = lane.encoded.last_bad or last_bad
    if fault := too_many_records(bad, seen, config.max_bad_fraction, last_bad, whole=True):
        raise fault
    log.info(
        "%s records in %s sequences, %.0f %% full%s",
        f"{used:,}",
        f"{first:,}",
        100 * tokens / (first * config.sequence_length),
        "".join(f"; {reason}: {count:,}" for reason, count in skipped.items() if count),
    )
    return most, first


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
