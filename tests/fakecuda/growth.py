"""Launches, bytes and kept memory of a layer against the table next to this file: less is reported, more is an error.

Run by ``make test-fakecuda``; ``make count-fakecuda > tests/fakecuda/counts.csv`` writes the table again.
"""

import csv
import warnings
from pathlib import Path

import pytest

from tests.fakecuda.layers import MODELS, as_csv, count_methods


def rows_of(text: str) -> dict[tuple[str, ...], dict[str, int]]:
    """{what is counted: {column: number}}"""
    rows = {}
    for row in csv.DictReader(text.splitlines()):
        numbers = {column: int(value) for column, value in row.items() if value.lstrip("-").isdigit()}
        rows[tuple(value for column, value in row.items() if column not in numbers)] = numbers
    return rows


BEFORE = rows_of(Path(__file__).with_name("counts.csv").read_text())


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("model", MODELS)
def test_no_layer_launches_moves_or_keeps_more_than_before(model: str, how: str) -> None:
    before = {row: numbers for row, numbers in BEFORE.items() if row[0] == model and row[2] == how}
    now = rows_of(as_csv(count_methods(model, how)))
    assert now.keys() == before.keys()
    changes = [
        (now[row][column] - number, f"{', '.join(row)}: {column} {number} -> {now[row][column]}")
        for row, columns in before.items()
        for column, number in columns.items()
    ]
    smaller = [text for change, text in changes if change < 0]
    if smaller:
        warnings.warn("less than before, write the table again:\n" + "\n".join(smaller), stacklevel=1)
    assert [text for change, text in changes if change > 0] == []


def test_a_compiled_layer_keeps_no_weight_for_backward() -> None:
    for model, method, how in BEFORE:
        resident = BEFORE.get((model, f"{method} resident", how))
        rebuilds = method.startswith("remora") and "int8" not in method  # which is decoupled
        if rebuilds and how == "compiled" and resident is not None:
            assert BEFORE[model, method, how]["kept_mib"] <= resident["kept_mib"]
