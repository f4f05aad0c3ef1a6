"""Scores generated answers by the rules of the published scripts, except that numbers are compared by their value.

lm-evaluation-harness calls these functions with a row and the list of texts generated for it, and averages their
results. docs/tasks.md says where the published scripts disagree, and which rule is used here.
"""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal

from relora_mora.evaluation.generation import agreeing_characters

Scores = dict[str, float]

_NUMBER = re.compile(r"-?([0-9]{1,3}(,[0-9]{3})+|[0-9]+)(\.[0-9]+)?|-?\.[0-9]+")
_LIKE_A_NUMBER = re.compile(r"-?\$?\.?[0-9][0-9.,/]*")
_AFTER_MARK = re.compile(r"#### (-?[0-9.,]+)")

# how spellings of an answer of MATH are made equal, in this order (Hendrycks et al., arXiv 2103.03874: is_equiv)
_SPELLINGS = [
    (re.compile(pattern, re.DOTALL), spelled)
    for pattern, spelled in (
        (r"\\text\{ .*", ""),  # units
        (r"\\!|\\(left|right)(?![a-z])|\^\{\\circ\}|\^\\circ|\\?[$%]", ""),
        (r"\\[dt]frac", r"\\frac"),
        (r"\s+", " "),
        (r"(?<![0-9]) | (?![0-9])", ""),  # 2 3 are two numbers
        (r"\.$", ""),
        (r"^\w=(?=[^=]+$)", ""),
        (r"(?<![0-9])\.(?=[0-9])", "0."),
        (r"\\sqrt(\w)", r"\\sqrt{\1}"),
        (r"\\frac(\w)", r"\\frac{\1}"),
        (r"(\\frac\{[^{}]*\})(\w)", r"\1{\2}"),
        (r"^(-?[0-9]+)/([0-9]+)$", r"\\frac{\1}{\2}"),
        (r"^0\.5$", r"\\frac{1}{2}"),
    )
]


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
    [text] = results
    _, phrase, rest = text.rpartition("The answer is")
    if not phrase:
        return {"exact_match": 0.0}
    answer = rest.removeprefix(":").strip().partition("\n")[0]
    _, mark, expected = row["answer"].rpartition("#### ")
    number = _value(expected.strip()) if mark else None
    if number is None:
        return {"exact_match": float(_canonical(answer) == _canonical(expected))}
    first = _LIKE_A_NUMBER.search(answer)
    return {"exact_match": float(first is not None and _value(first[0]) == number)}


SCORES: dict[str, Callable[[Mapping[str, str], list[str]], Scores]] = {
    "local_uuid": pair_scores,
    "local_gsm8k": gsm8k_scores,
    "local_metamath": metamath_scores,
}


def _canonical(answer: str) -> str | Decimal:
    for pattern, spelled in _SPELLINGS:
        answer = pattern.sub(spelled, answer)
    number = _value(answer)
    return answer if number is None else number


def _value(text: str) -> Decimal | None:
    """The value of a number such as ``$1,000.00.``; None if the text is not a single number, such as ``1,2``."""
    plain = text.replace("$", "").rstrip(".,")
    return Decimal(plain.replace(",", "")) if _NUMBER.fullmatch(plain) else None
