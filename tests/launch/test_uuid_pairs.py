"""The pairs of the memory task: the same bytes everywhere."""

import hashlib

import pytest

from tests.tools.commands import call, refused

pytestmark = pytest.mark.more

UUID_PAIRS = "examples/uuid_pairs.py"


def test_a_seed_gives_the_same_bytes_on_every_machine(tmp_path):
    out = tmp_path / "new" / "pairs.jsonl"
    assert "100 pairs" in call(UUID_PAIRS, out, "--pairs=100", "--seed=7").out
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert digest == "897798769238468b82d72ac6ae3e86bbfee344d9e85e350874ff1c1a6cde9fd9"
    refused(call(UUID_PAIRS, out), "pairs.jsonl", "File exists")
    refused(call(UUID_PAIRS, tmp_path / "b", "--pairs=0"), "--pairs: got 0; ")
    expected = "--kind: got 'text'; input should be 'prompt' or 'messages'"
    refused(call(UUID_PAIRS, tmp_path / "b", "--kind=text"), expected)
