"""docs/support.md says what the checks and the tests say."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.support import elsewhere, evidence, page, settings
from tests.support.settings import DIMENSIONS, combinations_of, disagreements, is_plain, refusal, refused_pairs
from tests.tools.grids import rest
from tests.tools.helpers import ROOT

ALL_EVIDENCE = [*evidence.TRAINING, *(each for table in elsewhere.TABLES for each in table.evidence)]


def test_the_page_is_up_to_date() -> None:
    written = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert written == page.page(), "run python -m tests.support.page > docs/support.md"


def test_every_refused_pair_is_in_a_table() -> None:
    shown = {frozenset({*table.rows[:1], table.columns}) for table in page.TABLES}
    assert len(refused_pairs()) > 10
    for (a, _), (b, _) in refused_pairs():
        assert frozenset({a, b}) in shown, f"no table has both {a} and {b}"


def test_three_settings_are_refused_only_with_a_refused_pair() -> None:
    for three in itertools.combinations(DIMENSIONS, 3):
        assert list(disagreements(combinations_of(three))) == []


def test_a_refusal_without_a_refused_pair_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, *others = refused_pairs().items()
    monkeypatch.setattr(settings, "refused_pairs", lambda: dict(others))
    [found] = disagreements(combinations_of(name for name, _ in pair[0]))
    assert pair[1] in found


@pytest.mark.parametrize("listed", ALL_EVIDENCE, ids=lambda listed: listed.test.rpartition("::")[2])
def test_what_tests_combine_is_not_refused(listed: evidence.Evidence) -> None:
    combined = evidence.shown([listed])
    assert combined
    for combination in (each.combination for each in combined):
        if combination.keys() <= DIMENSIONS.keys():
            assert all(value in DIMENSIONS[name] for name, value in combination.items())
            assert is_plain(combination)
            assert refusal(combination) is None


@pytest.mark.elastic
@pytest.mark.parametrize("world,stage", [(1, 0), *rest((1, 1))])
def example(world: int, stage: int) -> None:
    """Not a test: the parameters of one."""


def test_cases_are_those_of_the_decorators(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{__name__.replace('.', '/')}.py::example"
    assert evidence.cases(name) == [({"world": 1, "stage": stage}, "make test-elastic") for stage in (0, 1)]
    marks: list[Any] = [mark for mark in example.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
    monkeypatch.setattr(example, "pytestmark", marks)
    evidence.cases.cache_clear()
    targets = [target for _, target in evidence.cases(name)]
    assert targets == ["make test", "make test-elastic"]


def test_a_test_that_is_gone_is_noticed() -> None:
    with pytest.raises(AttributeError):
        evidence.cases("tests/support/test_support.py::test_gone")
