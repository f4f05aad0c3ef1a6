"""docs/promises.md names what the code has."""

import configparser
import importlib
import re

import pytest

import relora_mora
from relora_mora.checkpoint import layout
from relora_mora.cli import command
from relora_mora.commands import NAMES
from relora_mora.data.tokens.index import Index
from relora_mora.supervise import exits
from tests.tools.helpers import ROOT

pytestmark = pytest.mark.more

TEXT = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return TEXT.partition(f"## {title}\n")[2].partition("\n## ")[0]


def codes(text: str) -> set[int]:
    return {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}


def test_exit_codes() -> None:
    written = {value for value in vars(exits).values() if type(value) is int} | {
        command.USER_ERROR,
        command.INTERRUPTED,
        command.UNREAD,
    }
    assert {int(code) for code in re.findall(r"\b\d+\b", section("Exit codes"))} == written
    table = (ROOT / "docs" / "trouble.md").read_text(encoding="utf-8").partition("## Exit codes")[2]
    assert codes(table.partition("\n## ")[0]) == written


def test_names_to_import() -> None:
    listed, modules = section("Names to import").split("The modules")
    assert re.findall(r"`relora_mora\.(\w+)`", listed) == sorted(relora_mora.__all__)
    for name in re.findall(r"`relora_mora\.(\w+)`", modules):
        importlib.import_module(f"relora_mora.{name}")


def test_commands() -> None:
    assert set(re.findall(r"`relora-mora ([\w-]+)`", section("Commands"))) == set(NAMES)
    for script in re.findall(r"`(launch/\w+\.py)`", section("Commands")):
        assert (ROOT / script).is_file()


def test_versions_of_formats() -> None:
    text = " ".join(section("Checkpoints").split())
    assert f"the version of its format, which is {layout.VERSION} now" in text
    assert f"a version of its own, which is {Index.model_fields['version'].default}" in text


def test_allowed_versions() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    requirements = [f"Python{setup['options']['python_requires']}", *setup["options"]["install_requires"].split()]
    listed = re.findall(r"^\| (\w+) \| ([<>=\d.,]+) \|$", section("Tested versions"), re.MULTILINE)
    assert [package for package, _ in listed] == ["Python", "torch", "deepspeed", "transformers"]
    assert {package + allowed for package, allowed in listed} <= set(requirements)
