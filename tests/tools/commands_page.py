"""Writes the commands as a Markdown page: ``python -m tests.tools.commands_page > docs/commands.md``."""

from __future__ import annotations

import os

from relora_mora.cli.help import help_text
from relora_mora.commands import COMMANDS, main_of

_HEAD = """\
# Commands

<!-- Written by `python -m tests.tools.commands_page > docs/commands.md`; do not edit it. -->

Every command with its arguments and options: to look up how to call it.

`relora-mora COMMAND` and `python -m relora_mora COMMAND` start a command, and
`relora-mora COMMAND --help` prints its text below. A command that trains also starts under a launcher:
`deepspeed --module relora_mora pretrain CONFIG`, `torchrun --module relora_mora pretrain CONFIG`. In a
checkout, `launch/pretrain.py` and `launch/finetune.py` start the same functions. A value with special
characters goes into quotes. `source <(relora-mora completion)` completes commands and options
in bash.
"""


def commands_page() -> str:
    """The whole page, a section for each command."""
    os.environ["COLUMNS"] = "88"  # the width of a block on a page
    parts = [_HEAD]
    for title, names in COMMANDS.items():
        parts.append(f"## {title}\n")
        for name in names:
            parts.append(f"### {name}\n\n```text\n{help_text(main_of(name), f'relora-mora {name}')}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(commands_page(), end="")
