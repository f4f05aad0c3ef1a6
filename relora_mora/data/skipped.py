"""Rows that give no text: why each is skipped, and how many bad ones a shard may hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from relora_mora.data.errors import SourceError
from relora_mora.data.sources import Shard

# bad rows, which may be up to data.max_bad_fraction of a shard: the reason, and how it is told of a line or row
BAD_REASONS = {
    "too_long": "longer than data.max_line_bytes",
    "raw_nul": "holds a raw NUL byte",
    "invalid_utf8": "is not UTF-8",
    "not_json": "is not JSON",
    "html": "is HTML, not JSON",
    "utf16": "is UTF-16, not UTF-8 (iconv -f UTF-16 -t UTF-8)",
    "not_csv": "is not CSV",
    "field_count": "has more or fewer fields than the header",
    "no_text": 'has no "{column}"',
    "text_not_string": 'has a "{column}" that is no string',
    "truncated": "is where the compressed shard breaks off",
    "corrupt": "is where the compressed shard is damaged; what follows is lost",
}
# skipped and counted as well, but nothing is wrong with these
HARMLESS_REASONS = ("empty_text", "null_text", "blank_line", "empty_shard")
SKIP_REASONS = (*BAD_REASONS, *HARMLESS_REASONS)

# before this many rows a fraction says little; at the end of a shard it is exact, however few there are
JUDGED_FROM_ROWS = 1000
_NOTES_PER_REASON = 3  # of a shard


@dataclass(frozen=True)
class Skipped:
    """Stands in the place of a row that gives no text. ``reason`` is one of ``SKIP_REASONS``."""

    reason: str


class BadRowLimit:
    """Counts the bad rows of one shard and stops at too many.

    Each decision depends on the position in the shard alone, so a resumed run makes it again at the same place.
    ``bad`` is the number of bad rows before the position where reading begins.
    """

    def __init__(
        self,
        shard: Shard,
        max_bad_fraction: float,
        note: Callable[[str], None],
        bad: int = 0,
        *,
        unit: str,
    ) -> None:
        self.bad = bad
        self._shard = shard
        self._unit = unit
        self._max_bad_fraction = max_bad_fraction
        self._note = note
        self._noted = Counter[str]()
        self._last = ""

    def count(self, number: int, reason: str, *, seen: int | None = None) -> None:
        """The row with this number in the shard, from 1, is bad, and ``seen`` rows were looked at; None: as many.

        Raises SourceError when too many are bad already.
        """
        seen = number if seen is None else seen
        self.bad += 1
        self._last = f"{self._unit} {number} {BAD_REASONS[reason].format(column=self._shard.text_column)}"
        self._noted[reason] += 1
        if self._noted[reason] <= _NOTES_PER_REASON:
            self._note(f"{self._shard.name}: {self._last}; skipped")
        self._check(seen, max(seen, JUDGED_FROM_ROWS))

    def finish(self, rows: int) -> None:
        """The shard ended after ``rows`` rows. Raises SourceError where more than the allowed fraction is bad."""
        if not rows:
            self._note(f"{self._shard.name} is empty; skipped")
        self._check(rows, rows)

    def _check(self, rows: int, at_least: int) -> None:
        if self.bad <= self._max_bad_fraction * at_least:
            return
        last = f"; {self._last}" if self._last else ""
        raise SourceError(
            f"{self._shard.name}: {self.bad} of {rows} {self._unit}s are bad, more than data.max_bad_fraction "
            f"({self._max_bad_fraction:g}){last}. Repair or drop the shard, or raise data.max_bad_fraction"
        )
