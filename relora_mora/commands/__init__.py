"""The commands of ``relora-mora``, a module each: its function ``main`` runs, and its docstring is the help.

Slow imports are inside functions, so that a wrong argument is reported at once and Ctrl-C works while they run.
"""

from importlib import import_module
from typing import Any

COMMANDS = {
    "Train": ("demo", "pretrain", "finetune"),
    "Prepare": ("train-tokenizer", "extend-tokenizer", "tokenize", "configs", "plan"),
    "Use a run": ("evaluate", "sample", "export", "board"),
    "Compare runs": ("compare", "study", "spectrum"),
    "Shell": ("completion",),
}
NAMES = tuple(name for names in COMMANDS.values() for name in names)


def main_of(name: str) -> Any:
    """The function of the command ``name``, one of ``NAMES``."""
    return import_module(f"{__name__}.{name.replace('-', '_')}").main
