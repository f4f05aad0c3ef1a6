"""What the rows of a shard hold, as far as reading them asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora_mora.config import RecordsConfig
from relora_mora.config.records import CHATML
from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.skipped import Skipped, names_of
from relora_mora.system.home import from_home


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
        for field, column in self.settings.required.items():
            if column not in row:
                return Skipped("no_text", f'has no "{column}" (data.records.columns), but {names_of(row)}')
            fields[field] = row[column]
        for field, column in self.settings.optional.items():
            if row.get(column) not in (None, ""):  # CSV cannot leave a cell out
                fields[field] = row[column]
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

    def told(self, what: str) -> str:
        """For messages: where it stands, ``what`` is wrong with it, and how it begins."""
        return f"{self.place}, {what}: {self.fields!s:.300}"
