"""Lanes read every document once per epoch, pack without loss, and resume anywhere at the very next token."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_mora.data.content import RULE
from relora_mora.data.errors import SourceError
from relora_mora.data.lanes import Cursor, counts_of, lane_parts, merge_states, read_state, seeded_order, start_states
from tests.tools.data_tools import (
    EOS,
    data_config,
    documents_in,
    epoch_tokens,
    make_lane,
    write_shard,
    write_shards,
)
from tests.tools.each import each


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 150), st.booleans())
def test_every_row_of_every_shard_belongs_to_one_lane(lanes, shards, concatenate):
    rows = Counter()
    for parts in lane_parts(data_config("x", concatenate=concatenate), lanes, shards):
        for part in parts:
            assert 0 <= part.phase < part.stride
            rows.update((part.shard, row) for row in range(part.phase, 64, part.stride))
    assert rows == Counter((shard, row) for shard in range(shards) for row in range(64))


@each(
    "lanes,shards,concatenate,most",
    [(8, 8, False, 1), (8, 3, False, 1.5), (8, 3, True, 1), (64, 100, False, 1.34), (8192, 10_000, False, 1.05)],
)
def test_lanes_have_nearly_the_same_share(lanes, shards, concatenate, most):
    config = data_config("x", concatenate=concatenate)
    shares = [sum(1 / part.stride for part in parts) for parts in lane_parts(config, lanes, shards)]
    assert sum(shares) == pytest.approx(shards)
    assert max(shares) / min(shares) <= most + 1e-9


def test_the_order_depends_only_on_the_key():
    assert seeded_order(8, 1, 2, 3) == [1, 3, 7, 5, 2, 0, 4, 6]  # another numpy or machine must give the same
    assert sorted(seeded_order(1000, 5)) == list(range(1000))
    assert seeded_order(100, 1, 2) != seeded_order(100, 2, 1)


def test_blocks_and_states_do_not_change(tmp_path):
    """A change that moves a token needs another ``content.RULE``, because checkpoints hold positions."""
    write_shards(tmp_path, 2, 30)
    digest = hashlib.sha256(RULE.encode())
    for number in range(3):
        lane = make_lane(data_config(tmp_path / "*.gz"), 3, number)
        for _ in range(100):
            digest.update(lane.next_block().tokens.astype("<i4").tobytes())
            digest.update(json.dumps(lane.state()).encode())
        assert lane.state()["epoch"] >= 1
    assert digest.hexdigest() == "88d93384e97e443f4fdb1ce2ea77a76e123eeb14b8704a0a904056d2d87b1913"


@each("lanes,shards", [(1, 3), (2, 5), (4, 4), (5, 3), (8, 3)])
@each("shuffle", [1, 8])
def test_an_epoch_holds_every_document_once(tmp_path, lanes, shards, shuffle):
    written = write_shards(tmp_path, shards, 41)
    config = data_config(tmp_path / "*.gz", shuffle_documents=shuffle)
    found = []
    for number in range(lanes):
        lane = make_lane(config, lanes, number)
        texts = documents_in(epoch_tokens(lane))
        share = sum(len(range(part.phase, 41, part.stride)) for part in lane.parts)
        assert lane.state()["documents"] >= share
        found += texts[:share]
        assert set(texts[share:]) <= set(texts[:share])  # the second epoch has begun
    assert Counter(found) == Counter(text for texts in written for text in texts)


def test_shuffled_differently_in_each_epoch_and_not_at_all(tmp_path):
    (texts,) = write_shards(tmp_path, 1, 40)

    def two_epochs(shuffle):
        lane = make_lane(data_config(tmp_path / "*.gz", shuffle_documents=shuffle), 1, 0)
        tokens = [EOS]
        while lane.state()["epoch"] < 2:
            tokens += lane.next_block().tokens[1:].tolist()
        return documents_in(tokens)[:80]

    assert two_epochs(1) == texts * 2
    shuffled = two_epochs(16)
    first = shuffled[:40]
    second = shuffled[40:]
    assert first != second != texts != first
    assert set(first[:16]) == set(second[:16]) == set(texts[:16])  # in blocks


def test_one_document_only(tmp_path):
    path = write_shard(tmp_path / "a.json.gz", ["alone"])
    lane = make_lane(data_config(path, sequence_length=8), 1, 0)
    tokens = np.concatenate([lane.next_block().tokens[:-1] for _ in range(6)])
    assert documents_in(tokens) == ["alone"] * 7
    (tmp_path / "double.txt").write_text("\n\n".join("abcde"))
    with pytest.raises(SourceError, match=r"double\.txt: .* were skipped \(empty_text: 4\); .* correct rows"):
        make_lane(data_config(tmp_path / "double.txt", sample_by="line"), 2, 1).next_block()


def test_positions_in_files_that_have_become_shorter_are_refused(tmp_path):
    write_shards(tmp_path, 1, 50)
    config = data_config(tmp_path / "*.gz")
    lane = make_lane(config, 1, 0)
    for _ in range(20):
        lane.next_block()
    state = lane.state()
    assert state["offset"] > 0
    with pytest.raises(SourceError, match="has fewer than 1000000 tokens; resume with the same files and tokenizer"):
        make_lane(config, 1, 0, {**state, "offset": 10**6})
    write_shards(tmp_path, 1, 3)
    with pytest.raises(SourceError, match="fewer lines"):
        make_lane(config, 1, 0, state)
    with pytest.raises(SourceError, match="fewer lines"):
        make_lane(config, 1, 0, {**state, "block": 1000})


SAVED = (
    '{"epoch": 1, "place": 4, "block": 2, "item": 3, "bad": 6, "documents": 55, '
    '"skipped": {"not_json": 2, "empty_text": 1}, "offset": 17}'
)


def test_the_form_of_a_saved_state_does_not_change():
    cursor, offset = read_state(json.loads(SAVED))
    assert cursor[:6] == (1, 4, 2, 3, 6, 55)
    assert offset == 17
    assert json.dumps(cursor.state(offset)) == SAVED
    assert json.dumps(cursor.after_skipping("not_json").state(17)) == SAVED.replace('"not_json": 2', '"not_json": 3')
    assert cursor.skipped["not_json"] == 2
    assert read_state(start_states(3)["2"]) == (Cursor(), 0)


def test_states_add_up_to_counts():
    ahead = json.loads(SAVED)
    behind = {**ahead, "epoch": 0, "documents": 5, "skipped": {"not_json": 1, "blank_line": 7}}
    merged = merge_states([{"10": ahead}, {"9": behind}])
    assert list(merged) == ["9", "10"]
    counts = counts_of(merged)
    assert {name: count for name, count in counts.items() if count} == {
        "documents": 60,
        "bad": 3,
        "skipped/not_json": 3,
        "skipped/empty_text": 1,
        "skipped/blank_line": 7,
    }
