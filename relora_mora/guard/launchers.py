"""The launchers above a process: when one of them is gone, nobody watches over this rank any more."""

from __future__ import annotations

from pathlib import Path

import psutil

_SCRIPTS = ("deepspeed", "torchrun")
_MODULES = ("deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch")


class Launchers:
    """The chain of launchers that started this process: ``deepspeed`` and its ``launch.py``, torchrun. A shell is none."""

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
        """Which launcher has ended, None while all live."""
        for process in self.processes:
            try:
                alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                alive = False
            if not alive:
                return f"pid {process.pid}"
        return None


def is_launcher(command: list[str]) -> bool:
    """Whether a command line is that of a launcher: ``python .../bin/deepspeed ...``, ``python -m torch.distributed.run ...``."""
    for index, argument in enumerate(command[:6]):
        if argument == "-m":
            return index + 1 < len(command) and command[index + 1] in _MODULES
        if not argument.startswith("-") and (index or Path(argument).name in _SCRIPTS):
            path = Path(argument)
            return path.name in _SCRIPTS or any(argument.endswith(f"{module.replace('.', '/')}.py") for module in _MODULES)
    return False
