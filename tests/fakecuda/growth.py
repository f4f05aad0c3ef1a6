"""Launches, bytes and kept memory against the tables next to this file: less is reported, more is an error.

Run by ``make test-fakecuda``; ``make count-fakecuda > tests/fakecuda/counts.csv`` writes the table of layers again,
``make count-fakecuda COUNT=loss > tests/fakecuda/loss.csv`` the table of head and loss.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fakecuda import layers, loss
from tests.fakecuda.layers import as_csv


def rows_of(text: str) -> dict[tuple[str, ...], dict[str, int]]:
    """{what is counted: {column: number}}"""
    rows = {}
    for row in csv.DictReader(text.splitlines()):
        numbers = {column: int(value) for column, value in row.items() if value.lstrip("-").isdigit()}
        rows[tuple(value for column, value in row.items() if column not in numbers)] = numbers
    return rows


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("model", layers.MODELS)
def test_no_layer_launches_moves_or_keeps_more_than_before(model: str, how: str) -> None:
    before = {row: numbers for row, numbers in kept_in("counts.csv").items() if row[0] == model and row[2] == how}
    assert growth(before, layers.count_methods(model, how)) == []


def test_no_loss_launches_moves_or_keeps_more_than_before() -> None:
    assert growth(kept_in("loss.csv"), loss.count_all()) == []


def kept_in(table: str) -> dict[tuple[str, ...], dict[str, int]]:
    return rows_of(Path(__file__).with_name(table).read_text())


def growth(before: dict[tuple[str, ...], dict[str, int]], counted: Sequence[Any]) -> list[str]:
    """What is more than before; less is a warning."""
    now = rows_of(as_csv(counted))
    assert now.keys() == before.keys()
    changes = [
        (now[row][column] - number, f"{', '.join(row)}: {column} {number} -> {now[row][column]}")
        for row, columns in before.items()
        for column, number in columns.items()
    ]
    smaller = [text for change, text in changes if change < 0]
    if smaller:
        warnings.warn("less than before, write the table again:\n" + "\n".join(smaller), stacklevel=1)
    return [text for change, text in changes if change > 0]


def test_a_compiled_layer_keeps_no_weight_for_backward() -> None:
    table = kept_in("counts.csv")
    for model, method, how in table:
        resident = table.get((model, f"{method} resident", how))
        rebuilds = method.startswith("remora") and "int8" not in method  # which is decoupled
        if rebuilds and how == "compiled" and resident is not None:
            assert table[model, method, how]["kept_mib"] <= resident["kept_mib"]
