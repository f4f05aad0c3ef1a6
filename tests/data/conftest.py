"""Fixtures of the tests of the data package."""

import pytest

from relora_mora.data import network
from relora_mora.tokenizer.load import load_tokenizer


@pytest.fixture
def short_waits(monkeypatch):
    """A network whose faults cost no time."""
    monkeypatch.setattr(network, "FIRST_WAIT_SECONDS", 0.002)
    monkeypatch.setattr(network, "LONGEST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(network, "STALL_SECONDS", 0.2)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return load_tokenizer(tokenizer_path)
