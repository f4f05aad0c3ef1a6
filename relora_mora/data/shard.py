"""A shard is one file of text: where it is, which version it has, and what its rows hold."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from relora_mora.config.data import CHATML, RecordsConfig
from relora_mora.data.errors import Skipped, SourceError, names_of, unreadable
from relora_mora.data.formats.kinds import JSON_LINES, Format, format_of
from relora_mora.data.tokens.index import TokenFile
from relora_mora.system.files import from_home


class Version(NamedTuple):
    """What a server or a disk says about the version of a file."""

    etag: str | None
    modified: str | None
    size: int | None  # bytes; the answer of a server may be wrong here

    @staticmethod
    def on_disk(status: os.stat_result) -> Version:
        """The inode is left out: FAT, SMB and FUSE give the same file another one once the kernel has forgotten it."""
        return Version(None, str(status.st_mtime_ns), status.st_size)

    def is_other_than(self, other: Version) -> bool:
        """Whether they cannot be of the same version. An answer may lack what another one has."""
        if self.etag and other.etag:
            return self.etag != other.etag
        return bool(self.modified and other.modified) and self.modified != other.modified


class FileVersion:
    """What the answers for one file say of its version; ``known``: what was said before. ``name`` is for messages."""

    def __init__(self, name: str, known: Version | None) -> None:
        self._name = name
        self._known = known

    def check(self, version: Version) -> None:
        """Raises SourceError for another version than that of the answers before."""
        known = self._known or version
        if version.is_other_than(known):
            raise SourceError(
                f"{self._name} changed while it was read (its ETag or date is another one); "
                "start with data that does not change"
            )
        self._known = Version(known.etag or version.etag, known.modified or version.modified, known.size)


@dataclass(frozen=True)
class RecordFormat:
    """The settings, and the text of the template file that they name."""

    settings: RecordsConfig
    template: str | None = None

    @property
    def is_text(self) -> bool:
        """Rows of plain text."""
        return self.settings.is_text

    def fields_of(self, row: Mapping[str, Any]) -> dict[str, Any] | Skipped:
        """The fields of a record by the names of its kind, or why it is none; optional ones only where they are."""
        fields: dict[str, Any] = {}
        for name, column in self.settings.required.items():
            if column not in row:
                return Skipped("no_text", f'has no "{column}" (data.records.columns), but {names_of(row)}')
            fields[name] = row[column]
        for name, column in self.settings.optional.items():
            if row.get(column) not in (None, ""):  # CSV cannot leave a cell out
                fields[name] = row[column]
        return fields

    @staticmethod
    def of(settings: RecordsConfig) -> RecordFormat:
        """Raises SourceError for a template that cannot be read."""
        path = settings.template
        if path in (None, CHATML):
            return RecordFormat(settings)
        try:
            return RecordFormat(settings, Path(from_home(path)).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise SourceError(f"the template {path} is not UTF-8; give a .jinja file, or chatml") from error
        except OSError as error:
            raise unreadable(f"the template {path}", error, "give a .jinja file, or chatml") from error


@dataclass(frozen=True, slots=True)
class Record:
    """A row with columns. ``place`` names it to a person."""

    fields: dict[str, Any]  # by the names of the kind
    place: str
    format: RecordFormat

    def __len__(self) -> int:
        """About its number of characters."""
        return len(str(self.fields))

    def describe(self, what: str) -> str:
        """For messages: where it stands, ``what`` is wrong with it, and how it begins."""
        return f"{self.place}, {what}: {self.fields!s:.300}"


@dataclass(frozen=True)
class Shard:
    """One file of text. ``name`` is the same on every machine and holds no secret; ``location`` is a path or url."""

    name: str
    location: str
    size: int | None = None  # bytes, local files only
    version: Version | None = None  # text on disks and http(s) servers only; None if it was not asked for
    hub: bool = False  # requests carry the hub's token, where there is one
    text_column: str = "text"  # the key or column that holds the text, where rows are text
    records: RecordFormat | None = None  # what rows hold; None: text
    source: str = ""  # the name of its source, in a mixture and where that has a text_column of its own
    tokens: TokenFile | None = None  # made in advance, at the location; all else but that is said of their text
    path: str = field(default="", compare=False)  # the end of the location, where other local files have this name

    @property
    def label(self) -> str:
        """The name, for messages: it tells which of the files of a list is meant."""
        return self.path or self.name

    @property
    def format(self) -> Format:
        return format_of(self.name) or JSON_LINES  # a url may tell nothing

    @property
    def holds_records(self) -> bool:
        """Whether a row is columns, and not a text."""
        return self.records is not None and not self.records.is_text

    @property
    def required_columns(self) -> Collection[str]:
        """The keys or columns that are read, and that every row has."""
        if self.records is None or self.records.is_text:
            return (self.text_column,)
        return self.records.settings.required.values()

    @property
    def columns(self) -> Collection[str]:
        """All keys or columns that are read."""
        if self.records is None or self.records.is_text:
            return (self.text_column,)
        return {**self.records.settings.required, **self.records.settings.optional}.values()

    def record(self, fields: dict[str, Any], where: str) -> Record:
        """A row of this shard, which holds records, with these fields."""
        assert self.records is not None
        return Record(fields, f"{self.label}, {where}", self.records)

    @property
    def is_remote(self) -> bool:
        return self.location.startswith(("http://", "https://"))

    @property
    def origin(self) -> Literal["local", "server", "hub"]:
        """Where its text is."""
        if self.tokens is not None:
            return self.tokens.text.origin
        if self.hub:
            return "hub"
        return "server" if self.is_remote else "local"
