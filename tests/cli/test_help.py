"""The help of relora-mora: every argument of every command in one group, and examples that can be started."""

import inspect
import re
import shlex
import subprocess
import sys
from typing import Literal

import pytest

from relora_mora.cli.arguments import PositiveInt, read_arguments
from relora_mora.cli.help import help_text, overview
from relora_mora.commands import COMMANDS, NAMES, main_of
from tests.tools.each import each


def command(path: str, *, rows: PositiveInt | None = None, kind: Literal["a", "b"] = "a", fast: bool = False) -> None:
    """Does one thing.

    It takes a while.

    Arguments:
        path: what it reads,
            line by line

    Speed:
        rows: at once
        kind: of rows
        fast: or else slow

    Example:
        do one --fast
    """


def test_the_docstring_is_shown_as_a_user_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert help_text(command, "do") == (
        "Usage: do PATH [OPTIONS]\n\n"
        "Does one thing.\n\n"
        "It takes a while.\n\n"
        "Arguments:\n"
        "  PATH                      what it reads, line by line\n\n"
        "Speed:\n"
        "  --rows=N                  at once\n"
        "  --kind=a|b                of rows (default: a)\n"
        "  --fast                    or else slow\n\n"
        "Example:\n"
        "  do one --fast"
    )


@each("name", NAMES)
def test_the_help_of_a_command_has_every_argument_once_and_an_example_that_it_reads(name: str) -> None:
    doc = inspect.getdoc(main_of(name)) or ""
    entries = re.findall(r"^ {4}(\w+): ", doc.partition("Example:")[0], re.MULTILINE)
    parameters = inspect.signature(main_of(name)).parameters.values()
    assert sorted(entries) == sorted(each.name for each in parameters if each.name != "words")
    assert all(each.default is each.empty for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)
    text = help_text(main_of(name), f"relora-mora {name}")
    [line] = text.partition("Example:\n")[2].strip().splitlines()
    words = shlex.split(re.sub(r"source <\((.*)\)", r"\1", line))
    assert words[:2] == ["relora-mora", name]
    read_arguments(main_of(name), words[2:], name)


def test_the_overview_has_every_command_under_a_heading() -> None:
    groups = {title: {name: main_of(name) for name in names} for title, names in COMMANDS.items()}
    shown = overview("relora-mora", groups)
    assert all(re.search(rf"^  {name} +\w", shown, re.MULTILINE) for name in NAMES)
    assert all(f"\n{title}:\n" in shown for title in COMMANDS)


def test_help_imports_neither_torch_nor_pydantic() -> None:
    code = (
        "import contextlib, sys\nfrom relora_mora.__main__ import main\nfrom relora_mora.supervise import exits\n"
        "exits.leave_now = sys.exit\n"
        "for words in (['--help'], ['plan', '--help'], ['evaluate', '-h']):\n"
        "    with contextlib.suppress(SystemExit): main(words)\n"
        "print(sorted({'torch', 'pydantic', 'transformers', 'numpy', 'deepspeed', 'fire'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


def test_the_shell_completes_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    main_of("completion")()
    script = capsys.readouterr().out

    def completed(*words: str) -> set[str]:
        line = " ".join(words)
        ask = (
            f"{script}\nCOMP_WORDS=({line} ''); COMP_CWORD={len(words)}; COMP_LINE='{line} '\n"
            "_complete-relora-mora; echo ${COMPREPLY[@]}"
        )
        return set(subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout.split())

    assert completed("relora-mora") >= set(NAMES)
    assert "--gpus-per-node" in completed("relora-mora", "plan")
