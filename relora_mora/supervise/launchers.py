"""The launchers of a process, and the variables that they set in its environment.

The kernel can signal a process when its parent dies (PR_SET_PDEATHSIG). But that only works for the direct parent, not
for ``deepspeed`` above its ``launch.py``, so the chain of ancestors is watched.
"""

import itertools
import os
from pathlib import Path

import psutil

_SCRIPTS = {"deepspeed", "torchrun"}
_MODULES = {
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
    "torch.distributed.launch",
}
_FILES = tuple(f"{module.replace('.', '/')}.py" for module in _MODULES)


class Launchers:
    """The launchers that started this process: ``deepspeed`` and its ``launch.py``, or torchrun. A shell is not one."""

    def __init__(self) -> None:
        self.processes = list(itertools.takewhile(_is_launcher, psutil.Process().parents()))

    def gone(self) -> str | None:
        """The launcher that has ended; None while all are alive."""
        return next((f"pid {process.pid}" for process in self.processes if not _is_alive(process)), None)


def _is_launcher(process: psutil.Process) -> bool:
    try:
        return is_launcher(process.cmdline())
    except psutil.Error:
        return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def is_launcher(command: list[str]) -> bool:
    """Whether a launcher has this command line: ``python .../bin/deepspeed``, ``python -m torch.distributed.run``."""
    scripts = {Path(word).name for word in command[:2]}
    return bool(scripts & _SCRIPTS) or any(word in _MODULES or word.endswith(_FILES) for word in command[1:5])


def check_environment() -> tuple[int, int]:
    """This process's rank and the number of ranks; 0 and 1 without a launcher.

    Raises ValueError for a value that is not a number, a missing address or port, and an unsupported device.
    """
    values = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    for name, text in values.items():
        if not (text.isascii() and text.isdigit()):
            raise ValueError(f"{name}={text} in the environment: expected a number; the launcher sets it, or unset it")
    rank, world_size = map(int, values.values())
    if world_size > 1 and "0" in (os.environ.get(name) or "0" for name in ("MASTER_ADDR", "MASTER_PORT")):
        raise ValueError(
            f"WORLD_SIZE={world_size} in the environment, but not both of MASTER_ADDR and MASTER_PORT, where the ranks "
            "meet: the launcher sets them, and srun passes them on with --export=ALL"
        )
    device = os.environ.get("DS_ACCELERATOR", "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"DS_ACCELERATOR={device} in the environment: expected cpu or cuda, or unset it")
    return rank, world_size
