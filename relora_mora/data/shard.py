"""A shard is one file of text, with its location, its version and its format.

``lines.py`` and ``columns.py`` read the formats.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from relora_mora.config.data import CHATML, RecordsConfig
from relora_mora.data.errors import Skipped, SourceError, names_of, unreadable
from relora_mora.data.tokens.index import TokenFile
from relora_mora.system.files import from_home

COMPRESSED = (".gz", ".zst", ".zstd")


@dataclass(frozen=True)
class Format:
    """A format of text. A file with columns needs random access, so it is never compressed as a whole."""

    name: str
    suffixes: tuple[str, ...]
    unit: str | None  # the word for a row in messages; None: the value of data.sample_by
    in_ranges: bool = False  # lanes that share a file split its rows into ranges; otherwise they take them in turn
    endings: tuple[bytes, ...] = ()  # every complete file ends in one of these


JSON_LINES = Format("JSON lines", (".json", ".jsonl", ".ndjson"), "line")
TEXT = Format("text", (".txt",), None)
CSV = Format("CSV", (".csv",), "row")
PARQUET = Format("Parquet", (".parquet",), "row", in_ranges=True, endings=(b"PAR1",))
ARROW = Format("Arrow", (".arrow",), "row", in_ranges=True, endings=(b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"))

FORMATS = (JSON_LINES, TEXT, CSV, PARQUET, ARROW)
SUFFIXES = (*(suffix for format in FORMATS for suffix in format.suffixes), *COMPRESSED)


def format_of(path: str) -> Format | None:
    """The format that the suffix of a file's name stands for, in any case; None for other suffixes.

    A compressed file without another suffix, such as ``a.gz``, holds JSON lines.
    """
    path = path.lower()
    suffix = PurePosixPath(path).suffix
    compressed = suffix in COMPRESSED
    if compressed:
        suffix = PurePosixPath(path).with_suffix("").suffix
    for format in FORMATS:
        if suffix in format.suffixes:
            return None if compressed and format.in_ranges else format
    return JSON_LINES if compressed else None


def version_on_disk(status: os.stat_result) -> str:
    """Leaves out the inode: on FAT, SMB and FUSE a file gets a new one after the kernel has forgotten it."""
    return f"{status.st_mtime_ns} {status.st_size}"


@dataclass(frozen=True)
class RecordFormat:
    """The settings of records, and the text of the template file that they name."""

    settings: RecordsConfig
    template: str | None = None

    @property
    def is_text(self) -> bool:
        return self.settings.is_text

    def fields_of(self, row: Mapping[str, Any]) -> dict[str, Any] | Skipped:
        """The fields of a record by the names of its kind, without missing optional ones, or why it is not a record."""
        fields: dict[str, Any] = {}
        for name, column in self.settings.required.items():
            if column not in row:
                return Skipped("no_text", f'has no "{column}" (data.records.columns), only {names_of(row)}')
            fields[name] = row[column]
        for name, column in self.settings.optional.items():
            if row.get(column) not in (None, ""):  # CSV cannot leave a cell out
                fields[name] = row[column]
        return fields

    @staticmethod
    def of(settings: RecordsConfig | None) -> "RecordFormat":
        """Raises SourceError for a template that cannot be read."""
        if settings is None:
            return PLAIN_TEXT
        path = settings.template
        if path in (None, CHATML):
            return RecordFormat(settings)
        try:
            return RecordFormat(settings, Path(from_home(path)).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise SourceError(f"the template {path} is not UTF-8; give a .jinja file or chatml") from error
        except OSError as error:
            raise unreadable(f"the template {path}", error, "give a .jinja file or chatml") from error


PLAIN_TEXT = RecordFormat(RecordsConfig(kind="text"))


@dataclass(frozen=True, slots=True)
class Record:
    """A row with columns. ``place`` names the row in messages."""

    fields: dict[str, Any]  # by the names of the kind
    place: str

    def __len__(self) -> int:
        """About its number of characters."""
        return len(str(self.fields))

    def describe(self, what: str) -> str:
        """For messages: the place of the record, ``what`` is wrong with it, and its beginning."""
        return f"{self.place}, {what}: {self.fields!s:.300}"


@dataclass(frozen=True)
class Shard:
    """One file of text. ``name`` is the same on every machine and holds no secret; ``location`` is a path or url."""

    name: str
    location: str
    size: int | None = None  # bytes, local files only
    version: str | None = None  # as a disk, a server or a store reports it; None on the hub, or if it was not asked for
    hub: bool = False  # requests carry the hub's token, if there is one
    text_column: str = "text"  # the key or column of the text, if rows are text
    records: RecordFormat = PLAIN_TEXT  # the format of rows
    source: str = ""  # the name of its source, in a mixture or if the source sets text_column or records itself
    tokens: TokenFile | None = None  # what the file holds, if it is a file of a pre-tokenized folder
    path: str = field(default="", compare=False)  # the location, if other local files have the same name

    @property
    def label(self) -> str:
        """A name for messages that is unique among the local files of a list."""
        return self.path or self.name

    @property
    def format(self) -> Format:
        return format_of(self.name) or JSON_LINES  # a url may have no suffix

    @property
    def columns(self) -> dict[str, bool]:
        """The keys or columns that are read, and whether every row must have them."""
        if self.records.is_text:
            return {self.text_column: True}
        settings = self.records.settings
        return dict.fromkeys(settings.optional.values(), False) | dict.fromkeys(settings.required.values(), True)

    def content_in(self, row: Any) -> str | dict[str, Any] | Skipped:
        """The text of a row with columns, or the fields of its record, or why it has none."""
        if not isinstance(row, dict):
            return Skipped("no_text", "is not an object of keys and values")
        if not self.records.is_text:
            return self.records.fields_of(row)
        if self.text_column not in row:
            return Skipped("no_text", f'has no "{self.text_column}", only {names_of(row)}')
        text = row[self.text_column]
        if isinstance(text, str):
            return text or Skipped("empty_text")
        return Skipped("null_text" if text is None else "text_not_string")

    @property
    def in_ranges(self) -> bool:
        """Whether lanes that share this file, or the text of its tokens, split its rows into ranges."""
        named = format_of(self.name if self.tokens is None else self.tokens.text.name)
        return (named or JSON_LINES).in_ranges

    @property
    def is_remote(self) -> bool:
        return "://" in self.location

    def column_error(self, fault: str, names: Iterable[str]) -> SourceError:
        """The error for a column that cannot be read, with the names of all columns."""
        setting = "text_column" if self.records.is_text else "records.columns"
        setting = f"{setting} of the source {self.source}" if self.source else f"data.{setting}"
        records = "; or set data.records, if rows are not plain text" if self.records.is_text else ""
        return SourceError(f"{self.label} {fault}; set {setting} to one of {names_of(names)}{records}")

    def check_names(self, names: Sequence[str]) -> None:
        """Raises SourceError if a column that is read is missing or appears twice. The message lists the columns."""
        for column, is_required in self.columns.items():
            count = list(names).count(column)
            if count > 1 or (count == 0 and is_required):
                raise self.column_error(f'has {count or "no"} column{"s" if count else ""} "{column}"', names)
