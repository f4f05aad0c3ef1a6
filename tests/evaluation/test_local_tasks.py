"""Tasks on local files: which rows they have, and the messages about unsuitable ones."""

from __future__ import annotations

import json

import pytest

from relora_mora.evaluation.local_tasks import LOCAL_TASKS, HarnessError, local_rows, local_task
from tests.evaluation.tools import ROWS
from tests.tools.data_tools import write_json_lines
from tests.tools.each import each


@each("name", LOCAL_TASKS)
def test_a_task_has_the_rows_of_a_file_or_of_a_folder(data, name):
    for given in (data, data / f"{name.removeprefix('local_')}.jsonl"):
        assert local_rows(name, str(given)) == ROWS[name]


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
    file = write_json_lines(tmp_path / "rows.jsonl", [ROWS[name][0], row])
    assert local_task(name, str(file), list)["generation_kwargs"]["max_gen_toks"] == most
    standard = {"local_uuid": 64, "local_gsm8k": 256, "local_metamath": 512}
    assert local_task(name, str(file), list, limit=1)["generation_kwargs"]["max_gen_toks"] == standard[name]


def test_only_a_line_feed_ends_a_row(tmp_path):
    """JSON may hold U+2028 as it is."""
    rows = [{"prompt": "a\u2028b\u0085c", "completion": "x"}, {"prompt": "y", "completion": "z"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "uuid.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert local_rows("local_uuid", str(tmp_path)) == rows


@each(
    "name,second,message",
    [
        ("local_uuid", "{}", "line 2: no usable prompt and no completion"),
        ("local_uuid", "[]", "line 2: not a JSON object"),
        ("local_uuid", "{", "line 2: not a JSON object"),
        ("local_uuid", {"completion": 3}, "line 2: no usable completion"),
        ("local_uuid", {"completion": "a\nb"}, "line 2: an unusable answer"),
        ("local_uuid", {"completion": ""}, "line 2: no usable completion"),
        ("local_gsm8k", {"answer": "It is 4."}, "line 2: an unusable answer"),
        ("local_gsm8k", {"answer": "#### 1.2.3"}, "line 2: an unusable answer"),
        ("local_gsm8k", {"answer": "#### $4"}, "line 2: an unusable answer"),
        ("local_gsm8k", {"answer": "The answer is 10 apples.\n#### 10"}, None),
        ("local_metamath", {"answer": "The answer is: 4"}, "line 2: an unusable answer"),
        ("local_metamath", {"answer": "The answer is 5*2 = 10 apples.\n#### 10"}, None),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(tmp_path, name, second, message):
    first = ROWS[name][0]
    line = second if isinstance(second, str) else json.dumps(first | second)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(first)}\n{line}\n")
    if message is None:
        assert len(local_rows(name, str(tmp_path / "rows.jsonl"))) == 2
        return
    with pytest.raises(HarnessError, match=f"{name}: .*rows.jsonl, {message}"):
        local_rows(name, str(tmp_path / "rows.jsonl"))


def test_missing_rows_are_named(tmp_path):
    with pytest.raises(HarnessError, match=r"local_uuid: .*uuid.jsonl cannot be read"):
        local_rows("local_uuid", str(tmp_path))
    (tmp_path / "uuid.jsonl").write_text("")
    with pytest.raises(HarnessError, match="has no rows"):
        local_rows("local_uuid", str(tmp_path))
