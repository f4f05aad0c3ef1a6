"""Positions in words: the shard and the lines that a lane has really read."""

from __future__ import annotations

import re

from relora_mora.data.stream.stream import describe_position
from tests.tools.data_tools import EOS, data_config, documents_in, make_lane, resolve_shards, write_shard
from tests.tools.each import each

SENTENCE = re.compile(
    r"lane (\d+): epoch (\d+), after (\w)\.json, (\d+) of documents (?P<first>\d+) to (?P<last>\d+) of share "
    r"(?P<phase>\d+) of (?P<stride>\d+) \(shuffled\)(?: and (?P<tokens>\d+) tokens)?"
)


def _source(folder, shards, rows):
    for name in "abcdef"[:shards]:
        write_shard(folder / f"{name}.json", [f"{name} {row} {'x' * (3 * row % 17)}" for row in range(rows)])
    return data_config(folder / "*.json", sequence_length=8)


@each("lanes,shards,shuffle", [(1, 3, 4), (3, 2, 1)])
def test_the_described_position_is_the_one_that_was_read(tmp_path, lanes, shards, shuffle):
    config = _source(tmp_path, shards, 22).model_copy(update={"shuffle_documents": shuffle})
    for number in range(lanes):
        lane = make_lane(config, lanes, number)
        tokens = [EOS]
        while lane.state()["documents"] < 90:
            tokens += lane.next_block().tokens[1:].tolist()
            if not lane.state()["documents"]:
                continue
            state = lane.state()
            (position,) = describe_position(
                {str(number): state}, lanes=lanes, shards=resolve_shards(config.train), config=config
            )
            match = SENTENCE.fullmatch(position)
            assert match and match.group(1, 2) == (str(number), str(state["epoch"])), position
            name, row, _ = documents_in(tokens)[-1].split(" ")  # the last one that was finished
            lines = range(int(match["phase"]), 1000, int(match["stride"]))[int(match["first"]) - 1 : int(match["last"])]
            assert len(lines) == shuffle and match[3] == name and int(row) + 1 in lines, (position, name, row)
            assert int(match["tokens"] or 0) == len(tokens) - 1 - max(
                at for at, token in enumerate(tokens) if token == EOS
            )
        assert state["epoch"] >= 1
