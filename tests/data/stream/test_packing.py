"""A lane packs rows from any source with any encoder, and marks which tokens are scored."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from relora_mora.data.errors import Skipped, SourceError
from relora_mora.data.lanes import LaneRows, plan_lanes
from relora_mora.data.rows import Encoded, in_calls
from relora_mora.data.shard import Shard
from relora_mora.data.stream.packing import Lane
from tests.tools.data_tools import EOS, data_config
from tests.tools.each import each

ANSWERS_FROM = 100  # tokens from here on are in answers, lower ones in questions


@dataclass
class Question:
    """A row that is not text."""

    number: int
    asked: int  # tokens of the question
    answered: int  # of the answer

    def __len__(self) -> int:
        return self.asked + self.answered


class StoredGroups:
    """Rows in groups, which are dealt out to the lanes that share a file, as in a columnar file."""

    def __init__(self, groups, shard, *, stride, phase, bad, note):
        self._rows = [row for group in groups[shard.name][phase::stride] for row in group]
        self.is_empty = not any(groups[shard.name])
        self.bad = bad
        self._note = note
        self._next = 0
        self.closed = False

    def skip(self, count):
        self._next += count
        return self._next <= len(self._rows)

    def take(self, count):
        rows = self._rows[self._next : self._next + count]
        self._next += count
        for row in rows:
            if isinstance(row, Skipped):
                self.bad += 1
                self._note(f"a row is skipped: {row.reason}")
        return rows

    def close(self):
        self.closed = True


def _tokens(row: Question) -> tuple[list[int], list[int]]:
    return [row.number] * row.asked, [ANSWERS_FROM + row.number] * row.answered


def answers_only(rows: list[Question]) -> list[Encoded]:
    encoded = []
    for row in rows:
        question, answer = _tokens(row)
        encoded.append(Encoded(question + answer, [False] * len(question) + [True] * len(answer)))
    return encoded


def _group(first: int, rows: int) -> list[Question | Skipped]:
    questions = [Question(first + n, asked=1 + n % 4, answered=(3 * n) % 11) for n in range(rows)]
    return [*questions, Skipped("no_text")]


GROUPS = {"a": [_group(0, 7), _group(10, 1), _group(20, 5), _group(30, 9)], "b": [_group(50, 6)], "empty": []}
LENGTH = 16


def _lane(encode_rows, lanes=1, number=0, names=("a", "b", "empty"), restored=None, length=LENGTH):
    shards = [Shard(name, f"/memory/{name}") for name in names]
    config = data_config("unused", shuffle_documents=4)
    rows = LaneRows(plan_lanes(lanes, len(shards))[number], shards, config, functools.partial(StoredGroups, GROUPS))
    return Lane(rows, encode_rows, eos=EOS, sequence_length=length, restored=restored)


def _is_scored(tokens: np.ndarray) -> list[bool]:
    """For each token except the first, whether it belongs to an answer or is the EOS after one."""
    scored = []
    for before, token in itertools.pairwise(tokens.tolist()):
        scored.append(before >= ANSWERS_FROM and before != EOS if token == EOS else token >= ANSWERS_FROM)
    return scored


def test_blocks_carry_which_tokens_are_scored():
    lane = _lane(answers_only)
    blocks = []
    while lane.state()["epoch"] < 2:
        blocks.append(lane.next_block())
    tokens = np.concatenate([blocks[0].tokens, *(block.tokens[1:] for block in blocks[1:])])
    scored = np.concatenate([block.scored for block in blocks])
    assert scored.tolist() == _is_scored(tokens)
    assert 0.2 < scored.mean() < 0.8
    assert {block.tokens.dtype for block in blocks} == {np.dtype(np.int32)}
    # the EOS after a question is scored only if the question has an answer
    assert set(scored[tokens[1:] == EOS].tolist()) == {True, False}
    assert len(lane.rows.notes) >= lane.state()["skipped"]["no_text"] >= 2 * 5
    assert lane.state()["skipped"]["empty_shard"] >= 1


def test_a_shard_with_fewer_rows_than_the_position_is_refused():
    state = {**_lane(answers_only).state(), "block": 50}
    with pytest.raises(SourceError, match=r"lane 0: .* has fewer lines than when its position was saved"):
        _lane(answers_only, restored=state).next_block()


@each(
    "rows,threads,calls",
    [
        (["a"] * 5, 1, [3, 2]),
        (["a", "b" * 9, "c", "d" * 4, "e" * 5], 1, [2, 3]),
        (["a" * 9] * 5, 2, [2, 2, 1]),
        ([], 1, []),
    ],
)
def test_rows_go_to_a_tokenizer_in_groups(monkeypatch, rows, threads, calls):
    """A call needs dozens of times the memory of its text."""
    monkeypatch.setattr("relora_mora.data.rows.CALL_CHARACTERS", 9)
    made = list(in_calls(rows, 3, len, threads))
    assert list(map(len, made)) == calls
    assert list(itertools.chain(*made)) == rows
