"""Tasks on local files: which rows they have, and the messages about unsuitable ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from relora_mora.evaluation.local_tasks import LOCAL_TASKS, HarnessError, local_rows, local_task
from tests.evaluation.tools import ROWS
from tests.tools.data_tools import write_json_lines
from tests.tools.each import each


def test_every_task_describes_its_data():
    assert set(ROWS) == set(LOCAL_TASKS)


def pairs(value: Any) -> Any:
    """A question has only its own options; rows of a dataset would have the names of all rows."""
    return [list(pair) for pair in value.items()] if isinstance(value, dict) else value


@each("name", LOCAL_TASKS)
def test_a_task_file_has_the_rows_of_a_file_or_of_a_folder(data, name):
    file = data / f"{name.removeprefix('local_')}.jsonl"
    expected = [{key: pairs(value) for key, value in row.items()} for row in ROWS[name]]
    for given in (data, file):
        assert local_task(name, str(given), len)["custom_dataset"]()["test"].to_list() == expected


@each(
    "content,message",
    [
        (None, "local_uuid: .*uuid.jsonl cannot be read"),
        ("", "has no rows"),
        ("{}\n", "line 1: has no prompt, completion; a row has prompt, completion"),
        ('{"prompt": "a", "completion": "b"}\n[]\n', "line 2: has no prompt"),
        ("{", "line 1: is not JSON"),
    ],
)
def test_unsuitable_data_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "uuid.jsonl").write_text(content)
    with pytest.raises(HarnessError, match=message):
        local_task("local_uuid", str(tmp_path), len)


@each(
    "name,row,most",
    [
        ("local_uuid", {"prompt": "a", "completion": "b" * 64}, 64),
        ("local_uuid", {"prompt": "a", "completion": "b" * 65}, 65),
        ("local_gsm8k", {"question": "a", "answer": "b" * 299 + "#### 1"}, 306),  # after a space
        ("local_metamath", {"question": "a", "answer": "1"}, 512),
    ],
)
def test_an_answer_may_be_as_long_as_the_longest_of_the_rows(tmp_path, name, row, most):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[name][0]) + "\n" + json.dumps(row))
    task = local_task(name, str(tmp_path / "rows.jsonl"), len)
    assert task["generation_kwargs"]["max_gen_toks"] == most


@each("positions,limit,most", [(1000, None, 300), (400, None, 200), (100, None, 64), (400, 1, 64)])
def test_long_answers_leave_half_of_the_positions_to_prompts(tmp_path, caplog, positions, limit, most):
    rows = [{"prompt": "a", "completion": "b" * length} for length in (10, 300)]
    write_json_lines(tmp_path / "uuid.jsonl", rows)
    task = local_task("local_uuid", str(tmp_path), len, positions=positions, limit=limit)
    assert task["generation_kwargs"]["max_gen_toks"] == most
    warning = "local_uuid: 1 of 2 answers have more than"
    assert (warning in caplog.text) == (most < 300 and limit is None)


def test_steps_of_a_gsm8k_answer_may_contain_the_answer_phrase(tmp_path):
    row = {"question": "How many?", "answer": "The answer is 5*2 = <<5*2=10>>10 apples.\n#### 10"}
    (tmp_path / "metamath.jsonl").write_text(json.dumps(row))
    assert local_rows("local_metamath", str(tmp_path)) == [row]


def test_only_a_line_feed_ends_a_row(tmp_path):
    """JSON may hold U+2028 as it is; a byte order mark and blank lines are none of the rows."""
    text = "a\u2028b\u0085c"
    rows = [{"prompt": text, "completion": "x"}, {"prompt": "y", "completion": "z"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "uuid.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")
    assert local_rows("local_uuid", str(tmp_path)) == rows


@each(
    "name,change,expected",
    [
        ("local_uuid", {"completion": 3}, "text of one line"),
        ("local_uuid", {"completion": "a\nb"}, "text of one line"),
        ("local_gsm8k", {"answer": "It is 4."}, "number, with or without #### before it"),
        ("local_gsm8k", {"answer": "#### 1.2.3"}, "number, with or without #### before it"),
        ("local_gsm8k", {"answer": "#### $4"}, "number, with or without #### before it"),
        ("local_metamath", {"answer": "The answer is: 4"}, "answer, with or without #### before it"),
        ("local_medqa", {"question": 7}, "text"),
        ("local_medqa", {"options": ["a", "b"]}, "texts by name"),
        ("local_medqa", {"answer_idx": "Z"}, "key of options"),
        ("local_pubmedqa", {"final_decision": "Yes"}, "yes or no or maybe"),
        ("local_pubmedqa", {"CONTEXTS": "One."}, "list of texts"),
    ],
)
def test_a_row_of_another_kind_is_named(tmp_path, name, change, expected):
    rows = [ROWS[name][0], {**ROWS[name][0], **change}]
    file = write_json_lines(tmp_path / "rows.jsonl", rows)
    [column] = change
    with pytest.raises(HarnessError, match=f"{name}: .*rows.jsonl, line 2: {column} is .*, expected: {expected}$"):
        local_task(name, str(file), len)
