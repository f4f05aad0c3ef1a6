"""Command lines of launch/ and tokenizer/: arguments, messages, exit codes, Ctrl-C, and folders that appear whole.

Here and in the commands, what takes long to import is imported inside functions, so that Ctrl-C is answered meanwhile.
"""

from relora_mora.cli.arguments import NonNegativeInt, PositiveInt
from relora_mora.cli.command import missing_package, run
from relora_mora.system.new_folder import new_folder

__all__ = ["NonNegativeInt", "PositiveInt", "missing_package", "new_folder", "run"]
