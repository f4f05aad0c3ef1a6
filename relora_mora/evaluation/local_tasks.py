"""Tasks on local data: their files are in ``tasks/``, and their rows are lines of JSON.

Generated answers are scored by the rules of the published scripts, except that numbers are compared by their value.
lm-evaluation-harness calls these functions with a row and the list of texts generated for it, and averages their
results. docs/tasks.md says where the published scripts disagree, and which rule is used here.
"""

import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from relora_mora.evaluation.generation import agreeing_characters

Row = Mapping[str, Any]
Scores = dict[str, float]

_NUMBER = re.compile(r"-?([0-9]{1,3}(,[0-9]{3})+|[0-9]+)(\.[0-9]+)?|-?\.[0-9]+")
_LIKE_A_NUMBER = re.compile(r"-?\$?\.?[0-9][0-9.,/]*")
_AFTER_MARK = re.compile(r"#### (-?[0-9.,]+)")


class HarnessError(ValueError):
    """A task cannot be run. The message says which, why, and what to do."""


def pair_scores(row: Row, results: list[str]) -> Scores:
    """Scores a pair to memorize."""
    [generated] = results
    expected = row["completion"]
    return {
        "exact_match": float(generated == expected),
        "character_accuracy": agreeing_characters(generated, expected) / len(expected),
    }


def gsm8k_scores(row: Row, results: list[str]) -> Scores:
    """``strict`` compares the number after the first ####, ``flexible`` the last number."""
    [text] = results
    expected = _value(_after_mark(row["answer"]))
    marked = _AFTER_MARK.search(text)
    numbers = _LIKE_A_NUMBER.findall(text)
    return {
        "exact_match/strict": float(marked is not None and _value(marked[1]) == expected),
        "exact_match/flexible": float(bool(numbers) and _value(numbers[-1]) == expected),
    }


def metamath_scores(row: Row, results: list[str]) -> Scores:
    """Compares the rest of the line after the last "The answer is:".

    If the expected answer is a number after ####, as in GSM8K, only the first number counts; otherwise, as in MATH, the
    whole text counts.
    """
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    [text] = results
    _, phrase, rest = text.rpartition("The answer is")
    if not phrase:
        return {"exact_match": 0.0}
    answer = rest.removeprefix(":").strip().partition("\n")[0]
    expected = _after_mark(row["answer"])
    number = _value(expected)
    if "#### " in row["answer"] and number is not None:
        first = _LIKE_A_NUMBER.search(answer)
        return {"exact_match": float(first is not None and _value(first[0]) == number)}
    same = number is not None and _value(answer) == number
    return {"exact_match": float(same or is_equiv(answer.removesuffix("."), expected))}


def _after_mark(answer: str) -> str:
    return answer.rpartition("#### ")[2].strip()


def _value(text: str) -> Decimal | None:
    """The value of a number such as ``$1,000.00.``; None if the text is not a single number, such as ``1,2``."""
    plain = re.sub(r"\\!|\\?[$%]", "", text).rstrip(".,")
    return Decimal(plain.replace(",", "")) if _NUMBER.fullmatch(plain) else None


class LocalTask(NamedTuple):
    """The texts in a row, whether a row can be scored, and how a generated answer is scored."""

    keys: tuple[str, ...]
    fits: Callable[[Row], bool]
    scores: Callable[[Row, list[str]], Scores]


LOCAL_TASKS = {
    "local_gsm8k": LocalTask(
        ("question", "answer"), lambda row: _NUMBER.fullmatch(_after_mark(row["answer"])) is not None, gsm8k_scores
    ),
    "local_metamath": LocalTask(
        ("question", "answer"), lambda row: "The answer is" not in _after_mark(row["answer"]), metamath_scores
    ),
    "local_uuid": LocalTask(("prompt", "completion"), lambda row: "\n" not in row["completion"], pair_scores),
}


def local_rows(name: str, data: str) -> list[dict[str, Any]]:
    """The rows of a local task in a file, or in the file ``gsm8k.jsonl`` or the like of a folder.

    Raises :class:`HarnessError` if they cannot be used.
    """
    path = Path(data)
    if path.is_dir():
        path /= f"{name.removeprefix('local_')}.jsonl"
    keys, fits, _ = LOCAL_TASKS[name]
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also split at U+2028
    except (OSError, UnicodeError) as error:
        raise HarnessError(f"{name}: {path} cannot be read ({error}); give the file, or its folder") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            wrong = [key for key in keys if not isinstance(row.get(key), str) or not row[key]]
            fault = f"no usable {' and no '.join(wrong)}" if wrong else None if fits(row) else "an unusable answer"
        except (ValueError, AttributeError) as error:
            fault = f"not a JSON object ({error})"
        if fault is not None:
            raise HarnessError(f"{name}: {path}, line {number}: {fault}; docs/tasks.md says what a row has")
        rows.append({key: row[key] for key in keys})
    if not rows:
        raise HarnessError(f"{name}: {path} has no rows")
    return rows


def local_task(name: str, data: str, tokens_of: Callable[[str], list[str]], limit: int | None = None) -> dict[str, Any]:
    """The settings of a local task for lm-eval, with its rows in ``data``.

    Generated answers may have as many tokens as the longest of the first ``limit`` rows, or as
    the task's file allows, if that is more. Raises :class:`HarnessError`.
    """
    from datasets import Dataset, DatasetDict

    path = Path(__file__).parent / "tasks" / f"{name}.yaml"
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = local_rows(name, data)
    settings["custom_dataset"] = lambda **_: DatasetDict({"test": Dataset.from_list(rows)})
    settings["process_results"] = LOCAL_TASKS[name].scores
    answers = [settings.get("target_delimiter", " ") + row[settings["doc_to_target"]] for row in rows[:limit]]
    generation = settings["generation_kwargs"]
    generation["max_gen_toks"] = max(generation["max_gen_toks"], *(len(tokens_of(answer)) for answer in answers))
    return settings
