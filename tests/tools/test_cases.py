"""Each case of a test is tried, also after one that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.cases import each_case

TRIED: list[tuple[int, str, str]] = []


@each_case("number", [1, 2, 3])
@each_case(("word", "length"), [("a", 1), ("bb", 2)])
def each_of_six(tmp_path: Path, number: int, word: str, length: int) -> None:
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    TRIED.append((number, word, tmp_path.parent.name))
    if length == 2:
        pytest.fail("a wrong word")
    if number == 3:
        pytest.skip("not here")


def test_all_cases_that_fail_are_reported(tmp_path: Path) -> None:
    TRIED.clear()
    with pytest.raises(BaseExceptionGroup) as caught:
        each_of_six(tmp_path=tmp_path)
    assert [(number, word, str(number - 1)) for number in (1, 2, 3) for word in ("a", "bb")] == TRIED
    assert [len(group.exceptions) for group in caught.value.exceptions] == [1, 1, 1]
    assert "bb" in caught.value.exceptions[0].exceptions[0].__notes__[0]


def test_a_test_whose_cases_are_all_skipped_is_skipped() -> None:
    with pytest.raises(pytest.skip.Exception):
        each_case("number", [1, 2])(lambda number: pytest.skip("not here"))()
