"""Launches, bytes and kept memory of a layer are those of the table next to this file.

Run by ``make test-fakecuda``; ``make count-fakecuda > tests/fakecuda/counts.csv`` writes the table again.
"""

import csv
from pathlib import Path

import pytest

from tests.fakecuda.layers import MODELS, as_csv, count_methods

TABLE = Path(__file__).with_name("counts.csv").read_text()


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("model", MODELS)
def test_a_layer_launches_moves_and_keeps_what_it_did_before(model: str, how: str) -> None:
    now = as_csv(count_methods(model, how)).splitlines()[1:]
    assert now == [row for row in TABLE.splitlines() if row.startswith(f"{model},") and f",{how}," in row]


def test_a_compiled_layer_keeps_no_weight_for_backward() -> None:
    kept = {tuple(row.values())[:3]: int(row["kept_mib"]) for row in csv.DictReader(TABLE.splitlines())}
    for model, method, how in kept:
        resident = kept.get((model, f"{method} resident", how))
        rebuilds = method.startswith("remora") and "int8" not in method  # which is decoupled
        if rebuilds and how == "compiled" and resident is not None:
            assert kept[model, method, how] <= resident
