"""Launches, bytes and kept memory against the tables next to this file: less is reported, more is an error.

Run by ``make test-fakecuda``; ``make count-fakecuda > tests/fakecuda/counts.csv`` writes the table of layers again,
``make count-fakecuda COUNT=loss > tests/fakecuda/loss.csv`` the table of head and loss.
"""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import pytest

from tests.fakecuda import layers, loss
from tests.fakecuda.layers import as_csv

TABLES = {"counts.csv": layers.count_all, "loss.csv": loss.count_all}


def rows_of(text: str) -> dict[tuple[str, ...], dict[str, int]]:
    """{what is counted: {column: number}}"""
    rows = {}
    for row in csv.DictReader(text.splitlines()):
        numbers = {column: int(value) for column, value in row.items() if value.lstrip("-").isdigit()}
        rows[tuple(value for column, value in row.items() if column not in numbers)] = numbers
    return rows


@pytest.mark.parametrize("table", TABLES)
def test_nothing_launches_moves_or_keeps_more_than_before(table: str) -> None:
    before = rows_of(Path(__file__).with_name(table).read_text())
    now = rows_of(as_csv(TABLES[table]()))
    assert now.keys() == before.keys()
    changes = [
        (now[row][column] - number, f"{', '.join(row)}: {column} {number} -> {now[row][column]}")
        for row, columns in before.items()
        for column, number in columns.items()
    ]
    smaller = [text for change, text in changes if change < 0]
    if smaller:
        warnings.warn(f"less than in {table}, write it again:\n" + "\n".join(smaller), stacklevel=1)
    assert [text for change, text in changes if change > 0] == []


def test_a_compiled_layer_keeps_no_weight_for_backward() -> None:
    table = rows_of(Path(__file__).with_name("counts.csv").read_text())
    for model, method, how in table:
        resident = table.get((model, f"{method} resident", how))
        rebuilds = method.startswith("remora") and "int8" not in method  # which is decoupled
        if rebuilds and how == "compiled" and resident is not None:
            assert table[model, method, how]["kept_mib"] <= resident["kept_mib"]
