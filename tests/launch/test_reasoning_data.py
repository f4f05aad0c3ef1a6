"""Problems in words: records of questions, the same for a seed, none of them twice."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tools.commands import call, refused

REASONING_DATA = "launch/reasoning_data.py"
is_there = importlib.util.find_spec("reasoning_gym") is not None
needs_package = pytest.mark.skipif(not is_there, reason="reasoning-gym is not installed; run pip install -e '.[math]'")


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@needs_package
def test_problems_are_distinct_questions_with_a_number_at_the_end(tmp_path: Path) -> None:
    answer = call(REASONING_DATA, tmp_path / "out", "--count=60", "--held_out=10", "--seed=3")
    train, held_out = (_rows(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "validation"))
    assert answer.code == 0
    assert f"{len(train)} training and 10 held-out problems" in answer.out
    assert 40 < len(train) <= 50
    assert len(held_out) == 10
    questions = [row["question"] for row in [*train, *held_out]]
    assert len(set(questions)) == len(questions)
    for row in [*train, *held_out]:
        assert set(row) == {"question", "answer"}
        assert row["question"].strip()
        assert re.search(r"\n#### -?[\d.,/]+\s*$", row["answer"]), row["answer"]


@needs_package
def test_a_seed_gives_the_same_problems(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert call(REASONING_DATA, tmp_path / name, "--count=20", "--held_out=5", f"--seed={seed}").code == 0
    a, b, c = (_rows(tmp_path / name / "train.jsonl") for name in "abc")
    assert a == b
    assert a != c


def test_an_impossible_held_out_size_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for held_out in (0, 20, 30):
        answer = call(REASONING_DATA, tmp_path / "out", "--count=20", f"--held_out={held_out}")
        refused(answer, f"--held_out: got {held_out}, expected at least 1 and less than --count=20")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(is_there, reason="reasoning-gym is installed")
def test_without_the_package_the_message_says_how_to_install_it(tmp_path: Path) -> None:
    refused(call(REASONING_DATA, tmp_path / "out"), "reasoning-gym is not installed; run pip install -e '.[math]'")
