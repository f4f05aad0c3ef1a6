"""Every command in docs/commands.md, with its help."""

import os
from unittest import mock

from relora_mora.cli.help import help_text
from relora_mora.commands import COMMANDS, main_of


def generated() -> str:
    """A section for each command."""
    parts = []
    with mock.patch.dict(os.environ, COLUMNS="88"):  # the width of a block on a page
        for title, names in COMMANDS.items():
            parts.append(f"## {title}\n")
            for name in names:
                parts.append(f"### {name}\n\n```text\n{help_text(main_of(name), f'relora-mora {name}')}\n```\n")
    return "\n".join(parts)
