"""A lane reads and tokenizes its share of the shards, and cuts it into blocks without losing a token.

The tokens of a lane are EOS, document, EOS, document, EOS, ... Block k is the ``sequence_length + 1`` tokens from
``k * sequence_length`` on. Its last token is also the first of the next block, so every token except the very first is
predicted exactly once.
"""

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import InitVar, dataclass, field
from typing import Any

import numpy as np

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import ENCODING_REASONS, Skipped, SourceError
from relora_mora.data.lanes import Cursor, Part, parts_in_order, read_state, seeded_order
from relora_mora.data.read import open_rows
from relora_mora.data.rows import Encode, Encoded, encoded_in_calls, judge_records
from relora_mora.data.shard import Shard
from relora_mora.data.stream.packing import Block, document_ids, scored_mask

# limits of a call of the tokenizer: enough to make it cheap, and little enough that a resume repeats little
ENCODE_ROWS = 64
ENCODE_CHARACTERS = 1 << 15


@dataclass
class Lane:
    """The blocks of a lane, one after the other. ``state()`` is the position at which the next block begins.

    ``restored`` is an earlier state of this lane. Raises SourceError if the source does not match it. ``notes`` are
    messages about skipped rows; the owner empties the list.
    """

    lane: int
    parts: Sequence[Part]
    shards: Sequence[Shard]
    config: DataConfig
    encode_of: Callable[[Shard], Encode[Any]]
    eos: int
    restored: InitVar[Mapping[str, Any] | None] = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self, restored: Mapping[str, Any] | None) -> None:
        self._before, self._at = read_state(restored) if restored else (Cursor(), 0)
        self._after = self._before
        self._rows = self.rows(self._before)
        self._tokens = np.empty(0, np.int32)  # of the row between the two cursors, with its EOS
        self._scored = np.empty(0, np.bool_)  # which of them are
        if self._at:
            self._read_row()
            if self._at >= len(self._tokens):
                raise self._other_rows(f"the document at the saved position has fewer than {self._at} tokens")

    def next_block(self) -> Block:
        """Raises SourceError when a shard has too many bad rows or cannot be read."""
        length = self.config.sequence_length + 1
        tokens = np.empty(length, np.int32)
        scored = np.empty(length, np.bool_)
        tokens[0] = self._tokens[self._at - 1] if self._at else self.eos
        filled = 1
        while filled < length:
            if self._at == len(self._tokens):
                self._read_row()
                self._at = 0
            count = min(length - filled, len(self._tokens) - self._at)
            tokens[filled : filled + count] = self._tokens[self._at : self._at + count]
            scored[filled : filled + count] = self._scored[self._at : self._at + count]
            filled += count
            self._at += count
        inputs = tokens[:-1]
        documents = document_ids(inputs, self.eos) if self.config.document_mask else np.zeros_like(inputs)
        return Block(tokens, scored[1:], documents)

    def state(self) -> dict[str, Any]:
        return self._before.state(self._at) if self._at < len(self._tokens) else self._after.state(0)

    def close(self) -> None:
        self._rows.close()

    def _read_row(self) -> None:
        self._before = self._after
        row, self._after = next(self._rows)
        self._tokens = np.full(len(row.ids) + 1, self.eos, np.int32)
        self._tokens[:-1] = row.ids
        self._scored = scored_mask(row, "stream")

    def rows(self, cursor: Cursor) -> Generator[tuple[Encoded, Cursor], None, None]:
        """Endless: (row, cursor after it), from any cursor that it yielded before or that was saved.

        Raises SourceError if a shard cannot be read, too many rows are bad, or an epoch has no text.
        """
        while True:
            order = parts_in_order(self.parts, self.config.seed, self.lane, cursor.epoch)
            epoch_start = cursor
            for place in range(cursor.place, len(order)):
                cursor = yield from self._rows_of_part(order[place], cursor)
                cursor = cursor._replace(place=place + 1, block=0, item=0, bad=0)
            was_whole = (epoch_start.place, epoch_start.block, epoch_start.item) == (0, 0, 0)
            if was_whole and cursor.documents == epoch_start.documents:
                raise self._no_text(epoch_start, cursor)
            cursor = cursor._replace(epoch=cursor.epoch + 1, place=0)

    def _rows_of_part(self, part: Part, cursor: Cursor) -> Generator[tuple[Encoded, Cursor], None, Cursor]:
        """Yields the rows of a part from the cursor on and returns the cursor at its end."""
        shard = self.shards[part.shard]
        size = self.config.shuffle_documents
        share = {"stride": part.stride, "phase": part.phase, "bad": cursor.bad}
        with closing(open_rows(self.config, shard, **share, note=self.notes.append)) as rows:
            reaches = rows.skip(cursor.block * size)
            block = rows.take(size) if reaches else []
            if not reaches or cursor.item > len(block):
                raise self._other_rows(f"{shard.label} has fewer lines than when its position was saved")
            while block:
                key = (self.config.seed, self.lane, cursor.epoch, part.shard, cursor.block)
                order = seeded_order(len(block), *key)
                remaining = [block[at] for at in reversed(order[cursor.item :])]
                block.clear()
                cursor = yield from self._encoded(shard, remaining, cursor)
                bad_before = rows.bad
                block = rows.take(size)
                if block:
                    cursor = cursor._replace(block=cursor.block + 1, item=0, bad=bad_before)
            return cursor.after_skipping("empty_shard") if rows.is_empty else cursor

    def _encoded(
        self, shard: Shard, remaining: list[Any], cursor: Cursor
    ) -> Generator[tuple[Encoded, Cursor], None, Cursor]:
        """Tokenizes the rest of a block, the last row first, and counts what cannot be used."""
        calls = encoded_in_calls(_popped(remaining), self.encode_of(shard), ENCODE_ROWS, ENCODE_CHARACTERS)
        for row in itertools.chain.from_iterable(calls):
            if isinstance(row, Skipped):
                cursor = cursor._replace(item=cursor.item + 1).after_skipping(row.reason)
                # later epochs have the same records
                if row.reason in ENCODING_REASONS and shard.tokens is None and not cursor.epoch:
                    judge_records(row, cursor.skipped, cursor.documents, self.config, self.notes.append)
            else:
                cursor = cursor.after_document()
                yield row, cursor
        return cursor

    def _no_text(self, before: Cursor, now: Cursor) -> SourceError:
        counts = {reason: count - before.skipped.get(reason, 0) for reason, count in now.skipped.items()}
        skipped = ", ".join(f"{reason}: {count}" for reason, count in counts.items() if count)
        shards = ", ".join(self.shards[part.shard].label for part in self.parts[:3])
        remedy = "give more text, correct rows that were skipped (docs/data.md#faults) or lower data.lanes"
        if self.config.is_mixture:
            name = self.shards[0].source
            remedy += f"; or set the weight of its source {name} to 0 in data.train and data.stages"
        return SourceError(
            f"lane {self.lane} found no text in {shards}: there are fewer documents than lanes, or all rows were "
            f"skipped ({skipped or 'none was'}); {remedy}"
        )

    def _other_rows(self, fault: str) -> SourceError:
        return SourceError(
            f"lane {self.lane}: {fault}; resume with the same files and tokenizer, or set another data.seed to read "
            "the new text from its beginning"
        )


def _popped(rows: list[Any]) -> Iterator[Any]:
    """The rows from the last to the first. A block of text is large, and this way each row is freed once it is used."""
    while rows:
        yield rows.pop()
