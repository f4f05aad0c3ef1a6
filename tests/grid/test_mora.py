"""Whole runs of MoRA: they train as plain torch does, and resume to the bit."""

import pytest

from tests.grid.cases import cases_of
from tests.grid.runs import check_run


@pytest.mark.distributed
@pytest.mark.parametrize("case", cases_of("mora", "remora"))
def test_a_mora_run_trains_as_plain_torch_does_and_resumes_to_the_bit(
    pools, ranks, inputs, tokenizer_path, tmp_path, case
):
    check_run(case, pools, ranks, inputs, tokenizer_path, tmp_path)
