"""Launches, bytes and kept memory of a decoder layer against ``counts.csv``: less is told, more is an error.

Run by ``make test-fakecuda``; ``make count-fakecuda > tests/fakecuda/counts.csv`` writes the table again.
"""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

from tests.fakecuda.layers import COLUMNS, as_csv, count_all

TABLE = Path(__file__).with_name("counts.csv")
KEYS = ("model", "method", "compiled")


def rows_of(text: str) -> dict[tuple[str, ...], dict[str, int]]:
    """{model, method, eager or compiled: {column: number}}"""
    rows = csv.DictReader(text.splitlines())
    return {tuple(row[key] for key in KEYS): {c: int(row[c]) for c in COLUMNS if c not in KEYS} for row in rows}


def test_a_layer_launches_moves_and_keeps_no_more_than_before() -> None:
    before = rows_of(TABLE.read_text())
    now = rows_of(as_csv(count_all()))
    assert now.keys() == before.keys()
    changes = [
        (now[row][column] - number, f"{', '.join(row)}: {column} {number} -> {now[row][column]}")
        for row, columns in before.items()
        for column, number in columns.items()
    ]
    smaller = [text for change, text in changes if change < 0]
    if smaller:
        warnings.warn("less than in counts.csv, write it again:\n" + "\n".join(smaller), stacklevel=1)
    assert [text for change, text in changes if change > 0] == []


def test_a_compiled_layer_keeps_no_weight_for_backward() -> None:
    table = rows_of(TABLE.read_text())
    for model, method, how in table:
        resident = table.get((model, f"{method} resident", how))
        if method.startswith("remora") and how == "compiled" and resident is not None:
            assert table[model, method, how]["kept_mib"] <= resident["kept_mib"]
