"""Plain text: the string of each line, or each row of a column, is a row, and every one of its tokens is scored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Protocol

from relora_mora.config import DataConfig
from relora_mora.data.errors import SourceError
from relora_mora.data.lines import ShardLines
from relora_mora.data.parquet import ParquetRows
from relora_mora.data.parse import parse_line, surely_bad
from relora_mora.data.rows import Encode, Encoded, Rows
from relora_mora.data.skipped import BAD_REASONS, BadRowLimit, Skipped
from relora_mora.data.sources import Shard, Split, resolve_shards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class TextSource(Rows[str], Protocol):
    """Rows of text, and what making tokens in advance asks for."""

    @property
    def groups(self) -> list[int] | None:
        """Rows of each group that lanes deal out among themselves; None where they take the rows in turn."""

    @property
    def progress(self) -> float:
        """The part of the shard that was read, 0 to 1; 0 as long as its size is not known."""


class TextRows:
    """The texts of a shard of JSON lines: those of the lines ``phase``, ``phase + stride``, ... (see ``rows.Rows``).

    All lines count towards the limit on bad ones, so that lanes which share a shard judge it alike: this lane's are
    parsed, of the others only what shows without parsing is seen. Of ``config`` the limits are used.
    """

    groups = None

    def __init__(
        self,
        config: DataConfig,
        shard: Shard,
        *,
        stride: int = 1,
        phase: int = 0,
        bad: int = 0,
        note: Callable[[str], None] = log.warning,
    ) -> None:
        self._column = shard.text_column
        self._stride = stride
        self._phase = phase
        self._limit = BadRowLimit(shard, config.max_bad_fraction, note, bad)
        self._lines = ShardLines(shard, max_line_bytes=config.max_line_bytes, timeout_seconds=config.timeout_seconds)

    @property
    def bad(self) -> int:
        return self._limit.bad

    @property
    def is_empty(self) -> bool:
        return not self._lines.row

    @property
    def progress(self) -> float:
        return self._lines.progress

    def skip(self, count: int) -> bool:
        return self._lines.skip(count * self._stride)

    def take(self, count: int) -> list[str | Skipped]:
        rows: list[str | Skipped] = []
        for at in range(count * self._stride):
            line = self._lines.take()
            if line is None:
                break
            if at % self._stride == self._phase:
                rows.append(self._parse(line))
            elif surely_bad(line, column=self._column):
                self._parse(line)  # for the reason
        if not rows:
            self._limit.finish(self._lines.row)
        return rows

    def close(self) -> None:
        self._lines.close()

    def _parse(self, line: bytes | Skipped) -> str | Skipped:
        """The text of the line taken last, or the reason why there is none; counts a bad one."""
        row = parse_line(line, column=self._column, foreign_format=self._lines.foreign_format)
        if isinstance(row, Skipped) and row.reason in BAD_REASONS:
            self._limit.count(self._lines.row, row.reason)
        return row


def open_texts(
    config: DataConfig,
    shard: Shard,
    *,
    stride: int = 1,
    phase: int = 0,
    bad: int = 0,
    note: Callable[[str], None] = log.warning,
) -> TextSource:
    """The texts of a shard of any format (see ``rows.OpenRows``). Of ``config`` the limits are used.

    Raises SourceError for a shard of tokens.
    """
    if shard.tokens is not None:
        raise SourceError(f"{shard.location} holds tokens, and text is needed here; give the text that they are of")
    kind = ParquetRows if shard.is_parquet else TextRows
    return kind(config, shard, stride=stride, phase=phase, bad=bad, note=note)


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> Encode[str]:
    """The function from texts to their tokens, all of them scored."""
    from relora_mora.tokenizer import encode

    return lambda texts: [Encoded(ids) for ids in encode(tokenizer, texts)]


def iter_texts(sources: str | list[str], *, split: Split, config: DataConfig) -> Iterator[str]:
    """Every text of the sources, shard after shard, line after line.

    Of ``config`` the limits, the revision and the text column count. Bad lines are skipped and
    logged; raises SourceError when a shard has too many, or when no shard can be found.
    """
    shards = resolve_shards(
        sources,
        config.revision,
        split=split,
        timeout_seconds=config.timeout_seconds,
        text_column=config.text_column,
    )
    yield from texts_of(shards, config)


def texts_of(shards: Iterable[Shard], config: DataConfig) -> Iterator[str]:
    """Every text of some shards, as ``iter_texts`` gives them."""
    for shard in shards:
        with closing(open_texts(config, shard)) as rows:
            # one at a time: nobody waits for, or hears of, what stands behind the text that is wanted
            while row := rows.take(1):
                yield from (text for text in row if not isinstance(text, Skipped))
