"""Reads the text column or the record columns of CSV files with a header.

Python's ``csv`` splits the rows, in its strict mode.
"""

import csv
import re
import sys
from typing import Any

from relora_mora.config.data import DataConfig
from relora_mora.data.bytes.lines import BOM
from relora_mora.data.errors import BAD_REASONS, Skipped, SourceError, too_long
from relora_mora.data.formats.columns import check_names, decode_plain
from relora_mora.data.formats.turns import FromLines
from relora_mora.data.shard import Shard

# csv sees each byte as the character with the same number, so lengths count bytes and no encoding error can occur
_BYTES = "latin-1"
_OTHER_DELIMITERS = ";\t|"
_INSIDE = re.compile(rb'([^"])[^"]+([^"])')


class CsvRecords(FromLines[list[str] | Skipped]):
    """The rows of a shard (see ``turns.Entries``). ``max_line_bytes`` limits the bytes of each in the file.

    Raises SourceError if the header cannot be read or does not name each of the columns once.
    """

    def __init__(self, shard: Shard, config: DataConfig) -> None:
        super().__init__(shard, config)
        csv.field_size_limit(sys.maxsize)  # csv has one limit per process; we limit rows ourselves
        self._bytes = 0  # of the current row so far
        self._taken = 0  # lines of the current row so far
        self._lost = 0  # remaining lines of a row that is not CSV
        self._reader = csv.reader(iter(self._line, None), strict=True)
        try:
            names = self._header(shard)
        except BaseException:
            self.close()
            raise
        self._shard = shard
        self._width = len(names)
        self._columns = {name: at for at, name in enumerate(names) if name in shard.columns}

    def content(self, entry: list[str] | Skipped) -> str | dict[str, Any] | Skipped:
        if isinstance(entry, Skipped):
            return entry
        if not entry:
            return Skipped("blank_line")
        if len(entry) != self._width:
            return Skipped("field_count")
        if self._shard.records is None or self._shard.records.is_text:
            return _text(entry[self._columns[self._shard.text_column]])
        texts = {name: _text(entry[at]) for name, at in self._columns.items()}
        bad = next((text for text in texts.values() if isinstance(text, Skipped) and text.reason in BAD_REASONS), None)
        return bad or self._shard.records.fields_of(
            {name: "" if isinstance(text, Skipped) else text for name, text in texts.items()}
        )

    def _next(self) -> list[str] | Skipped | None:
        """The next row. An open quote swallows all lines up to the next quote, so each of them counts as a bad row."""
        if self._lost:
            self._lost -= 1
            return Skipped("not_csv")
        self._bytes = 0
        self._taken = 0
        try:
            row = next(self._reader, None)
        except _BadRow as bad:
            self._lost = self._taken
            return bad.skipped
        except csv.Error:
            self._lost = self._taken - 1
            return Skipped("not_csv")
        size = self._bytes - 1  # its last newline does not count
        return too_long(size, self._limit) if size > self._limit else row

    def _line(self) -> str | None:
        """The next line for csv.

        Beyond the limit, csv gets only what it needs to find the end of the row: lines that may close a quote, without
        the text inside.
        """
        while (line := self._lines.take()) is not None:
            if isinstance(line, Skipped):
                raise _BadRow(line)
            self._taken += 1
            if self._lines.row == 1:
                line = line.removeprefix(BOM)
            self._bytes += len(line) + 1
            if self._bytes <= self._limit + 1:
                return line.decode(_BYTES) + "\n"
            if b'"' in line.replace(b'""', b""):
                return _INSIDE.sub(rb"\1\2", line).decode(_BYTES) + "\n"
        return None

    def _header(self, shard: Shard) -> list[str]:
        """The names of the columns; none if the file is empty."""
        row = self._next()
        while row == []:
            row = self._next()
        if row is None:
            return []
        if isinstance(row, Skipped):
            raise SourceError(
                f"{shard.label}: its header {row.detail or BAD_REASONS[row.reason]}; "
                "the first row of CSV names the columns: repair or drop the file"
            )
        names = [name.encode(_BYTES).decode("utf-8", "replace") for name in row]
        delimiter = next((each for each in _OTHER_DELIMITERS if each in names[0]), None)
        if len(names) == 1 and delimiter is not None and names[0].replace("\t", " ").isprintable():
            raise SourceError(
                f"{shard.label}: its header {names[0]!r} seems to be separated by {delimiter!r} instead of commas; "
                "write it again with commas (pandas: read_csv(FILE, sep=...).to_csv(FILE, index=False)), or as Parquet"
            )
        check_names(shard, names)
        return names


def _text(field: str) -> str | Skipped:
    text = field.encode(_BYTES)
    return decode_plain(text)


class _BadRow(Exception):
    def __init__(self, skipped: Skipped) -> None:
        super().__init__(skipped.reason)
        self.skipped = skipped
