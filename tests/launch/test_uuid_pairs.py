"""The pairs of the memory task: the same bytes everywhere."""

from __future__ import annotations

import hashlib
import json
import uuid

import pytest

from tests.tools.commands import call, refused

pytestmark = pytest.mark.more

UUID_PAIRS = "examples/uuid_pairs.py"


def test_a_seed_gives_the_same_bytes_on_every_machine(tmp_path):
    answer = call(UUID_PAIRS, tmp_path / "new" / "pairs.jsonl", "--pairs=100", "--seed=7")
    assert answer.code == 0
    assert "100 pairs" in answer.out
    content = (tmp_path / "new" / "pairs.jsonl").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "897798769238468b82d72ac6ae3e86bbfee344d9e85e350874ff1c1a6cde9fd9"
    rows = [json.loads(line) for line in content.splitlines()]
    keys = [row["prompt"].removesuffix("\n") for row in rows]
    values = [row["completion"] for row in rows]
    assert len({*keys, *values}) == 200
    assert all(str(uuid.UUID(text)) == text and uuid.UUID(text).version == 4 for text in [*keys, *values])


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "there").write_text("mine")
    refused(call(UUID_PAIRS, tmp_path / "there"), "there", "File exists")
    assert (tmp_path / "there").read_text() == "mine"
    refused(call(UUID_PAIRS, tmp_path / "new", "--pairs=0"), "--pairs: got 0; ")
    refused(
        call(UUID_PAIRS, tmp_path / "new", "--kind=text"), "--kind: got 'text'; input should be 'prompt' or 'messages'"
    )
