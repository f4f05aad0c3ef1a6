"""Tasks on local files: their rows, messages about unsuitable ones, and which generated answers are right."""

import json

import pytest

from relora_mora.evaluation.local_tasks import (
    LOCAL_TASKS,
    HarnessError,
    gsm8k_scores,
    local_rows,
    local_task,
    metamath_scores,
    pair_scores,
)
from tests.evaluation.tools import ROWS
from tests.tools.data_tools import write_json_lines
from tests.tools.each import each
from tests.tools.shared import needs_lm_eval


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


# ---- which generated answers count as right --------------------------------------------------------------------------

# right answer, generated text, (strict, flexible)
GSM8K: list[tuple[str, str, tuple[int, int]]] = [
    ("18", "So 9 * 2 = 18\n#### 18", (1, 1)),
    ("69", "It is 69.0.", (0, 1)),
    ("69", "#### 69.0.", (1, 1)),
    ("1000", "She earns $1,000.00.", (0, 1)),
    ("1,000", "#### 1000", (1, 1)),
    ("-5", "It falls by -$5.", (0, 1)),
    ("0.5", "#### .5", (1, 1)),
    ("18", "#### 18 eggs in 2 days", (1, 0)),
    ("18", "#### $18", (0, 1)),
    ("18", "#### 18\n#### 19", (1, 0)),
    ("18", "It is 18, and so on ...", (0, 1)),
    ("18", "#### 18.5", (0, 0)),
    ("18", "####18", (0, 1)),
    ("12", "#### 1,2", (0, 0)),
    ("2", "It is 1/2", (0, 0)),
    ("18", "#### ,", (0, 0)),
    ("18", "", (0, 0)),
]
# right answer (after ####: of GSM8K), the line after "The answer is: ", whether it is right
METAMATH: list[tuple[str, str, int]] = [
    ("#### 18", "18", 1),
    ("#### 18", "18%", 1),
    ("#### 18", "$18 per day.", 1),
    ("#### 18", "$\\boxed{18}$", 1),
    ("#### 18", "18.4", 0),
    ("#### 1,000,000", "1,000,000", 1),
    ("#### 12", "1,2", 0),
    ("#### 1", "1/2", 0),
    ("#### 18", "eighteen", 0),
    ("18", "18", 1),
    ("18", "$18$.", 1),
    ("18", "18 apples", 0),
    ("1,2,3", "1, 2, 3", 1),
    ("10,\\!000", "10,000", 1),
    ("\\frac{1}{2}", "0.5", 1),
    ("\\frac{1}{2}", "\\frac{2}{4}", 0),
    ("\\text{Evelyn}", "\\text{Ann}", 0),
    ("x^2+2x+1", "x^2 + 2x + 1", 1),
    ("5", "", 0),
]


@each("answer,generated,right", GSM8K)
@each("steps", ["", "Two and two.\n#### "])
def test_answers_of_gsm8k(steps, answer, generated, right):
    scores = gsm8k_scores({"answer": steps + answer}, [generated])
    assert scores == {"exact_match/strict": right[0], "exact_match/flexible": right[1]}


@needs_lm_eval
@each("answer,generated,right", METAMATH)
@each("before", ["The answer is: ", "It is 1. The answer is: 7\nNo. The answer is: ", "The answer is "])
def test_answers_of_metamath(before, answer, generated, right):
    assert metamath_scores({"answer": answer}, [before + generated]) == {"exact_match": right}
    assert metamath_scores({"answer": answer}, [before + generated + "\nIs it 5?"]) == {"exact_match": right}
    assert metamath_scores({"answer": answer}, [generated]) == {"exact_match": 0}


def test_a_pair_is_compared_character_by_character():
    assert pair_scores({"completion": "abcd"}, ["abcd"]) == {"exact_match": 1.0, "character_accuracy": 1.0}
    assert pair_scores({"completion": "abcd"}, ["abXdefg"]) == {"exact_match": 0.0, "character_accuracy": 0.75}
