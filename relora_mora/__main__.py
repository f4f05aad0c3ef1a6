"""The command ``relora-mora``, also ``python -m relora_mora``. It finds the command by its name and runs it."""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from relora_mora import __version__
from relora_mora.cli.arguments import without_local_rank
from relora_mora.cli.command import USER_ERROR, flush_output
from relora_mora.cli.help import overview
from relora_mora.commands import COMMANDS, NAMES, main_of
from relora_mora.commands.pretrain import run_to_the_end
from relora_mora.config.shipped import nearest
from relora_mora.system.process import say

PROGRAM = "relora-mora"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command that the first argument names."""
    command, *words = without_local_rank(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("--help", "-h", "help"):
        _show(overview(PROGRAM, {title: {name: main_of(name) for name in names} for title, names in COMMANDS.items()}))
    if command == "--version":
        _show(f"{PROGRAM} {__version__}")
    if command not in NAMES:
        near = nearest(command, NAMES)
        remedy = f"did you mean {near}?" if near else f"the commands are {', '.join(NAMES)}"
        say(f"{command}: unknown command; {remedy}")
        raise SystemExit(USER_ERROR)
    start(command, words, name=f"{PROGRAM} {command}")


def _show(text: str) -> NoReturn:
    """Prints a text, of which a program such as head may read only a part."""
    with contextlib.suppress(BrokenPipeError):
        print(text)
        flush_output()
    raise SystemExit(0)


def start(command: str, argv: Sequence[str] | None = None, *, name: str | None = None) -> NoReturn:
    """Runs one command and ends the process; ``name`` is what messages call it, by default the script's name."""
    if command == "tokenize":
        sys.modules["torch"] = None  # type: ignore[assignment] # else transformers imports it, which takes seconds
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    run_to_the_end(main_of(command), argv, name=name)


if __name__ == "__main__":
    main()
