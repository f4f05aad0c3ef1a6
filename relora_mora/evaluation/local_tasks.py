"""Tasks on local data: their files are in ``tasks/``, and their rows are lines of JSON."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from relora_mora.evaluation.scoring import SCORES
from relora_mora.system.logs import log

_FOLDER = Path(__file__).parent / "tasks"
LOCAL_TASKS = tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))
_NUMBER = re.compile(r"(.*#### )?-?[0-9][0-9,]*(\.[0-9]*)?\s*", re.DOTALL)

# the kinds of fields that the files of tasks name
_KINDS: dict[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "text": lambda value, _: isinstance(value, str),
    "text of one line": lambda value, _: isinstance(value, str) and "\n" not in value,
    "number, with or without #### before it": lambda value, _: (
        isinstance(value, str) and _NUMBER.fullmatch(value) is not None
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
    data: str | None,
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


def local_rows(name: str, data: str | None) -> list[dict[str, Any]]:
    """The rows of a local task. Raises :class:`HarnessError` if they cannot be used."""
    about = _settings(name)["metadata"]
    if data is None:
        raise HarnessError(f"{name}: needs --task_data: give {about['file']}, or its folder")
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
