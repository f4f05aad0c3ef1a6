"""Completion of commands and options in a shell."""

from typing import Literal

from relora_mora.commands import NAMES, main_of


def main(*, shell: Literal["bash", "fish"] = "bash") -> None:
    """Prints a script that completes commands and options in a shell.

    Options:
        shell: bash or fish

    Example:
        source <(relora-mora completion)
    """
    from fire.completion import Script

    print(Script("relora-mora", {name: main_of(name) for name in NAMES}, None, shell))
