"""1,024 ranks with 8 workers each over 10,000 files: equal shares, and exactly the same blocks on 512 ranks.

This is simulated: the lanes of all ranks read made-up rows in this process.
"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from relora_mora.data.lanes import LaneRows, merge_states, plan_lanes
from relora_mora.data.rows import Encoded
from relora_mora.data.shard import Shard
from relora_mora.data.stream import encoded_rows
from relora_mora.data.stream.packing import Lane
from tests.tools.data_tools import data_config

RANKS = 1024
LANES = RANKS * 8  # one lane for every worker
FILES = 10_000
ROWS = 12  # in each file
TOKENS = 6  # in each row, with its EOS
SHARDS = [Shard(f"{number}.parquet", f"https://example.org/{number}.parquet") for number in range(FILES)]


class MadeUpRows:
    """Rows that hold their own numbers; lanes that share a file take turns."""

    bad = 0
    is_empty = False

    def __init__(self, shard, *, stride, phase, bad, note):
        file = int(shard.name.removesuffix(".parquet"))
        self.left = [(file, row, 0, 0, 0) for row in range(phase, ROWS, stride)]

    def skip(self, count):
        fits = count <= len(self.left)
        del self.left[:count]
        return fits

    def take(self, count):
        taken = self.left[:count]
        del self.left[:count]
        return taken

    def close(self):
        pass


def _lanes(ranks, states):
    """For each rank, its lanes ``rank``, ``rank + ranks``, ... as (lane, packer), restored from the states."""
    config = data_config("unused", sequence_length=2 * TOKENS, shuffle_documents=4)
    plans = plan_lanes(LANES, FILES)
    return [
        [
            (
                number,
                Lane(
                    LaneRows(plans[number], SHARDS, config, MadeUpRows),
                    lambda rows: [Encoded(row) for row in rows],
                    eos=-1,
                    sequence_length=config.sequence_length,
                    restored=states.get(str(number)),
                ),
            )
            for number in range(rank, LANES, ranks)
        ]
        for rank in range(ranks)
    ]


def _steps(ranks, steps, states):
    """The blocks of every lane [steps, LANES, T + 1], and the merged state of all ranks after them."""
    blocks = np.empty((steps, LANES, 2 * TOKENS + 1), np.int32)
    of_ranks = []
    for lanes in _lanes(ranks, states):
        for number, lane in lanes:
            for step in range(steps):
                blocks[step, number] = lane.next_block().tokens
        of_ranks.append({str(number): lane.state() for number, lane in lanes})
    return blocks, json.loads(json.dumps(merge_states(of_ranks)))


@pytest.fixture(scope="module", autouse=True)
def few_rows_at_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoded_rows, "ENCODE_ROWS", 8)
        yield


@pytest.fixture(scope="module")
def four_steps(few_rows_at_once):
    return _steps(RANKS, 4, {})


@pytest.mark.more
def test_every_rank_has_the_same_share_and_no_row_is_given_twice(four_steps):
    blocks, states = four_steps
    documents = blocks[:, :, 1:].reshape(4, LANES, 2, TOKENS)  # two to a block
    given = Counter(map(tuple, documents[..., :2].reshape(-1, 2).tolist()))
    assert len(given) == 4 * LANES * 2
    assert set(given.values()) == {1}
    assert {state["documents"] for state in states.values()} == {8}
    assert len(states) == LANES
    shares = [sum(1 / part.stride for part in plan.parts) for plan in plan_lanes(LANES, FILES)]
    of_ranks = [sum(shares[rank::RANKS]) for rank in range(RANKS)]
    assert max(of_ranks) / min(of_ranks) < 1.04


@pytest.mark.more
def test_half_the_ranks_continue_with_the_very_next_blocks(four_steps):
    blocks, states = four_steps
    first, saved = _steps(RANKS, 1, {})
    second, after = _steps(RANKS // 2, 3, saved)
    assert np.array_equal(np.concatenate([first, second]), blocks)
    assert after == states
