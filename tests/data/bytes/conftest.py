"""Waits between requests are short in these tests."""

from __future__ import annotations

import pytest

from relora_mora.data.bytes import retry


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.002)
    monkeypatch.setattr(retry, "LONGEST_WAIT_SECONDS", 0.02)
