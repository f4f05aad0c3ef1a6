"""The launchers above a process: when one of them is gone, nobody watches over this rank any more.

The kernel can signal a process whose parent dies (PR_SET_PDEATHSIG), but only the direct parent: not ``deepspeed``
above its ``launch.py``, and not a parent that died before the process could ask for the signal. Both need the chain of
processes that is looked at here, and that covers the direct parent as well.
"""

from __future__ import annotations

import base64
import os
import sys
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
    """The launchers that started this process: ``deepspeed`` and its ``launch.py``, or torchrun. A shell is not one.

    A launcher that was killed before this object was made is noticed too: what it started is now a child of process 1.
    """

    def __init__(self) -> None:
        self.processes: list[psutil.Process] = []
        self._missing: str | None = None
        child = psutil.Process()
        has_launcher = _started_by_launcher(sys.argv)
        for parent in child.parents():
            try:
                command = parent.cmdline()
            except psutil.Error:
                break
            if not is_launcher(command):
                break
            self.processes.append(parent)
            child = parent
            has_launcher = _started_by_deepspeed(command)
        if has_launcher and _is_orphan(child):
            self._missing = f"it had started pid {child.pid}"

    def gone(self) -> str | None:
        """Which launcher has ended, None while all are alive."""
        for process in self.processes:
            try:
                alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                alive = False
            if not alive:
                return f"pid {process.pid}"
        return self._missing


def is_launcher(command: list[str]) -> bool:
    """Whether a command line is a launcher's: ``python .../bin/deepspeed ...``, ``python -m torch.distributed.run``."""
    for index, argument in enumerate(command[:6]):
        if argument == "-m":
            return index + 1 < len(command) and command[index + 1] in _MODULES
        name = Path(argument).name
        if not argument.startswith("-") and (index > 0 or name in _SCRIPTS):  # the first is the interpreter
            return name in _SCRIPTS or argument.endswith(_FILES)
    return False


def _started_by_launcher(arguments: list[str]) -> bool:
    """Whether a rank is a child of a launcher: DeepSpeed's adds ``--local_rank``, torchrun sets a variable."""
    return "TORCHELASTIC_RUN_ID" in os.environ or any(argument.startswith("--local_rank") for argument in arguments)


def _started_by_deepspeed(command: list[str]) -> bool:
    """Whether a launch.py is a child of ``deepspeed`` on this host: then it is given ``localhost`` as the only host."""
    for argument in command:
        if argument.startswith("--world_info="):
            try:
                return b'"localhost"' in base64.urlsafe_b64decode(argument.partition("=")[2])
            except ValueError:
                return False
    return False


def _is_orphan(process: psutil.Process) -> bool:
    """Whether the parent has died: Linux makes its children those of process 1."""
    try:
        return process.pid != 1 and process.ppid() == 1
    except psutil.Error:
        return False
