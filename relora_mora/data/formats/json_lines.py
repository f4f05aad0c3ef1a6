"""Reads JSON lines: each line gives a text, a record, or the reason why it has none."""

import json
import re
from typing import Any

from relora_mora.config.data import DataConfig
from relora_mora.data.bytes.lines import BOM, ShardLines
from relora_mora.data.errors import Skipped, SourceError, names_of
from relora_mora.data.shard import Shard

BLANK = " \t\r\n\v\f"  # what bytes.strip strips
_SHOWN = 40  # how much of a bad line a message shows


def parse_line(line: bytes | Skipped, *, column: str = "text") -> str | Skipped:
    """The string under the key ``column``, or the reason why there is none.

    An escaped ``\\u0000`` is text, a raw NUL is not JSON. An escaped lone surrogate cannot be encoded, so it counts as
    invalid UTF-8.
    """
    parsed = _parse(line)
    if isinstance(parsed, Skipped):
        return parsed
    decoded, value = parsed
    if not isinstance(value, dict) or column not in value:
        return Skipped(
            "no_text", f'has no "{column}", only {names_of(value)}' if isinstance(value, dict) and value else ""
        )
    text = value[column]
    if text is None:
        return Skipped("null_text")
    if not isinstance(text, str):
        return Skipped("text_not_string")
    if not text:
        return Skipped("empty_text")
    if "\\u" in decoded and not is_encodable(text):
        return Skipped("invalid_utf8")
    return text


def parse_row(line: bytes | Skipped) -> dict[str, Any] | Skipped:
    """The whole object, or the reason why there is none. The reasons are the same as for texts."""
    parsed = _parse(line)
    if isinstance(parsed, Skipped):
        return parsed
    decoded, value = parsed
    if not isinstance(value, dict):
        return Skipped("bad_record", "is not an object of keys and values")
    if "\\u" in decoded and not is_encodable(json.dumps(value, ensure_ascii=False)):
        return Skipped("invalid_utf8")
    return value


def _parse(line: bytes | Skipped) -> tuple[str, Any] | Skipped:
    """The decoded line and its value."""
    if isinstance(line, Skipped):
        return line
    try:
        decoded = line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        return Skipped("invalid_utf8", f"is not text in UTF-8: {line[:_SHOWN]!r}")
    if not decoded.strip(BLANK):
        return Skipped("blank_line")
    try:
        return decoded, json.loads(decoded)
    except (ValueError, RecursionError) as error:  # Python reads no integer of more than 4,300 digits
        return Skipped("not_json", f"is not JSON ({error}): {decoded[:_SHOWN]!r}")


def is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


_ARRAY = re.compile(rb"\s*\[\s*\{")


class JsonLines(ShardLines):
    """The lines of a shard (see ``turns.Entries``). Raises SourceError if it begins like an array of objects."""

    def __init__(self, shard: Shard, config: DataConfig) -> None:
        super().__init__(shard, max_line_bytes=config.max_line_bytes, timeout_seconds=config.timeout_seconds)
        self._shard = shard

    def content(self, entry: bytes | Skipped) -> str | dict[str, Any] | Skipped:
        if self._shard.records is None or self._shard.records.is_text:
            return parse_line(entry, column=self._shard.text_column)
        row = parse_row(entry)
        return row if isinstance(row, Skipped) else self._shard.records.fields_of(row)

    def begin(self, head: bytes) -> None:
        if _ARRAY.match(head.removeprefix(BOM)):
            raise SourceError(
                f"{self._shard.label} is one JSON array, not JSON lines with one object on each line; "
                "write it as lines: jq -c '.[]' OLD.json > NEW.jsonl"
            )
