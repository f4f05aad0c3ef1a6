"""How many records may be of no use: the rule for bad rows (``bad_rows.py``), where rows are judged as tokens."""

from __future__ import annotations

from collections import Counter

from relora_mora.data.bad_rows import JUDGED_FROM_ROWS
from relora_mora.data.errors import SourceError
from relora_mora.data.rows import Encoded
from relora_mora.data.skipped import ENCODING_REASONS, Skipped

TOO_LONG = "over_length"


def too_many_records(
    bad: int, seen: int, max_bad_fraction: float, told: str, *, whole: bool = False
) -> SourceError | None:
    """What to raise where more than the allowed fraction of records cannot be used; ``told``: one of them.

    The fraction is judged from the 1,000th on; of a ``whole`` set, however small it is.
    """
    if bad <= max_bad_fraction * (seen if whole else max(seen, JUDGED_FROM_ROWS)):
        return None
    return SourceError(
        f"{bad:,} of {seen:,} records cannot be used, more than data.max_bad_fraction ({max_bad_fraction:g}); "
        f"the last one: {told}. Correct them or what data.records says of them, or raise data.max_bad_fraction"
    )


class RecordsFound:
    """What became of rows that were read from the beginning, once each."""

    def __init__(self) -> None:
        self.seen = 0
        self.left_out = Counter[str]()  # by reason
        self.told: dict[str, str] = {}  # by reason, of the last such row
        self._last = ""

    @property
    def bad(self) -> int:
        return sum(self.left_out[reason] for reason in ENCODING_REASONS)

    @property
    def too_long(self) -> int:
        return self.left_out[TOO_LONG]

    def add(self, row: Encoded | Skipped) -> None:
        self.seen += 1
        if isinstance(row, Skipped):
            self.left_out[row.reason] += 1
            self.told[row.reason] = row.told
            if row.reason in ENCODING_REASONS:
                self._last = row.told

    def too_many(self, max_bad_fraction: float, *, whole: bool = False) -> SourceError | None:
        """The error where too many rows are bad."""
        return too_many_records(self.bad, self.seen, max_bad_fraction, self._last, whole=whole)

    def fault(self, name: str, max_bad_fraction: float, *, whole: bool) -> SourceError | None:
        """The error where too many rows are bad, or none can be used; ``whole``: there are no others."""
        if fault := self.too_many(max_bad_fraction, whole=whole):
            return fault
        if not self.seen or self.left_out.total() < self.seen:
            return None
        reasons = self.left_out.most_common()
        reason = reasons[0][0]
        among = "" if whole else f" among the first {self.seen:,}"
        counts = ", ".join(f"{reason}: {count:,}" for reason, count in reasons)
        remedy = "raise data.sequence_length" if reason == TOO_LONG else "correct what data.records says of them"
        return SourceError(
            f"{name}: no record can be used{among} ({counts}); for instance {self.told[reason]}; {remedy}"
        )
