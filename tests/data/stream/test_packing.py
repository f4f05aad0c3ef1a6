"""A lane packs rows with any encoder, and marks which tokens are scored."""

import itertools

import numpy as np

from relora_mora.data.errors import Skipped
from relora_mora.data.rows import Encoded, in_calls
from tests.tools.data_tools import EOS, data_config, make_lane, write_shard
from tests.tools.each import each

ANSWER = ord("y")


def answers_only(texts: list[str]) -> list[Encoded]:
    """A token for each byte, of which those of the answer are scored."""
    return [Encoded(list(text.encode()), [token == "y" for token in text]) for text in texts]


def test_blocks_carry_which_tokens_are_scored(tmp_path):
    texts = [f"{n}?" * (1 + n % 4) + "y" * (3 * n % 11) for n in range(22)]
    config = data_config(write_shard(tmp_path / "a.json", texts), sequence_length=16)
    lane = make_lane(config, 1, 0, encode=answers_only)
    blocks = []
    while lane.state()["epoch"] < 2:
        blocks.append(lane.next_block())
    tokens = np.concatenate([blocks[0].tokens, *(block.tokens[1:] for block in blocks[1:])])
    ends = tokens[1:] == EOS
    scored = np.concatenate([block.scored for block in blocks])
    # the EOS after a question is scored only if the question has an answer
    assert np.array_equal(scored, (tokens[1:] == ANSWER) | (ends & (tokens[:-1] == ANSWER)))
    assert set(scored[ends].tolist()) == {True, False}
    assert {block.tokens.dtype for block in blocks} == {np.dtype(np.int32)}


@each(
    "rows,characters,calls",
    [
        (["a"] * 5, 9, [3, 2]),
        (["a", "b" * 9, "c", "d" * 4, "e" * 5], 9, [2, 3]),
        (["a" * 9, Skipped("no_text")] * 3, 18, [3, 3]),
        (["a" * 9] * 5, 18, [2, 2, 1]),
        ([], 9, []),
    ],
)
def test_rows_go_to_a_tokenizer_in_groups(rows, characters, calls):
    """A call needs dozens of times the memory of its text."""
    made = list(in_calls(rows, 3, characters))
    assert list(map(len, made)) == calls
    assert list(itertools.chain(*made)) == rows
