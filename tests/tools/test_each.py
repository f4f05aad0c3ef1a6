"""A test over a table tries every row and names each that fails."""

from __future__ import annotations

import pytest

from tests.tools.each import each


def test_all_rows_are_tried_and_those_that_fail_are_named() -> None:
    tried: list[int] = []

    @each("number,right", [(1, True), (2, False), (3, True), (4, False)])
    def test(number: int, right: bool) -> None:
        tried.append(number)
        assert right

    with pytest.raises(ExceptionGroup, match="2 of 4 rows failed") as caught:
        test()
    assert tried == [1, 2, 3, 4]
    assert ["number': 2" in error.__notes__[0] for error in caught.value.exceptions] == [True, False]


def test_a_test_whose_rows_are_all_skipped_is_skipped() -> None:
    with pytest.raises(pytest.skip.Exception):
        each("number", [1, 2])(lambda number: pytest.skip("not here"))()
