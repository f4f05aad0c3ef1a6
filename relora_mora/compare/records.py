"""The file in which a study keeps its runs, one JSON object a line; :mod:`relora_mora.study.record` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from relora_mora.compare.errors import CompareError

RECORDS = "cells.jsonl"  # in the folder of a study
_FIELDS = {"name": str, "given": dict, "config": dict, "start": dict, "metrics": list}


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of runs, in the order of their lines. Raises :class:`CompareError` where a line is none."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [_record(path, number, line) for number, line in enumerate(lines, start=1)]


def json_object(line: str) -> dict[str, Any] | None:
    """None where the text is none: a kill may have cut it off."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def has_step(line: dict[str, Any]) -> bool:
    """Whether a line of metrics says of which step it is."""
    return isinstance(line.get("step"), int)


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    record = json_object(line) or {}
    if all(isinstance(record.get(key), kind) for key, kind in _FIELDS.items()) and _are_lines(record["metrics"]):
        return record
    raise CompareError(
        f"{path}, line {number}: no record of a run; give a run folder, or the {RECORDS} of a study, and where this is "
        "one, copy it again or remove the line"
    )


def _are_lines(metrics: list[Any]) -> bool:
    return bool(metrics) and all(isinstance(line, dict) and has_step(line) for line in metrics)
