"""Formats that are read from the beginning of a file: JSON lines, text and CSV. Lanes that share a shard take its rows
in turn. Each of these formats is a function that makes entries of lines, and one that reads an entry.
"""

import csv
import functools
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from pydantic_core import from_json

from relora_mora.config.data import SampleBy
from relora_mora.data.errors import BAD_REASONS, Skipped, SourceError, too_long
from relora_mora.data.files import open_text
from relora_mora.data.rows import Content, JudgedRows
from relora_mora.data.shard import CSV, JSON_LINES, Shard

Line = bytes | int  # without its newline; of a line that is too long only the length, so it is never held in memory
BLANK = " \t\r\n\v\f"  # what bytes.strip strips
_REST_BYTES = 1 << 16  # of a line that is too long, at a time
_SHOWN = 40  # how much of a bad line a message shows
_ARRAY = re.compile(rb"\s*\[\s*\{")
_NUL = Skipped("invalid_utf8", "holds a NUL byte, as UTF-16 does")


class LineRows(JudgedRows):
    """The texts or records of the entries ``phase``, ``phase + stride``, ... of a file."""

    def open(self) -> None:
        entries, self._read = self._format(open_text(self.file, self.shard))
        first = list(itertools.islice(entries, 1))
        self.is_empty = not first
        self._entries = itertools.islice(itertools.chain(first, entries), self.phase, None, self.stride)

    @property
    def progress(self) -> float:
        size: int = self.file.raw.size  # type: ignore[attr-defined]  # of a LocalFile or a BlockFile
        return self.file.tell() / max(1, size)

    def skip(self, count: int) -> bool:
        skipped = sum(1 for _ in itertools.islice(self._entries, count))
        self._next += skipped
        return skipped == count

    def _numbered(self) -> Iterator[tuple[int, Content]]:
        for entry in self._entries:
            if isinstance(entry, int):
                entry = too_long(entry, self._limit)
            number = self.phase + 1 + self._next * self.stride
            yield number, entry if isinstance(entry, Skipped) else self._read(entry)

    def _format(self, text: io.BufferedReader) -> tuple[Iterator[Any], Callable[[Any], Content]]:
        """The entries of the text, and the function that reads one that is neither too long nor bad already."""
        shard = self.shard
        lines = lines_in(text, self._limit)
        if shard.format is CSV:
            return csv_rows(lines, self._limit, shard), shard.content_in
        if shard.format is not JSON_LINES:
            return documents(lines, self._limit, self.config.sample_by), read_document
        if _ARRAY.match(text.peek()):
            raise SourceError(f"{shard.label} is one JSON array, not lines; write: jq -c '.[]' OLD.json > NEW.jsonl")
        return lines, functools.partial(read_json, shard=shard)


def lines_in(text: BinaryIO, limit: int) -> Iterator[Line]:
    """The lines of a text. The last one may have no newline."""
    while line := text.readline(limit + 1):
        size = len(line.removesuffix(b"\n"))
        if size <= limit:
            yield line[:size]
            continue
        while line and not line.endswith(b"\n"):
            line = text.readline(_REST_BYTES)
            size += len(line.removesuffix(b"\n"))
        yield size


def read_json(line: bytes, shard: Shard) -> Content:
    """The content of a line of JSON.

    An escaped ``\\u0000`` is text, a raw NUL is not JSON. An escaped lone surrogate cannot be encoded, so it counts as
    invalid UTF-8.
    """
    try:
        return shard.content_in(from_json(line, cache_strings="keys"))
    except ValueError:
        pass  # json also reads deep values and surrogates that do not matter; its errors have the reasons for others
    shown = repr(line[:_SHOWN].decode(errors="replace"))
    try:
        decoded = line.decode("utf-8-sig")
        if not decoded.strip(BLANK):
            return Skipped("blank_line")
        content = shard.content_in(json.loads(decoded))
        if not isinstance(content, Skipped):
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeError:
        return Skipped("invalid_utf8", f"is not text in UTF-8: {shown}")
    except (ValueError, RecursionError) as error:  # Python reads no integer of more than 4,300 digits
        return Skipped("not_json", f"is not JSON ({error}): {shown}")
    return content


def documents(lines: Iterator[Line], limit: int, sample_by: SampleBy) -> Iterator[Line]:
    """The documents of a text file, with ``\\n`` as the line end and none at the end of a document.

    Blank lines, which hold at most ASCII white space, separate paragraphs. Of a document of more than ``limit`` bytes
    only the length is given.
    """
    texts = (line.removesuffix(b"\r") if isinstance(line, bytes) else line for line in lines)
    if sample_by == "line":
        return texts
    whole = sample_by == "document"
    groups = itertools.groupby(texts, lambda text: isinstance(text, bytes) and not (whole or text.strip()))
    return (_joined(group, limit) for blank, group in groups if not blank)


def _joined(lines: Iterable[Line], limit: int) -> Line:
    parts: list[bytes] = []
    size = -1
    for line in lines:
        size += 1 + (line if isinstance(line, int) else len(line))
        if size > limit:
            parts.clear()
        elif isinstance(line, bytes):
            parts.append(line)
    return size if size > limit else b"\n".join(parts)


def read_document(entry: bytes) -> str | Skipped:
    """The text of a document. A NUL byte is a sign of UTF-16 or of no text at all."""
    if b"\0" in entry:
        return _NUL
    try:
        text = entry.decode().removeprefix("\ufeff")  # the codec utf-8-sig is slow
    except UnicodeDecodeError:
        return Skipped("invalid_utf8")
    if text and not text.strip(BLANK):
        return Skipped("blank_line")
    return text or Skipped("empty_text")


def csv_rows(lines: Iterator[Line], limit: int, shard: Shard) -> Iterator[dict[str, str] | Skipped]:
    """The columns that are read of each row of CSV, or the reason why it has none. Python's strict ``csv`` splits it.

    Raises SourceError if the header cannot be read or does not name each of the columns once.
    """
    rows = _split_csv(lines, limit)
    header = next((row for row in rows if row != []), None)
    if header is None:
        return
    if not isinstance(header, Skipped) and "\0" in "".join(header):
        header = _NUL
    if isinstance(header, Skipped):
        raise SourceError(f"{shard.label}: its header {header.detail or BAD_REASONS[header.reason]}; repair or drop it")
    names = [name.encode(errors="surrogateescape").decode(errors="replace") for name in header]
    shard.check_names(names)
    columns = {name: at for at, name in enumerate(names) if name in shard.columns}
    for row in rows:
        if isinstance(row, Skipped):
            yield row
        elif len(row) != len(names):
            yield Skipped("field_count" if row else "blank_line")
        else:
            yield _checked({name: row[at] for name, at in columns.items()})


def _checked(fields: dict[str, str]) -> dict[str, str] | Skipped:
    text = "".join(fields.values())
    if "\0" in text:
        return _NUL
    try:
        text.encode()
    except UnicodeEncodeError:
        return Skipped("invalid_utf8")
    return fields


def _split_csv(lines: Iterator[Line], limit: int) -> Iterator[list[str] | Skipped]:
    """The fields of each row. An open quote swallows lines up to the next one or the limit, each of which is bad."""
    csv.field_size_limit(sys.maxsize)  # csv has one limit per process; a row has ours
    taken = _CsvLines(lines, limit)
    reader = csv.reader(taken, strict=True)
    while True:
        taken.count = taken.size = 0
        try:
            row = next(reader, None)
        except csv.Error:  # csv begins a new row with the next line
            yield too_long(taken.size - 1, limit) if taken.size - 1 > limit else Skipped("not_csv")
            yield from [Skipped("not_csv")] * (taken.count - 1)
            continue
        if row is None:
            return
        yield row


class _CsvLines:
    """The lines of a file for ``csv``, which takes several for a row with line breaks, counted for each row."""

    count = 0
    size = 0  # bytes, with the newlines

    def __init__(self, lines: Iterator[Line], limit: int) -> None:
        self._lines = lines
        self._limit = limit

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.count += 1
        self.size += 1 + (line if isinstance(line, int) else len(line))
        if isinstance(line, int) or self.size > self._limit + 1:
            raise csv.Error
        return line.decode(errors="surrogateescape") + "\n"
