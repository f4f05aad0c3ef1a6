"""Tasks on local data: their files are in ``tasks/``, and their rows are lines of JSON.

Generated answers are scored by the rules of the published scripts, except that numbers are compared by their value.
lm-evaluation-harness calls these functions with a row and the list of texts generated for it, and averages their
results. docs/tasks.md says where the published scripts disagree, and which rule is used here.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from relora_mora.evaluation.generation import agreeing_characters
from relora_mora.system.logs import log

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


_FOLDER = Path(__file__).parent / "tasks"
LOCAL_TASKS = tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))
_MARKED_NUMBER = re.compile(r"(.*#### )?-?[0-9][0-9,]*(\.[0-9]*)?\s*", re.DOTALL)

# the kinds of fields that the files of tasks name
_KINDS: dict[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "text": lambda value, _: isinstance(value, str),
    "text of one line": lambda value, _: isinstance(value, str) and "\n" not in value,
    "number, with or without #### before it": lambda value, _: (
        isinstance(value, str) and _MARKED_NUMBER.fullmatch(value) is not None
    ),
    "answer, with or without #### before it": lambda value, _: (
        isinstance(value, str) and "The answer is" not in value.rpartition("#### ")[2]
    ),
    "list of texts": lambda value, _: isinstance(value, list) and all(isinstance(each, str) for each in value),
    "texts by name": lambda value, _: isinstance(value, dict) and all(isinstance(each, str) for each in value.values()),
    "key of options": lambda value, row: isinstance(value, str) and value in row["options"],
    "yes or no or maybe": lambda value, _: value in ("yes", "no", "maybe"),
}


class HarnessError(ValueError):
    """A task cannot be run. The message says which, why, and what to do."""


def local_task(
    name: str,
    data: str,
    tokens_of: Callable[[str], int],
    *,
    positions: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """The settings of a task of :data:`LOCAL_TASKS` for lm-eval, with its rows.

    ``data`` is the file with the rows, or a folder with that file. Generated answers may have as many tokens as the
    longest of the first ``limit`` rows (``tokens_of(text)``), or as the task's file allows, if that is more. The former
    is limited to half of the model's ``positions``, since prompts are cut to what answers leave. Raises
    :class:`HarnessError`.
    """
    settings = _settings(name)
    rows = local_rows(name, data)
    if "generation_kwargs" in settings:
        begin = settings.get("target_delimiter", " ")
        lengths = [tokens_of(begin + row[settings["doc_to_target"]]) for row in rows[:limit]]
        _make_room(settings, lengths, positions)

    def dataset(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({"test": Dataset.from_list(rows)})

    settings["custom_dataset"] = dataset
    if name in SCORES:
        settings["process_results"] = SCORES[name]
    return settings


def _make_room(settings: dict[str, Any], lengths: Sequence[int], positions: int | None) -> None:
    """Raises the answer limit of a task to these lengths, in tokens, and warns if some are still longer."""
    generation = settings["generation_kwargs"]
    most = max(lengths) if positions is None else min(max(lengths), positions // 2)
    generation["max_gen_toks"] = max(generation["max_gen_toks"], most)
    longer = sum(length > generation["max_gen_toks"] for length in lengths)
    if longer:
        log.warning(
            "%s: %d of %d answers have more than %d tokens, the limit for a model with %s positions",
            settings["task"],
            longer,
            len(lengths),
            generation["max_gen_toks"],
            positions,
        )


def local_rows(name: str, data: str) -> list[dict[str, Any]]:
    """The rows of a local task. Raises :class:`HarnessError` if they cannot be used."""
    about = _settings(name)["metadata"]
    path = Path(data)
    if path.is_dir():
        path /= about["file"]
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also split at U+2028
    except (OSError, UnicodeError) as error:
        raise HarnessError(f"{name}: {path} cannot be read ({error}); give the file, or its folder") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise HarnessError(f"{name}: {path}, line {number}: is not JSON ({error})") from error
        missing = [field for field in about["fields"] if not isinstance(row, dict) or row.get(field) in (None, "")]
        if missing:
            raise HarnessError(
                f"{name}: {path}, line {number}: has no {', '.join(missing)}; a row has {', '.join(about['fields'])}"
            )
        for field, kind in about["fields"].items():
            if not _KINDS[kind](row[field], row):
                raise HarnessError(
                    f"{name}: {path}, line {number}: {field} is {json.dumps(row[field]):.80}, expected: {kind}"
                )
        values = {field: row[field] for field in about["fields"]}
        # pairs instead of a mapping: a dataset would give every row the keys of all rows
        rows.append(
            {key: list(map(list, each.items())) if isinstance(each, dict) else each for key, each in values.items()}
        )
    if not rows:
        raise HarnessError(f"{name}: {path} has no rows")
    return rows


def _settings(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return settings
