"""The cluster tests are skipped on a machine that cannot be two hosts, unless they are required."""

from __future__ import annotations

import re

import pytest

from tests.cluster.hosts import skip
from tests.tools.helpers import ROOT


def test_a_skip_is_a_failure_if_the_tests_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEED_CLUSTER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no pdsh"):
        skip("no pdsh")
    monkeypatch.setenv("NEED_CLUSTER", "1")
    with pytest.raises(pytest.fail.Exception, match="no pdsh"):
        skip("no pdsh")


def test_cluster_tests_are_needed_in_ci_and_cannot_be_left_out() -> None:
    assert re.search(
        r"^NEED_CLUSTER=1 make test-cluster SHORT=1 > cluster.log", (ROOT / ".ci" / "run").read_text(), re.MULTILINE
    )
    sources = {path: path.read_text() for path in (ROOT / "tests" / "cluster").glob("*.py")}
    assert [
        path.name
        for path, text in sources.items()
        if re.search(r"pytest\.(?:skip|mark\.skip|importorskip)\b(?!\.Exception)", text)
    ] == ["hosts.py"]
