"""Scores of generated answers: which ones count as right, and how the published scripts differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from relora_mora.evaluation.local_tasks import gsm8k_scores, metamath_scores, pair_scores
from tests.tools.each import each
from tests.tools.shared import needs_lm_eval

pytestmark = pytest.mark.more

# right answer, generated text, (strict, flexible), and the result of lm-eval's task gsm8k if it differs
GSM8K: list[tuple[str, str, tuple[int, int], tuple[int, int] | None]] = [
    ("18", "So 9 * 2 = 18\n#### 18", (1, 1), None),
    ("69", "It is 69.0.", (0, 1), (0, 0)),
    ("69", "#### 69.0.", (1, 1), (0, 0)),
    ("1000", "She earns $1,000.00.", (0, 1), (0, 0)),
    ("1,000", "#### 1000", (1, 1), None),
    ("-5", "It falls by -$5.", (0, 1), None),
    ("0.5", "#### .5", (1, 1), (0, 0)),
    ("18", "#### 18 eggs in 2 days", (1, 0), None),
    ("18", "#### $18", (0, 1), None),
    ("18", "#### 18\n#### 19", (1, 0), None),
    ("18", "It is 18, and so on ...", (0, 1), (0, 0)),
    ("18", "#### 18.5", (0, 0), None),
    ("18", "####18", (0, 1), None),
    ("12", "#### 1,2", (0, 0), (1, 1)),
    ("2", "It is 1/2", (0, 0), (0, 1)),
    ("18", "#### ,", (0, 0), None),
    ("18", "", (0, 0), None),
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


@each("answer,generated,right,_", GSM8K)
@each("steps", ["", "Two and two.\n#### "])
def test_answers_of_gsm8k(steps, answer, generated, right, _):
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


@needs_lm_eval
@each("answer,generated,right,theirs", GSM8K)
def test_gsm8k_scores_agree_with_lm_eval(answer, generated, right, theirs):
    import lm_eval
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters.extraction import RegexFilter

    path = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    task: dict[str, Any] = yaml.safe_load(path.read_text())
    [metric] = task["metric_list"]
    settings = {key: metric[key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    found = []
    for kind in task["filter_list"]:
        extract = RegexFilter(**{key: value for key, value in kind["filter"][0].items() if key != "function"})
        [[number]] = extract.apply([[generated]], [{}])
        found.append(
            int(exact_match_fn(predictions=[number], references=[f"#### {answer}"], **settings)["exact_match"])
        )
    assert tuple(found) == (theirs or right)
