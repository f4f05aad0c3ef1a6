"""1,024 ranks with 8 workers each over 10,000 files: equal shares, and exactly the same blocks on 512 ranks.

This is simulated: the lanes of all ranks read made-up rows in this process.
"""

import json

import numpy as np
import pytest

from relora_mora.data.lanes import lane_parts, merge_states
from relora_mora.data.rows import Encoded
from relora_mora.data.shard import Shard
from relora_mora.data.stream import lane
from tests.tools.data_tools import data_config

RANKS = 1024
LANES = RANKS * 8  # one for every worker
FILES = 10_000
ROWS = 12  # in each file
TOKENS = 6  # in each row, with its EOS
SHARDS = [Shard(f"{number}.txt", f"https://example.org/{number}.txt") for number in range(FILES)]
CONFIG = data_config("unused", sequence_length=2 * TOKENS, shuffle_documents=4)


class MadeUpRows:
    """Rows that hold their own numbers; lanes that share a file take turns."""

    bad = 0
    is_empty = False

    def __init__(self, config, shard, *, stride, phase, bad, note):
        self.left = [(int(shard.name.removesuffix(".txt")), row, 0, 0, 0) for row in range(phase, ROWS, stride)]

    def skip(self, count):
        return len(self.take(count)) == count

    def take(self, count):
        taken, self.left = self.left[:count], self.left[count:]
        return taken

    def close(self):
        pass


def _steps(ranks, steps, states):
    """The blocks of every lane [steps, LANES, T + 1], and the merged state of all ranks after them."""
    parts = lane_parts(CONFIG, LANES, FILES)
    blocks = np.empty((steps, LANES, 2 * TOKENS + 1), np.int32)
    of_ranks = []
    for rank in range(ranks):
        own = range(rank, LANES, ranks)
        lanes = {
            number: lane.Lane(
                number,
                parts[number],
                SHARDS,
                CONFIG,
                lambda _: lambda rows: list(map(Encoded, rows)),
                eos=-1,
                restored=states.get(str(number)),
            )
            for number in own
        }
        for number in own:
            blocks[:, number] = [lanes[number].next_block().tokens for _ in range(steps)]
        of_ranks.append({str(number): each.state() for number, each in lanes.items()})
    return blocks, json.loads(json.dumps(merge_states(of_ranks)))


@pytest.mark.more
def test_ranks_have_equal_shares_and_half_of_them_continue_with_the_same_blocks(monkeypatch):
    monkeypatch.setattr(lane, "open_rows", MadeUpRows)
    monkeypatch.setattr(lane, "ENCODE_ROWS", 8)
    blocks, states = _steps(RANKS, 4, {})
    given = blocks[:, :, 1:].reshape(-1, TOKENS)[:, :2]  # two rows to a block
    assert len(np.unique(given, axis=0)) == len(given) == 4 * LANES * 2
    assert {state["documents"] for state in states.values()} == {8}
    shares = np.array([sum(1 / part.stride for part in parts) for parts in lane_parts(CONFIG, LANES, FILES)])
    of_ranks = shares.reshape(-1, RANKS).sum(0)
    assert of_ranks.max() / of_ranks.min() < 1.04
    first, saved = _steps(RANKS, 1, {})
    second, after = _steps(RANKS // 2, 3, saved)
    assert np.array_equal(np.concatenate([first, second]), blocks)
    assert after == states
