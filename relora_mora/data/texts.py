"""The text of a line, or what is wrong with it; and all texts of a source in order."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator

from relora_mora.config import DataConfig
from relora_mora.data.errors import SourceError
from relora_mora.data.reader import BadLine, ShardLines
from relora_mora.data.sources import Shard, Split, resolve_shards

log = logging.getLogger(__name__)

# counted as bad, up to data.max_bad_fraction of a shard's lines
BAD = {
    "too_long": "longer than data.max_line_bytes",
    "raw_nul": "holds a raw NUL byte",
    "invalid_utf8": "is not UTF-8",
    "not_json": "is not JSON",
    "html": "is HTML, not JSON",
    "utf16": "is UTF-16, not UTF-8 (iconv -f UTF-16 -t UTF-8)",
    "no_text": 'has no "text"',
    "text_not_string": 'has a "text" that is no string',
    "truncated": "is where the compressed shard breaks off",
    "corrupt": "is where the compressed shard is damaged; what follows is lost",
}
# skipped and counted, but nothing is wrong with them
HARMLESS = ("empty_text", "blank_line", "empty_shard")
KINDS = (*BAD, *HARMLESS)

# before this many lines a fraction says little; at the end of a shard it is exact whatever the number of lines
JUDGED_FROM_LINES = 1000
Entry = tuple[str, None] | tuple[None, str]  # a text, or the kind of line that is none
_NOTES_PER_KIND = 3  # of a shard
_BLANK = " \t\r\n\v\f"  # what bytes.strip strips


def parse_line(line: bytes | BadLine, *, looks_like: str | None = None) -> Entry:
    """(text, None), or (None, the kind of line that it is instead). ``looks_like``: what the shard is where it holds no JSON.

    An escaped ``\\u0000`` is text, a raw NUL is not; an escaped lone surrogate cannot be encoded, so it is invalid UTF-8.
    """
    if isinstance(line, BadLine):
        return None, line.kind
    if b"\0" in line:
        return None, looks_like or "raw_nul"
    try:
        decoded = line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        return None, looks_like or "invalid_utf8"
    if not decoded.strip(_BLANK):
        return None, "blank_line"
    try:
        value = json.loads(decoded)
    except (ValueError, RecursionError):
        return None, looks_like or "not_json"
    if not isinstance(value, dict) or "text" not in value:
        return None, "no_text"
    text = value["text"]
    if not isinstance(text, str):
        return None, "text_not_string"
    if not text:
        return None, "empty_text"
    if "\\u" in decoded and not _is_encodable(text):
        return None, "invalid_utf8"
    return text, None


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def surely_bad(line: bytes | BadLine) -> bool:
    """Whether ``parse_line`` would call a line bad, as far as that shows without parsing it. Never true for a good line.

    For lines that belong to another lane: several times faster than parsing, and misses only rare kinds of damage.
    """
    if isinstance(line, BadLine):
        return True
    body = line.strip().removeprefix("\ufeff".encode()).lstrip()
    if not body:
        return b"\0" in line
    if not (body.startswith(b"{") and body.endswith(b"}")) or b"\0" in body:
        return True
    if not body.isascii():
        try:
            body.decode("utf-8")
        except UnicodeDecodeError:
            return True
    # a key may be written with escapes
    return b'"text"' not in body and b"\\u" not in body


class Judge:
    """Counts the bad lines of one shard and stops at too many.

    Each decision depends on the position in the shard alone, so a resumed run makes it again at the same place.
    """

    def __init__(self, shard: Shard, max_bad_fraction: float, note: Callable[[str], None], bad: int = 0) -> None:
        self.shard, self.max_bad_fraction, self.bad = shard, max_bad_fraction, bad
        self._note, self._noted, self._last = note, Counter[str](), ""

    def count(self, row: int, kind: str) -> None:
        """The line ``row`` (from 0) is bad, of ``kind``. Raises SourceError when so many are bad already that reading on makes no sense."""
        self.bad += 1
        self._last = f"line {row + 1} {BAD[kind]}"
        self._noted[kind] += 1
        if self._noted[kind] <= _NOTES_PER_KIND:
            self._note(f"{self.shard.name}: {self._last}; skipped")
        self._check(row + 1, max(row + 1, JUDGED_FROM_LINES))

    def finish(self, lines: int) -> None:
        """The shard ended after ``lines`` lines. Raises SourceError when more than the allowed fraction of them is bad."""
        if not lines:
            self._note(f"{self.shard.name} is empty; skipped")
        self._check(lines, lines)

    def _check(self, lines: int, at_least: int) -> None:
        if self.bad > self.max_bad_fraction * at_least:
            last = f"; {self._last}" if self._last else ""
            raise SourceError(
                f"{self.shard.name}: {self.bad} of {lines} lines are bad, more than data.max_bad_fraction ({self.max_bad_fraction:g})"
                f"{last}. Repair or drop the shard, or raise data.max_bad_fraction"
            )


def iter_texts(sources: str | list[str], *, split: Split, config: DataConfig) -> Iterator[str]:
    """Every text of the sources, shard after shard, line after line. Of ``config`` the limits and the revision count.

    Bad lines are skipped and logged; raises SourceError when a shard has too many, or when no shard can be found.
    """
    for shard in resolve_shards(sources, config.revision, split=split, timeout_seconds=config.timeout_seconds):
        yield from _shard_texts(shard, config)


def _shard_texts(shard: Shard, config: DataConfig) -> Iterator[str]:
    judge = Judge(shard, config.max_bad_fraction, log.warning)
    with ShardLines(shard, max_line_bytes=config.max_line_bytes, timeout_seconds=config.timeout_seconds) as lines:
        for line in lines:
            text, kind = parse_line(line, looks_like=lines.looks_like)
            if text is not None:
                yield text
            elif kind in BAD:
                judge.count(lines.row - 1, kind)
        judge.finish(lines.row)
