"""Tasks on local data: their files are in ``tasks/``, and their rows are lines of JSON.

Generated answers are scored by the rules of the published scripts, except that numbers are compared by their value.
lm-evaluation-harness calls these functions with a row and the list of texts generated for it, and averages their
results. docs/tasks.md says where the published scripts disagree, and which rule is used here.
"""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, Field, PlainSerializer, ValidationError, ValidationInfo, field_validator

from relora_mora.evaluation.generation import agreeing_characters

Scores = dict[str, float]

_NUMBER = re.compile(r"-?([0-9]{1,3}(,[0-9]{3})+|[0-9]+)(\.[0-9]+)?|-?\.[0-9]+")
_LIKE_A_NUMBER = re.compile(r"-?\$?\.?[0-9][0-9.,/]*")
_AFTER_MARK = re.compile(r"#### (-?[0-9.,]+)")


class HarnessError(ValueError):
    """A task cannot be run. The message says which, why, and what to do."""


# ---- rows ------------------------------------------------------------------------------------------------------------

Text = Annotated[str, Field(min_length=1)]


def _without_phrase(answer: str) -> str:
    if "The answer is" in answer.rpartition("#### ")[2]:
        raise ValueError('expected only the answer, without "The answer is"')
    return answer


class _Pair(BaseModel):
    prompt: Text
    completion: Annotated[str, Field(pattern=r"^[^\n]+$")]


class _GSM8K(BaseModel):
    question: Text
    answer: Annotated[str, Field(pattern=r"^(?s:.*#### )?-?[0-9][0-9,]*(\.[0-9]*)?\s*$")]


class _MetaMath(BaseModel):
    question: Text
    answer: Annotated[Text, AfterValidator(_without_phrase)]


class _PubMedQA(BaseModel):
    QUESTION: Text
    CONTEXTS: list[str]
    final_decision: Literal["yes", "no", "maybe"]


class _MedQA(BaseModel):
    question: Text
    # as pairs: a dataset would give every row the names of all rows
    options: Annotated[dict[str, str], PlainSerializer(lambda options: list(map(list, options.items())))]
    answer_idx: Text

    @field_validator("answer_idx")
    @classmethod
    def _is_an_option(cls, name: str, info: ValidationInfo) -> str:
        if name not in info.data.get("options", [name]):
            raise ValueError("expected the name of one of the options")
        return name


LOCAL_TASKS: dict[str, type[BaseModel]] = {
    "local_gsm8k": _GSM8K,
    "local_medqa": _MedQA,
    "local_metamath": _MetaMath,
    "local_pubmedqa": _PubMedQA,
    "local_uuid": _Pair,
}


def local_rows(name: str, data: str) -> list[dict[str, Any]]:
    """The rows of a local task in a file, or in the file ``gsm8k.jsonl`` or the like of a folder.

    Raises :class:`HarnessError` if they cannot be used.
    """
    path = Path(data)
    if path.is_dir():
        path /= f"{name.removeprefix('local_')}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also split at U+2028
    except (OSError, UnicodeError) as error:
        raise HarnessError(f"{name}: {path} cannot be read ({error}); give the file, or its folder") from error
    row = LOCAL_TASKS[name]
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(row.model_validate_json(line).model_dump())
            except ValidationError as error:
                fault = error.errors()[0]
                what = ": ".join([*map(str, fault["loc"]), fault["msg"].removeprefix("Value error, ")])
                raise HarnessError(
                    f"{name}: {path}, line {number}: {what}; a row has {', '.join(row.model_fields)}"
                ) from error
    if not rows:
        raise HarnessError(f"{name}: {path} has no rows")
    return rows


# ---- scores ----------------------------------------------------------------------------------------------------------


def pair_scores(row: Mapping[str, str], results: list[str]) -> Scores:
    """Scores a pair to memorize."""
    [generated] = results
    expected = row["completion"]
    return {
        "exact_match": float(generated == expected),
        "character_accuracy": agreeing_characters(generated, expected) / len(expected),
    }


def gsm8k_scores(row: Mapping[str, str], results: list[str]) -> Scores:
    """``strict`` compares the number after the first ####, ``flexible`` the last number."""
    [text] = results
    expected = Decimal(row["answer"].rpartition("#### ")[2].replace(",", ""))
    marked = _AFTER_MARK.search(text)
    numbers = _LIKE_A_NUMBER.findall(text)
    return {
        "exact_match/strict": float(marked is not None and _value(marked[1]) == expected),
        "exact_match/flexible": float(bool(numbers) and _value(numbers[-1]) == expected),
    }


def metamath_scores(row: Mapping[str, str], results: list[str]) -> Scores:
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
    _, mark, expected = row["answer"].rpartition("#### ")
    number = _value(expected.strip())
    if mark and number is not None:
        first = _LIKE_A_NUMBER.search(answer)
        return {"exact_match": float(first is not None and _value(first[0]) == number)}
    same = number is not None and _value(answer) == number
    return {"exact_match": float(same or is_equiv(answer.removesuffix("."), expected))}


SCORES: dict[str, Callable[[Mapping[str, str], list[str]], Scores]] = {
    "local_uuid": pair_scores,
    "local_gsm8k": gsm8k_scores,
    "local_metamath": metamath_scores,
}


def _value(text: str) -> Decimal | None:
    """The value of a number such as ``$1,000.00.``; None if the text is not a single number, such as ``1,2``."""
    plain = re.sub(r"\\!|\\?[$%]", "", text).rstrip(".,")
    return Decimal(plain.replace(",", "")) if _NUMBER.fullmatch(plain) else None


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
    if name in SCORES:
        settings["process_results"] = SCORES[name]
        answers = [settings.get("target_delimiter", " ") + row[settings["doc_to_target"]] for row in rows[:limit]]
        generation = settings["generation_kwargs"]
        generation["max_gen_toks"] = max(generation["max_gen_toks"], *(len(tokens_of(answer)) for answer in answers))
    return settings
