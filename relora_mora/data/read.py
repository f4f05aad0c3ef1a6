"""Opens the rows of shards of every format, and reads and tokenizes them once in order.

The latter is for evaluation, for checks, to show rows, and to count: a run with ``train.epochs`` needs the number of
tokens of an epoch before it can plan its schedule.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

from relora_mora.config.data import DataConfig, Packing, Split, TextSource
from relora_mora.data.columns import RangeRows, TokenRows
from relora_mora.data.errors import Skipped, SourceError
from relora_mora.data.files import open_file
from relora_mora.data.lanes import lane_parts
from relora_mora.data.lines import LineRows
from relora_mora.data.records.encoders import Frame, encoder_of, ends_of, packing_of
from relora_mora.data.rows import CALL_CHARACTERS, Encoded, JudgedRows, Note, RecordsFound, encoded_in_calls
from relora_mora.data.shard import Shard
from relora_mora.data.sources import configured_shards, shards_of
from relora_mora.data.stream.packing import WholeRows
from relora_mora.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)

_ROWS_PER_CALL = 64


def open_rows(
    config: DataConfig, shard: Shard, *, stride: int = 1, phase: int = 0, bad: int = 0, note: Note = log.warning
) -> JudgedRows:
    """The texts, records or tokens of a shard of any format, for lane ``phase`` of the ``stride`` that share it.

    In plain text every document is a row. ``bad`` is ``JudgedRows.bad`` at the position to which the caller skips
    next. Only the limits and ``sample_by`` of ``config`` are used.
    """
    reader = TokenRows if shard.tokens else RangeRows if shard.format.in_ranges else LineRows
    file = open_file(shard, config.timeout_seconds)
    try:
        return reader(config, shard, file, stride=stride, phase=phase, bad=bad, note=note)
    except BaseException:
        file.close()
        raise


def read_rows(shards: Iterable[Shard], config: DataConfig, *, note: Note = log.warning) -> Iterator[Any]:
    """The texts, records and tokens of shards, without rows that hold nothing.

    ``note`` gets the messages about the others. Raises SourceError if a shard cannot be read or too many rows are bad.
    """
    for shard in shards:
        with closing(open_rows(config, shard, note=note)) as rows:
            # one row at a time, so that nothing after the last wanted row is waited for or reported
            while taken := rows.take(1):
                yield from (row for row in taken if not isinstance(row, Skipped))


def iter_texts(sources: str | Sequence[str | TextSource], *, split: Split, config: DataConfig) -> Iterator[str]:
    """Every text of the sources, with the limits, revision and text column of ``config``. Raises SourceError."""
    shards = shards_of(sources, config, split)
    for shard in shards:
        if shard.tokens is not None or not shard.records.is_text:
            raise SourceError(
                f"{shard.label} holds tokens, or records by data.records, but text is needed here; give the text, or "
                "set data.records=null"
            )
    return read_rows(shards, config)


def rows_in_order(
    shards: Sequence[Shard],
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    packing: Packing,
    found: RecordsFound | None = None,
    *,
    limit: Callable[[Iterator[Any]], Iterator[Any]] = iter,
) -> Iterator[Encoded]:
    """The usable rows, with the sizes of texts. ``found`` counts all rows and gets the messages about bad ones.

    ``limit`` takes the first rows of each format. Raises SourceError as ``read_rows`` and ``RecordsFound``.
    """
    found = found or RecordsFound(config)
    eos = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    for _, group in itertools.groupby(shards, lambda shard: (shard.records, shard.tokens is not None)):
        same_format = list(group)
        held = same_format[0].records
        frame = Frame.of(ends_of(tokenizer, held), eos, held, config.sequence_length)
        rows = limit(read_rows(same_format, config, note=found.note))
        encode = list if same_format[0].tokens else encoder_of(tokenizer, held)
        if packing != "stream":
            encode = partial(frame.fit_all, encode)
        for call in encoded_in_calls(rows, encode, _ROWS_PER_CALL, CALL_CHARACTERS):
            for row in call:
                found.add(row)
                if isinstance(row, Encoded):
                    yield row
    found.check_usable(shards[0].label)


def count_epochs(
    config: DataConfig,
    tokenizer_path: str,
    *,
    lanes: int,
    epochs: float = 1.0,
    shards: Sequence[Shard] | None = None,
) -> int:
    """The number of tokens in the first ``epochs`` epochs.

    It includes the EOS after each document in a stream, and the padding of sequences of whole rows, whose tokens are
    made before (``make.tokens_of_whole_rows``). Reads the whole text of a stream, unless it is pre-tokenized, and
    checks all of its records. ``shards`` are the shards of ``config``, if they are already resolved. Raises
    SourceError, also if there is no text.
    """
    shards = configured_shards(config, "train") if shards is None else shards
    wanted = Fraction(str(epochs))  # 1.1 as it is written, and not a little more
    if packing_of(config, shards) != "stream":
        with closing(WholeRows(shards, config)) as rows:
            blocks = [rows.blocks_in(epoch) for epoch in range(math.ceil(epochs))]
        blocks[-1] = math.ceil(blocks[-1] * (wanted - len(blocks) + 1))
        return sum(blocks) * config.sequence_length
    if all(shard.tokens for shard in shards):
        tokens = sum(shard.tokens.totals.tokens for shard in shards if shard.tokens)
    else:
        in_order = rows_in_order(shards, config, load_tokenizer(tokenizer_path), "stream")
        tokens = sum(len(row.ids) + 1 for row in in_order)
    if not tokens:
        sources = ", ".join(source.source for source in config.train)
        raise SourceError(f"the training data {sources} holds no text; give a source with at least one document")
    parts = lane_parts(config, lanes, len(shards))
    bytes_of = [sum((shards[part.shard].size or 0) / part.stride for part in of_lane) for of_lane in parts]
    if max(bytes_of) > 1.1 * sum(bytes_of) / lanes:
        log.warning(
            "lanes have unequal shares of %s files, so after an epoch some text is unread and other text was read "
            "twice; give files of equal sizes, or a few files as records with data.concatenate=true",
            len(shards),
        )
    return math.ceil(tokens * wanted)
