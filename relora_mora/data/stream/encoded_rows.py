"""Tokenizes the rows of a lane in groups. Rows that cannot be used are skipped and counted; too many are an error."""

from collections import Counter
from typing import Generic, NamedTuple

from relora_mora.data.bad_rows import NOTES_PER_REASON, TOO_LONG, too_many_records
from relora_mora.data.errors import ENCODING_REASONS, Skipped, SourceError
from relora_mora.data.lanes import Cursor, LaneRows
from relora_mora.data.rows import Encode, Encoded, Row

# limits of one call of encode: large enough to make the call cheap, small enough that a resume repeats little
ENCODE_ROWS = 64
ENCODE_CHARACTERS = 1 << 15


class Group(NamedTuple):
    """The usable rows of one call of ``encode``."""

    before: Cursor
    rows: list[Encoded]
    after: list[Cursor]  # the position after each row


class EncodedRows(Generic[Row]):
    """The rows of a lane from ``cursor`` on; ``next_group()`` returns the next ones.

    ``first_epoch`` is the position after the last row tokenized so far that belongs to the first epoch. ``last_bad``
    describes the last bad row.
    """

    def __init__(self, rows: LaneRows[Row], encode: Encode[Row], cursor: Cursor) -> None:
        self._rows = rows
        self._encode = encode
        self._source = rows.rows_from(cursor)
        self._cursor = cursor
        self.first_epoch = cursor
        self.last_bad = ""
        self._used_epoch = cursor.epoch  # of the last usable row
        self._passed = Counter[str]()  # why rows were cut or skipped here; the source counts these rows as documents
        self._noted = Counter[str]()
        self._error: SourceError | None = None

    def next_group(self) -> Group:
        """At least one row. Rows before an error are returned first; then each call raises the SourceError."""
        while self._error is None:
            rows, after = self._take()
            encoded = self._encode(rows)
            before = self._cursor
            whole = [row for row in encoded if isinstance(row, Encoded) and not row.cut]
            if len(whole) == len(encoded) and not self._passed:  # always true for plain text
                self._cursor = after[-1]
                self._used_epoch = self._cursor.epoch
                if after[0].epoch == 0:
                    self.first_epoch = next(cursor for cursor in reversed(after) if cursor.epoch == 0)
                return Group(before, whole, after)
            group = Group(before, [], [])
            for row, cursor in zip(encoded, after, strict=True):
                self._cursor = self._counted(row, cursor)
                if cursor.epoch == 0:
                    self.first_epoch = self._cursor
                if isinstance(row, Encoded):
                    group.rows.append(row)
                    group.after.append(self._cursor)
                    self._used_epoch = cursor.epoch
                elif fault := self._fault(row):
                    self._error = fault
                    break
            if group.rows:
                return group
        raise self._error

    def close(self) -> None:
        self._source.close()

    def _take(self) -> tuple[list[Row], list[Cursor]]:
        """The next rows. An error is kept until the rows before it are used up."""
        rows: list[Row] = []
        after: list[Cursor] = []
        characters = 0
        try:
            while len(rows) < ENCODE_ROWS and characters < ENCODE_CHARACTERS:
                row, cursor = next(self._source)
                rows.append(row)
                after.append(cursor)
                characters += len(row)
        except SourceError as error:
            self._error = error
            if not rows:
                raise
        return rows, after

    def _counted(self, row: Encoded | Skipped, cursor: Cursor) -> Cursor:
        """Counts a row if it was skipped or cut; returns the cursor after it with all such counts so far."""
        if isinstance(row, Skipped):
            self._passed[row.reason] += 1
        elif row.cut:
            self._passed["cut"] += 1
        for reason, count in self._passed.items():
            cursor = cursor.after_skipping(reason, count, documents=0 if reason == "cut" else count)
        return cursor

    def _fault(self, skipped: Skipped) -> SourceError | None:
        """The error to raise if too many rows cannot be used, by the counts since the start of the run.

        Only the first epoch is checked, because later epochs contain the same rows.
        """
        if skipped.reason in ENCODING_REASONS:
            self.last_bad = skipped.detail
            self._noted[skipped.reason] += 1
            if self._noted[skipped.reason] <= NOTES_PER_REASON:
                self._rows.notes.append(f"{skipped.detail}; skipped")
            if self._cursor.epoch == 0:
                bad, seen = judged(self._cursor)
                if fault := too_many_records(bad, seen, self._rows.config.max_bad_fraction, skipped.detail):
                    return fault
        if self._cursor.epoch > self._used_epoch + 1:
            remedy = (
                "raise data.sequence_length or lower data.lanes" if skipped.reason == TOO_LONG else "lower data.lanes"
            )
            return SourceError(
                f"lane {self._rows.plan.lane}: none of its records can be used; "
                f"the last one: {skipped.detail}; {remedy}"
            )
        return None


def judged(cursor: Cursor) -> tuple[int, int]:
    """How many of the records before this position were bad, and how many were tokenized."""
    counts = cursor.skipped_by_reason()
    bad = sum(counts[reason] for reason in ENCODING_REASONS)
    return bad, cursor.documents + bad + counts[TOO_LONG]
