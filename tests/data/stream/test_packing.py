"""Packing of rows as a stream and as whole rows: scored tokens, mixtures, and the cache of tokens that a run makes."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from relora_mora.data.errors import Skipped, SourceError
from relora_mora.data.rows import Encoded, encoded_in_calls
from relora_mora.data.sources import configured_shards
from relora_mora.data.stream.packing import UNSCORED, block_of, first_fit
from relora_mora.data.tokens.make import tokens_of_whole_rows
from tests.data.stream_tools import stream_of
from tests.tools.data_tools import EOS, data_config, make_lane, write_json_lines, write_shard
from tests.tools.each import each

ANSWER = ord("y")
LENGTH = 48  # of whole rows


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
    made = list(encoded_in_calls(rows, list, 3, characters))
    assert list(map(len, made)) == calls
    assert list(itertools.chain(*made)) == rows


# ---- whole rows ------------------------------------------------------------------------------------------------------


def _row(number: int) -> dict[str, Any]:
    return {"prompt": f"{number} " + "the rank " * (number % 5), "completion": " matrix" * (1 + number % 3)}


def _config(source: Any, packing: str = "whole", **records: Any) -> Any:
    return data_config(source, packing=packing, records={"kind": "prompt", **records}, sequence_length=LENGTH)


def test_rows_go_into_the_first_block_with_room_from_the_largest_down():
    assert first_fit([3, 9, 4, 1, 6], 10) == [[1, 3], [2, 4], [0]]
    assert first_fit([5, 5, 5], 5) == [[0], [1], [2]]
    assert first_fit([], 5) == []


def test_a_block_by_hand():
    rows = [Encoded([7, 8, 9], [True, False, True]), Encoded([4, 5])]
    block = block_of(rows, eos=EOS, sequence_length=6)
    assert block.tokens.tolist() == [7, 8, 9, 4, 5, EOS, EOS]
    assert block.scored.tolist() == [False, True, False, True, False, False]
    assert block.documents.tolist() == [0, 0, 0, 1, 1, 2]


def test_sources_of_text_and_of_records_are_mixed(tokenizer, tokenizer_path, tmp_path):
    texts = write_json_lines(tmp_path / "text.jsonl", [{"text": "over the rank " * 9}] * 20)
    records = write_json_lines(tmp_path / "records.jsonl", map(_row, range(20)))
    train = [{"source": str(records), "records": {"kind": "prompt"}}, {"source": str(texts)}]
    config = data_config(train, sequence_length=LENGTH)
    assert config.masks_documents
    with stream_of(config, tokenizer_path) as stream:
        batch = next(stream)
    kinds = Counter()
    for inputs, labels, documents in zip(batch.input_ids, batch.labels, batch.document_ids, strict=True):
        is_text = bool((labels != UNSCORED).all())
        kinds[is_text] += 1
        assert is_text == (len(documents.unique()) == 1)
        assert not is_text or "over the rank over" in tokenizer.decode(inputs.tolist())
    assert kinds == {True: 4, False: 4}


def test_tokens_in_the_cache_are_made_once_and_removed_if_the_records_change(tmp_path, tokenizer_path, monkeypatch):
    source = write_json_lines(tmp_path / "a.jsonl", map(_row, range(20)))
    cache = tmp_path / "c"

    def made(config: Any) -> list[str]:
        shards = tokens_of_whole_rows(configured_shards(config, "train"), config, tokenizer_path, cache)
        return [shard.location for shard in shards]

    [first] = made(_config(source))
    with monkeypatch.context() as patch:
        patch.setattr("relora_mora.data.tokens.make.write_tokens", lambda *_, **__: pytest.fail("it was made again"))
        assert made(_config(source)) == [first]
    write_json_lines(source, map(_row, reversed(range(20))))
    [second] = made(_config(source))
    [swapped] = made(_config(source, columns={"prompt": "completion", "completion": "prompt"}))
    assert len({first, second, swapped}) == 3
    assert len(list(cache.iterdir())) == 1
    assert made(_config(source, "stream")) == [str(source)]
    assert not list(cache.iterdir())


@each(
    "rows,message",
    [
        (
            [*map(_row, range(200)), *[{"prompt": "x", "completion": ""}] * 30],
            r"\d+ of \d+ records cannot be used, .* has no answer to learn",
        ),
        (
            [{"prompt": "the rank " * 40, "completion": "x"}] * 3,
            r"no row that can be used \(over_length: 3\).*data\.sequence_length",
        ),
    ],
)
def test_records_that_cannot_be_used_end_the_run_before_its_first_batch(tmp_path, tokenizer_path, rows, message):
    with pytest.raises(SourceError, match=message):
        stream_of(_config(write_json_lines(tmp_path / "a.jsonl", rows)), tokenizer_path)
