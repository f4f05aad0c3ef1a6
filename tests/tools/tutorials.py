"""Goes through a tutorial as its reader would: all blocks of commands and Python in order, in an empty folder.

A block without a language after them is output that the page shows: each of its lines must appear in the output of the
block before it, with other numbers. ``<!-- Ctrl-C after: TEXT -->`` before a block of commands says that the reader
presses Ctrl-C when TEXT appears.
"""

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from relora_mora.cli.command import INTERRUPTED, run
from relora_mora.commands import main_of
from relora_mora.supervise.exits import REQUEUE

_BLOCK = re.compile(r"(?:^<!-- Ctrl-C after: ([^\n]+) -->\n\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"\b[0-9a-f]{16}\b|[-+]?\d[\d.,:]*(?:e[-+]?\d+)?")


class Block(NamedTuple):
    """A fenced block; ``stop``: the text after which the reader presses Ctrl-C, or empty."""

    stop: str
    language: str
    text: str


class Keys(io.StringIO):
    """What a command prints, on both streams. Ctrl-C is pressed after the line with ``stop``."""

    def __init__(self, stop: str) -> None:
        super().__init__()
        self.stop = stop

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.stop and text.endswith("\n") and self.stop in self.getvalue():
            self.stop = ""
            os.kill(os.getpid(), signal.SIGINT)
        return written


def blocks_of(page: str, changes: Mapping[str, str]) -> list[Block]:
    """The blocks of a page, after ``changes`` that make it short; each change must change something."""
    for old, new in changes.items():
        assert old in page, f"the page does not have {old}"
        page = page.replace(old, new)
    blocks = [Block(*found) for found in _BLOCK.findall(page)]
    assert 2 * len(blocks) == len(re.findall("^```", page, re.MULTILINE)), "a fence is not closed"
    return blocks


def follow(page: str, folder: Path, changes: Mapping[str, str]) -> list[str]:
    """Runs in a process of a pool: does what the page says and returns the output of each block that ran."""
    outputs: list[str] = []
    names: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.chdir(folder):
        for block in blocks_of(page, changes):
            if block.language == "bash":
                outputs.append(_commands(block))
            elif block.language == "python":
                outputs.append(_python(block, names))
            elif not block.language:
                check_shown(block.text, outputs[-1])
    return outputs


def check_shown(shown: str, output: str) -> None:
    """Each line of ``shown`` must be a line of the output, but for its numbers; ``...`` is for lines left out."""
    printed = set(map(_shape, output.splitlines()))
    for line in shown.splitlines():
        assert line == "..." or _shape(line) in printed, f"the page shows\n{line}\nbut the output is\n{output}"


def _shape(line: str) -> str:
    return " ".join(_NUMBER.sub("#", line).split())


def _commands(block: Block) -> str:
    """Commands of relora-mora run in this process, which has imported torch already; all others in a shell."""
    if "relora-mora" not in block.text:
        return subprocess.run(["bash", "-euc", block.text], check=True, capture_output=True, text=True).stdout
    lines = block.text.replace("\\\n", " ").splitlines()
    return "".join(_command(line, block.stop) for line in lines if line)


def _command(line: str, stop: str) -> str:
    program, name, *arguments = shlex.split(line, comments=True)
    assert program == "relora-mora", line
    keys = Keys(stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a new process; a finished trainer ignores it
    with contextlib.redirect_stdout(keys), contextlib.redirect_stderr(keys):
        try:
            run(main_of(name), arguments, name=f"relora-mora {name}")
        except SystemExit as end:
            code = end.code
    assert code in ((REQUEUE, INTERRUPTED) if stop else (0,)), f"{line} ended with {code}\n{keys.getvalue()}"
    return keys.getvalue()


def _python(block: Block, names: dict[str, Any]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block.text, "the page", "exec"), names)
    return out.getvalue()
