"""The launchers of a process, and the variables that they set in its environment.

The kernel can signal a process when its parent dies (PR_SET_PDEATHSIG). But that only works for the direct parent, not
for ``deepspeed`` above its ``launch.py``, so the chain of ancestors is watched.
"""

import os
from pathlib import Path

import psutil

_SCRIPTS = ("deepspeed", "torchrun")
_MODULES = (
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
    "torch.distributed.launch",
)
_FILES = tuple(f"{module.replace('.', '/')}.py" for module in _MODULES)


class Launchers:
    """The launchers that started this process: ``deepspeed`` and its ``launch.py``, or torchrun. A shell is not one."""

    def __init__(self) -> None:
        self.processes: list[psutil.Process] = []
        for parent in psutil.Process().parents():
            try:
                if not is_launcher(parent.cmdline()):
                    break
            except psutil.Error:
                break
            self.processes.append(parent)

    def gone(self) -> str | None:
        """The launcher that has ended; None while all are alive."""
        for process in self.processes:
            try:
                alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                alive = False
            if not alive:
                return f"pid {process.pid}"
        return None


def is_launcher(command: list[str]) -> bool:
    """Whether a launcher has this command line: ``python .../bin/deepspeed``, ``python -m torch.distributed.run``."""
    for index, argument in enumerate(command[:6]):
        if argument == "-m":
            return index + 1 < len(command) and command[index + 1] in _MODULES
        name = Path(argument).name
        if not argument.startswith("-") and (index > 0 or name in _SCRIPTS):  # the first argument is the interpreter
            return name in _SCRIPTS or argument.endswith(_FILES)
    return False


def check_environment() -> tuple[int, int]:
    """This process's rank and the number of ranks; 0 and 1 without a launcher.

    Raises ValueError for a value that is not a number, a missing address or port, and an unsupported device.
    """
    numbers = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")):
        text = os.environ.get(name, default)
        if not (text.isascii() and text.isdigit()):
            raise ValueError(f"{name}={text} in the environment: expected a number; the launcher sets it, or unset it")
        numbers.append(int(text))
    rank, world_size = numbers
    if world_size > 1 and "0" in (os.environ.get(name) or "0" for name in ("MASTER_ADDR", "MASTER_PORT")):
        raise ValueError(
            f"WORLD_SIZE={world_size} in the environment, but not both of MASTER_ADDR and MASTER_PORT, where the ranks "
            "meet: the launcher sets them, and srun passes them on with --export=ALL"
        )
    device = os.environ.get("DS_ACCELERATOR", "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"DS_ACCELERATOR={device} in the environment: expected cpu or cuda, or unset it")
    return rank, world_size
