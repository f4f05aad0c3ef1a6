"""Command lines of launch/ and tokenizer/: arguments, messages, exit codes, Ctrl-C, and folders that appear whole.

What takes time to import is imported inside functions, here and in the commands, so that Ctrl-C is answered from the start on.
"""

from relora_mora.cli.command import run
from relora_mora.cli.interrupt import INTERRUPTED
from relora_mora.system.disk_errors import disk_faults_named
from relora_mora.system.new_folder import new_folder

__all__ = ["INTERRUPTED", "disk_faults_named", "new_folder", "run"]
