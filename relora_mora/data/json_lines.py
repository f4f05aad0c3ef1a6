"""JSON lines: the string under a key of each line, or what stands under the keys of a record."""

from __future__ import annotations

import re
from typing import Any

from relora_mora.config import DataConfig
from relora_mora.data.decompress import BOM
from relora_mora.data.errors import SourceError
from relora_mora.data.lines import ShardLines
from relora_mora.data.parse import parse_line, parse_row, surely_bad
from relora_mora.data.skipped import Skipped
from relora_mora.data.sources import Shard

_ARRAY = re.compile(rb"\s*\[\s*\{")


class JsonLines(ShardLines):
    """The lines of a shard (see ``turns.Entries``). Raises SourceError where it begins like one array of objects."""

    def __init__(self, shard: Shard, config: DataConfig) -> None:
        super().__init__(shard, max_line_bytes=config.max_line_bytes, timeout_seconds=config.timeout_seconds)
        self._shard = shard

    def content(self, entry: bytes | Skipped) -> str | dict[str, Any] | Skipped:
        if self._shard.records is None or self._shard.records.is_text:
            return parse_line(entry, column=self._shard.text_column, foreign_format=self.foreign_format)
        row = parse_row(entry, foreign_format=self.foreign_format)
        return row if isinstance(row, Skipped) else self._shard.records.fields_of(row)

    def seems_good(self, entry: bytes | Skipped) -> bool:
        return not any(surely_bad(entry, column=column) for column in self._shard.required_columns)

    def begin(self, head: bytes) -> None:
        if _ARRAY.match(head.removeprefix(BOM)):
            raise SourceError(
                f"{self._shard.label} is one JSON array, and not JSON lines, an object on each; "
                "write it as lines: jq -c '.[]' OLD.json > NEW.jsonl"
            )
