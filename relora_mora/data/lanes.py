"""A lane: one deterministic, endless stream of token blocks from its own share of the shards.

The tokens of a lane are EOS, document, EOS, document, EOS, ... Block k is the ``sequence_length + 1`` tokens from
``k * sequence_length`` on: its last token is the first of the next block, so every token but the very first is
predicted once. Where a lane is in its stream is a handful of numbers, ``Cursor`` and an offset in tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from relora_mora.config import DataConfig
from relora_mora.data.errors import SourceError
from relora_mora.data.reader import ShardLines
from relora_mora.data.sources import Shard
from relora_mora.data.texts import BAD, KINDS, Entry, Judge, parse_line, surely_bad

Tokens = npt.NDArray[np.int32]
Encode = Callable[[list[str]], list[list[int]]]
LaneStates = dict[str, dict[str, Any]]  # by the lane's number, as text because JSON knows no other keys

# documents tokenized in one call: enough to make the call cheap, few enough that a resume repeats little
ENCODE_DOCUMENTS = 64
ENCODE_CHARACTERS = 1 << 15


class Cursor(NamedTuple):
    """Just before a row of a lane: its place, and what was passed on the way there."""

    epoch: int = 0
    place: int = 0  # in the lane's shard order of this epoch
    block: int = 0  # of shuffled documents within the shard
    item: int = 0  # in the block's shuffled order
    bad: int = 0  # bad rows of the shard before the block
    documents: int = 0  # finished since the start of the run
    skipped: tuple[int, ...] = (0,) * len(KINDS)  # per kind, since the start of the run


R = TypeVar("R")
Documents = Generator[tuple[str, Cursor], None, R]  # (text, the cursor behind it)


@dataclass(frozen=True)
class LanePlan:
    """What a lane reads: of each of its shards the rows ``phase``, ``phase + stride``, ..."""

    lane: int
    shards: tuple[int, ...]  # numbers in the list of shards
    stride: int
    phase: int

    def order(self, seed: int, epoch: int) -> list[int]:
        """The numbers of its shards in the order of an epoch."""
        return [self.shards[at] for at in seeded_order(len(self.shards), seed, self.lane, epoch)]

    def read(self, state: Mapping[str, Any]) -> tuple[Cursor, int]:
        """(cursor, offset in tokens) of this lane's saved state. Raises SourceError for one that cannot be its own."""
        cursor, offset = read_state(state)
        if cursor.place >= len(self.shards):
            raise SourceError(
                f"lane {self.lane}: the saved position is beyond its {len(self.shards)} shards; resume with the same sources"
            )
        return cursor, offset


def plan_lanes(lanes: int, shards: int) -> list[LanePlan]:
    """Every row of every shard belongs to exactly one lane.

    With at least as many shards as lanes, lane l reads the shards l, l + lanes, ...; with fewer, it shares shard
    ``l mod shards`` with the other lanes that fall on it, each taking every n-th row where n is their number.
    """
    if shards >= lanes:
        return [LanePlan(lane, tuple(range(lane, shards, lanes)), 1, 0) for lane in range(lanes)]
    sharing = [len(range(shard, lanes, shards)) for shard in range(shards)]
    return [LanePlan(lane, (lane % shards,), sharing[lane % shards], lane // shards) for lane in range(lanes)]


def seeded_order(count: int, *key: int) -> list[int]:
    """A permutation of ``range(count)`` that depends on the key alone, on every machine and numpy version.

    The raw stream of numpy's PCG64 is part of its compatibility promise; ``Generator.permutation`` is not.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count), kind="stable").tolist()


@dataclass
class _Document:
    tokens: Tokens  # with its EOS
    after: Cursor


@dataclass
class Lane:
    """``next_block()`` gives the next block [sequence_length + 1]; ``state()`` is where the block after it begins."""

    plan: LanePlan
    shards: Sequence[Shard]
    config: DataConfig
    encode: Encode
    eos: int
    restored: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)  # skipped lines to tell about; the owner empties it

    def __post_init__(self) -> None:
        self._cursor, self._offset = self.plan.read(self.restored) if self.restored else (Cursor(), 0)
        self._source = self._documents(self._cursor)
        self._pending: deque[_Document] = deque()
        self._error: SourceError | None = None
        self._last = self.eos
        if self._offset:
            self._fill()
            tokens = self._pending[0].tokens
            if self._offset >= len(tokens):
                raise SourceError(
                    f"lane {self.plan.lane}: the document at the saved position is shorter than it was; the source or the tokenizer changed"
                )
            self._last = int(tokens[self._offset - 1])

    def next_block(self) -> Tokens:
        """Raises SourceError when the shard has too many bad lines or cannot be read."""
        block = np.empty(self.config.sequence_length + 1, np.int32)
        block[0] = self._last
        filled = 1
        while filled < len(block):
            if not self._pending:
                self._fill()
            document = self._pending[0]
            piece = document.tokens[self._offset : self._offset + len(block) - filled]
            block[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._offset += len(piece)
            if self._offset == len(document.tokens):
                self._pending.popleft()
                self._cursor, self._offset = document.after, 0
        self._last = int(block[-1])
        return block

    def state(self) -> dict[str, Any]:
        """A few numbers, JSON-able: all that ``restored`` needs."""
        return _state_of(self._cursor, self._offset)

    def close(self) -> None:
        self._source.close()

    def _fill(self) -> None:
        """Tokenize the next documents. An error waits until the documents before it are used up."""
        if self._error is not None:
            raise self._error
        texts: list[str] = []
        after: list[Cursor] = []
        characters = 0
        try:
            while len(texts) < ENCODE_DOCUMENTS and characters < ENCODE_CHARACTERS:
                text, cursor = next(self._source)
                texts.append(text)
                after.append(cursor)
                characters += len(text)
        except SourceError as error:
            self._error = error
            if not texts:
                raise
        for ids, cursor in zip(self.encode(texts), after, strict=True):
            tokens = np.empty(len(ids) + 1, np.int32)
            tokens[:-1] = ids
            tokens[-1] = self.eos
            self._pending.append(_Document(tokens, cursor))

    def _documents(self, cursor: Cursor) -> Documents[None]:
        """All documents from the cursor on, endlessly, one epoch after the other."""
        while True:
            order = self.plan.order(self.config.seed, cursor.epoch)
            began_at = cursor
            for place in range(cursor.place, len(order)):
                cursor = yield from self._shard_documents(cursor, order[place])
                cursor = cursor._replace(place=place + 1, block=0, item=0, bad=0)
            at_start = began_at[:4] == (began_at.epoch, 0, 0, 0)
            if at_start and cursor.documents == began_at.documents:
                raise SourceError(
                    f"lane {self.plan.lane} found no text in {', '.join(self.shards[shard].name for shard in self.plan.shards[:3])}: "
                    f"there are fewer documents than lanes; give more text or lower data.lanes"
                )
            cursor = cursor._replace(epoch=cursor.epoch + 1, place=0)

    def _shard_documents(self, cursor: Cursor, number: int) -> Documents[Cursor]:
        """The rest of a shard from the cursor on; returns the cursor at its end."""
        shard, config = self.shards[number], self.config
        judge = Judge(shard, config.max_bad_fraction, self.notes.append, cursor.bad)
        with ShardLines(shard, max_line_bytes=config.max_line_bytes, timeout_seconds=config.timeout_seconds) as lines:
            if not lines.skip(cursor.block * config.shuffle_documents * self.plan.stride):
                raise self._changed(shard)
            entries = self._load(lines, judge)
            if cursor.item > len(entries or ()):
                raise self._changed(shard)
            while entries is not None:
                order = seeded_order(len(entries), config.seed, self.plan.lane, cursor.epoch, number, cursor.block)
                for at in order[cursor.item :]:
                    text, kind = entries[at]
                    entries[at] = (None, "blank_line")  # a block is large: free it while it is used up
                    cursor = cursor._replace(item=cursor.item + 1)
                    if kind:
                        cursor = _skipped(cursor, kind)
                    elif text:
                        cursor = cursor._replace(documents=cursor.documents + 1)
                        yield text, cursor
                bad = judge.bad
                entries = self._load(lines, judge)
                if entries is not None:
                    cursor = cursor._replace(block=cursor.block + 1, item=0, bad=bad)
            judge.finish(lines.row)
            return cursor if lines.row else _skipped(cursor, "empty_shard")

    def _load(self, lines: ShardLines, judge: Judge) -> list[Entry] | None:
        """The lane's rows of the next block, each (text, None) or (None, kind); None at the end of the shard."""
        entries: list[Entry] = []
        stride, phase = self.plan.stride, self.plan.phase
        for at in range(self.config.shuffle_documents * stride):
            line = lines.take()
            if line is None:
                return entries if at else None
            if at % stride == phase:
                entry = parse_line(line, looks_like=lines.looks_like)
                entries.append(entry)
                if entry[1] in BAD:
                    judge.count(lines.row - 1, entry[1])
            elif surely_bad(line):  # another lane's, but the fraction is the shard's
                judge.count(lines.row - 1, parse_line(line, looks_like=lines.looks_like)[1] or "not_json")
        return entries

    def _changed(self, shard: Shard) -> SourceError:
        return SourceError(
            f"lane {self.plan.lane}: {shard.name} has fewer lines than when its position was saved; resume with the same files"
        )


def _skipped(cursor: Cursor, kind: str) -> Cursor:
    at = KINDS.index(kind)
    counts = cursor.skipped
    return cursor._replace(skipped=(*counts[:at], counts[at] + 1, *counts[at + 1 :]))


def _state_of(cursor: Cursor, offset: int) -> dict[str, Any]:
    skipped = {kind: count for kind, count in zip(KINDS, cursor.skipped, strict=True) if count}
    return {**cursor._asdict(), "skipped": skipped, "offset": offset}


def start_states(lanes: int) -> dict[str, dict[str, Any]]:
    """The states of all lanes before their first block."""
    return {str(lane): _state_of(Cursor(), 0) for lane in range(lanes)}


def read_state(state: Mapping[str, Any]) -> tuple[Cursor, int]:
    """(cursor, offset in tokens) of a lane's saved state. Raises SourceError for anything else than such a state."""
    try:
        numbers = [state[name] for name in Cursor._fields[:-1]] + [state["offset"]]
        skipped = dict(state["skipped"])
        if any(type(n) is not int or n < 0 for n in [*numbers, *skipped.values()]) or not set(skipped) <= set(KINDS):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise SourceError(
            f"the saved position of a data lane cannot be read: {state!r:.200}; resume from an undamaged checkpoint"
        ) from None
    return Cursor._make([*numbers[:-1], tuple(skipped.get(kind, 0) for kind in KINDS)]), numbers[-1]
