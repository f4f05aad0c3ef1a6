"""The covering grid has what it says."""

import itertools
import random

from tests.grid.cases import CASES, DEEPSPEED, STOPS, VALUES, choice, is_valid

PAIRS = [each.values[0] for each in CASES if not each.marks]


def test_any_two_values_that_occur_together_in_a_valid_case_do():
    covered = {pair for case in PAIRS for pair in itertools.combinations(case.items(), 2)}
    draw = random.Random(1)
    cases = ({name: draw.choice(values) for name, values in VALUES.items()} for _ in range(20000))
    valid = [case for case in cases if is_valid(case)]
    assert len(valid) > 1000
    assert {pair for case in valid for pair in itertools.combinations(case.items(), 2)} <= covered


def test_every_stop_and_every_setting_of_deepspeed_occurs():
    for stage, options in DEEPSPEED.items():
        ours = [case for case in PAIRS if case["stage"] == stage]
        assert {str(choice(case, options)) for case in ours} == set(map(str, options))
    assert {choice(case, STOPS) for case in PAIRS} == set(STOPS)
