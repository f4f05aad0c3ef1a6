"""docs/recipes.md: every command has settings that a run accepts, and the row that its plan gives."""

import re
import shlex

import pytest

from relora_mora.config.load import load_config
from tests.tools.helpers import ROOT
from tests.tools.recipes_page import CARDS, METHODS, command, planned, row

PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
SECTIONS = PAGE.split("\n## ")[1:]


def recipes(card: str) -> dict[str, list[str]]:
    """The words after ``pretrain`` of a card's commands, by their title."""
    block = re.findall("```bash\n(.*?)\n```", SECTIONS[[*CARDS].index(card)], re.DOTALL)[0]
    words = [shlex.split(line.partition(" pretrain ")[2]) for line in block.splitlines()]
    return dict(zip(METHODS, words, strict=True))


def check(card: str) -> None:
    section = SECTIONS[[*CARDS].index(card)]
    for title, words in recipes(card).items():
        plan = planned(words, card)
        assert plan["memory"][plan["zero_stage"]]["fits"], (card, words)
        assert row(title, words, plan) in section, (card, words)


def test_every_command_is_for_settings_that_a_run_accepts() -> None:
    assert len(SECTIONS) == len(CARDS)
    for card, devices in CARDS.items():
        for words in recipes(card).values():
            settings = dict(flag.removeprefix("--").split("=", 1) for flag in words[1:])
            assert load_config(words[0], settings, world_size=devices).method.name in words[0]
            assert command(words, card) in PAGE


def test_a_card_has_the_rows_of_its_plans() -> None:
    check("rtx3060")


@pytest.mark.more
def test_every_row_is_what_the_plan_says() -> None:
    for card in CARDS:
        check(card)
