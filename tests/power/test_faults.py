"""The list of faults fits the code, so that ``make test-power`` can try each of them."""

import re
import subprocess
import sys

import pytest

from tests.power.__main__ import LAYERS, occurrences, read_faults
from tests.tools.helpers import ROOT

FAULTS = read_faults()


def test_every_fault_can_be_put_back():
    """Change `find` to the code of today, or remove a fault whose code is gone."""
    assert [fault["name"] for fault in FAULTS if occurrences(fault, ROOT) != 1] == []
    assert [fault["name"] for fault in FAULTS if fault["replace"] == fault["find"]] == []


def test_entries_are_complete():
    assert len({fault["name"] for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        assert list(fault) == ["name", "fixed_in", "effect", "file", "find", "replace", "found_by", "layer"]
        assert re.fullmatch("[0-9a-f]{8}", fault["fixed_in"])
        assert fault["layer"] in LAYERS
        assert (fault["found_by"] is None) == (fault["layer"] is None)


@pytest.mark.more
def test_the_layer_of_a_fault_is_the_one_of_its_test():
    found_by = {fault["found_by"] for fault in FAULTS if fault["found_by"]}
    command = [sys.executable, "-m", "pytest", "--collect-only", *sorted(found_by)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    in_make_test = {line for line in out.splitlines() if "::" in line}
    in_make_test |= {line.partition("[")[0] for line in in_make_test}
    wrong = [fault["name"] for fault in FAULTS if (fault["layer"] == "test") != (fault["found_by"] in in_make_test)]
    assert wrong == []
