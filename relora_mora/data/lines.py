"""Formats that are read from the beginning of a file: JSON lines, text and CSV. Lanes that share a shard take its rows
in turn. Each of these formats is a function that makes entries of lines, and one that reads an entry.
"""

import csv
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic_core import from_json

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import BAD_REASONS, Skipped, SourceError, too_long
from relora_mora.data.files import open_file, text_pieces
from relora_mora.data.rows import Content, JudgedRows
from relora_mora.data.shard import CSV, JSON_LINES, Shard, check_names

Line = bytes | int  # without its newline; of a line that is too long only the length, so it is never held in memory
BOM = b"\xef\xbb\xbf"
BLANK = " \t\r\n\v\f"  # what bytes.strip strips
_SHOWN = 40  # how much of a bad line a message shows
_ARRAY = re.compile(rb"\s*\[\s*\{")


class LineRows(JudgedRows):
    """The texts or records of the entries ``phase``, ``phase + stride``, ... of a shard."""

    def __init__(self, config: DataConfig, shard: Shard, stride: int, phase: int, **judging: Any) -> None:
        super().__init__(config, shard, stride, shard.format.unit or config.sample_by, **judging)
        self._phase = phase
        self._limit = config.max_line_bytes
        self._file = open_file(shard, config.timeout_seconds)
        try:
            entries, self._read = self._format(config.sample_by)
            first = list(itertools.islice(entries, 1))
        except BaseException:
            self.close()
            raise
        self.is_empty = not first
        self._own = itertools.islice(itertools.chain(first, entries), phase, None, stride)
        self._rows = self._numbered()

    @property
    def progress(self) -> float:
        return self._file.tell() / max(1, self._file.size)

    def skip(self, count: int) -> bool:
        skipped = sum(1 for _ in itertools.islice(self._own, count))
        self._next += skipped
        return skipped == count

    def close(self) -> None:
        self._file.close()

    def _numbered(self) -> Iterator[tuple[int, Content]]:
        for entry in self._own:
            if isinstance(entry, int):
                entry = too_long(entry, self._limit)
            number = self._phase + 1 + self._next * self._stride
            yield number, entry if isinstance(entry, Skipped) else self._read(entry)

    def _format(self, sample_by: str) -> tuple[Iterator[Any], Callable[[Any], Content]]:
        """The entries of the file, and the function that reads one that is neither too long nor bad already."""
        shard = self._shard
        pieces = text_pieces(self._file, shard)
        head = next(pieces, b"").removeprefix(BOM)
        lines = lines_in(itertools.chain([head], pieces), self._limit)
        if shard.format is CSV:
            rows = CsvRows(lines, self._limit, shard)
            return iter(rows.take, None), shard.content_in
        if shard.format is not JSON_LINES:
            return documents(lines, self._limit, sample_by), read_document
        if _ARRAY.match(head):
            raise SourceError(
                f"{shard.label} is one JSON array, not JSON lines with one object on each line; "
                "write it as lines: jq -c '.[]' OLD.json > NEW.jsonl"
            )
        return lines, functools.partial(read_json, shard=shard)


class _Joined:
    """The parts of a line or document, of which only the length is kept beyond the limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self.size = 0

    def add(self, part: Line) -> None:
        self.size += part if isinstance(part, int) else len(part)
        if self.size > self._limit:
            self._parts.clear()
        elif isinstance(part, bytes):
            self._parts.append(part)

    def take(self) -> Line:
        taken = self.size if self.size > self._limit else b"".join(self._parts)
        self._parts.clear()
        self.size = 0
        return taken


def lines_in(pieces: Iterable[bytes], limit: int) -> Iterator[Line]:
    """The lines of a text, of which the last one may have no newline."""
    begun = _Joined(limit)  # a line whose newline has not been read yet
    for piece in pieces:
        first, *others = piece.split(b"\n")
        begun.add(first)
        if others:
            yield begun.take()
            begun.add(others.pop())
            yield from others if len(piece) <= limit else (each if len(each) <= limit else len(each) for each in others)
    if begun.size:
        yield begun.take()


def read_json(line: bytes, shard: Shard) -> Content:
    """The content of a line of JSON.

    An escaped ``\\u0000`` is text, a raw NUL is not JSON. An escaped lone surrogate cannot be encoded, so it counts as
    invalid UTF-8.
    """
    try:
        return shard.content_in(from_json(line, cache_strings="keys"))
    except ValueError:
        pass  # json also reads deep values, and its errors have the reasons for the others
    try:
        decoded = line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        return Skipped("invalid_utf8", f"is not text in UTF-8: {line[:_SHOWN]!r}")
    if not decoded.strip(BLANK):
        return Skipped("blank_line")
    try:
        content = shard.content_in(json.loads(decoded))
    except (ValueError, RecursionError) as error:  # Python reads no integer of more than 4,300 digits
        return Skipped("not_json", f"is not JSON ({error}): {decoded[:_SHOWN]!r}")
    if isinstance(content, Skipped):
        return content
    written = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return content if is_encodable(written) else Skipped("invalid_utf8")


def is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def documents(lines: Iterator[Line], limit: int, sample_by: str) -> Iterator[Line]:
    """The documents of a text file, with ``\\n`` as the line end and none at the end of a document.

    Blank lines, which hold at most ASCII white space, separate paragraphs. Of a document of more than ``limit`` bytes
    only the length is given.
    """
    texts = (line.removesuffix(b"\r") if isinstance(line, bytes) else line for line in lines)
    if sample_by == "line":
        yield from texts
        return
    whole = sample_by == "document"
    document = _Joined(limit)
    for blank, group in itertools.groupby(texts, lambda text: isinstance(text, bytes) and not (whole or text.strip())):
        if not blank:
            document.add(next(group))
            for text in group:
                document.add(b"\n")
                document.add(text)
            yield document.take()


def read_document(entry: bytes) -> str | Skipped:
    """The text of a document. A NUL byte is a sign of UTF-16 or of no text at all."""
    if b"\0" in entry:
        return Skipped("invalid_utf8", "holds a NUL byte, as UTF-16 does")
    try:
        text = entry.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        return Skipped("invalid_utf8")
    if text and not text.strip(BLANK):
        return Skipped("blank_line")
    return text or Skipped("empty_text")


class CsvRows:
    """The rows of a CSV file with a header. Python's ``csv`` splits them, in its strict mode.

    ``limit`` is that of the bytes of a row in the file. Raises SourceError if the header cannot be read or does not
    name each of the columns once.
    """

    def __init__(self, lines: Iterator[Line], limit: int, shard: Shard) -> None:
        csv.field_size_limit(sys.maxsize)  # csv has one limit per process; we limit rows ourselves
        self._lines = lines
        self._limit = limit
        self._shard = shard
        self._bytes = 0  # of the current row so far, with its newlines
        self._taken = 0  # lines of the current row so far
        self._lost = 0  # remaining lines of a row that is not CSV
        self._is_utf8 = True  # the current row so far
        self._reader = csv.reader(iter(self._line, None), strict=True)
        names = self._header()
        self._width = len(names)
        self._columns = {name: at for at, name in enumerate(names) if name in shard.columns}

    def take(self) -> dict[str, str] | Skipped | None:
        """The fields of the next row that are read, or the reason why it has none; None at the end."""
        row = self._next()
        if row is None or isinstance(row, Skipped):
            return row
        if not row:
            return Skipped("blank_line")
        if len(row) != self._width:
            return Skipped("field_count")
        fields = {name: row[at] for name, at in self._columns.items()}
        for text in fields.values():
            if "\0" in text:
                return Skipped("invalid_utf8", "holds a NUL byte, as UTF-16 does")
            if not (self._is_utf8 or is_encodable(text)):
                return Skipped("invalid_utf8")
        return fields

    def _next(self) -> list[str] | Skipped | None:
        """The next row. An open quote swallows lines up to the next quote or the limit, each of which is a bad row."""
        if self._lost:
            self._lost -= 1
            return Skipped("not_csv")
        self._bytes = 0
        self._taken = 0
        self._is_utf8 = True
        try:
            return next(self._reader, None)
        except csv.Error:
            self._lost = self._taken - 1
            size = self._bytes - 1  # its last newline does not count
            return too_long(size, self._limit) if size > self._limit else Skipped("not_csv")

    def _line(self) -> str | None:
        line = next(self._lines, None)
        if line is None:
            return None
        self._taken += 1
        self._bytes += 1 + (line if isinstance(line, int) else len(line))
        if isinstance(line, int) or self._bytes > self._limit + 1:
            raise csv.Error  # csv begins a new row with the next line
        try:
            return line.decode() + "\n"
        except UnicodeDecodeError:
            self._is_utf8 = False
            return line.decode(errors="surrogateescape") + "\n"

    def _header(self) -> list[str]:
        """The names of the columns; none if the file is empty."""
        row = self._next()
        while row == []:
            row = self._next()
        if row is None:
            return []
        label = self._shard.label
        if isinstance(row, Skipped):
            raise SourceError(
                f"{label}: its header {row.detail or BAD_REASONS[row.reason]}; "
                "the first row of CSV names the columns: repair or drop the file"
            )
        names = [name.encode(errors="surrogateescape").decode("utf-8", "replace") for name in row]
        check_names(self._shard, names)
        return names
