"""The states of lanes, as checkpoints store them."""

from __future__ import annotations

import json

from relora_mora.data.lanes import Cursor, counts_of, merge_states, read_state, start_states

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
