"""How many bad rows a shard may hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from relora_mora.data.errors import SourceError
from relora_mora.data.skipped import BAD_REASONS, Skipped
from relora_mora.data.sources import Shard

# before this many rows a fraction says little; at the end of a shard it is exact, however few there are
JUDGED_FROM_ROWS = 1000
NOTES_PER_REASON = 3  # of a shard
OTHER_KEYS = "data.text_column names the key of texts, a run's data.records what else a line holds"


def told_of(skipped: Skipped, shard: Shard) -> str:
    """What is wrong with a bad row of a shard."""
    return skipped.told or BAD_REASONS[skipped.reason].format(column=shard.text_column)


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

    def count(self, number: int, skipped: Skipped, *, seen: int | None = None) -> None:
        """The row with this number in the shard, from 1, is bad, and ``seen`` rows were looked at; None: as many.

        Raises SourceError when too many are bad already.
        """
        seen = number if seen is None else seen
        self.bad += 1
        reason = skipped.reason
        self._last = f"{self._unit} {number} {told_of(skipped, self._shard)}"
        self._noted[reason] += 1
        if self._noted[reason] <= NOTES_PER_REASON:
            self._note(f"{self._shard.label}: {self._last}; skipped")
        self._check(seen, max(seen, JUDGED_FROM_ROWS))

    def finish(self, rows: int, *, are_all: bool = True) -> None:
        """The shard ended after ``rows`` rows, which ``are_all`` of it or a lane's.

        Raises SourceError where more than the allowed fraction is bad.
        """
        if not rows:
            self._note(f"{self._shard.label} is empty; skipped")
        self._check(rows, rows if are_all else max(rows, JUDGED_FROM_ROWS))

    def _check(self, rows: int, at_least: int) -> None:
        if self.bad <= self._max_bad_fraction * at_least:
            return
        last = f"; {self._last}" if self._last else ""
        if self._noted["no_text"] and not self._shard.holds_records:
            last += f" ({OTHER_KEYS})"
        raise SourceError(
            f"{self._shard.label}: {self.bad} of {rows} {self._unit}s are bad, more than data.max_bad_fraction "
            f"({self._max_bad_fraction:g}){last}. Repair or drop the shard, or raise data.max_bad_fraction"
        )
