"""The launchers above a process: when one of them is gone, nobody watches over this rank any more."""

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


class Launchers:
    """The chain of launchers that started this process: ``deepspeed`` and its ``launch.py``, torchrun. A shell is none.

    A launcher that was killed before this object was made is missed too: what it started has become a child of process 1.
    """

    def __init__(self) -> None:
        self.processes: list[psutil.Process] = []
        self.missing: str | None = None
        below, started = psutil.Process(), _started_by_launcher(sys.argv)
        for parent in below.parents():
            try:
                command = parent.cmdline()
            except psutil.Error:
                break
            if not is_launcher(command):
                break
            self.processes.append(parent)
            below, started = parent, _started_by_deepspeed(command)
        if started and _is_orphan(below):
            self.missing = f"it had started pid {below.pid}"

    def gone(self) -> str | None:
        """Which launcher has ended, None while all live."""
        for process in self.processes:
            try:
                alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                alive = False
            if not alive:
                return f"pid {process.pid}"
        return self.missing


def _started_by_launcher(arguments: list[str]) -> bool:
    """Whether a rank is a child of a launcher: DeepSpeed's adds ``--local_rank``, torchrun sets a variable."""
    return "TORCHELASTIC_RUN_ID" in os.environ or any(argument.startswith("--local_rank") for argument in arguments)


def _started_by_deepspeed(command: list[str]) -> bool:
    """Whether a launch.py is a child of the ``deepspeed`` command on this host: then its list of hosts is just ``localhost``."""
    for argument in command:
        if argument.startswith("--world_info="):
            try:
                return b'"localhost"' in base64.urlsafe_b64decode(argument.partition("=")[2])
            except ValueError:
                return False
    return False


def _is_orphan(process: psutil.Process) -> bool:
    """Whether the parent has died: Linux gives its children to process 1."""
    try:
        return process.pid != 1 and process.ppid() == 1
    except psutil.Error:
        return False


def is_launcher(command: list[str]) -> bool:
    """Whether a command line is that of a launcher: ``python .../bin/deepspeed ...``, ``python -m torch.distributed.run ...``."""
    for index, argument in enumerate(command[:6]):
        if argument == "-m":
            return index + 1 < len(command) and command[index + 1] in _MODULES
        if not argument.startswith("-") and (index or Path(argument).name in _SCRIPTS):
            path = Path(argument)
            return path.name in _SCRIPTS or any(
                argument.endswith(f"{module.replace('.', '/')}.py") for module in _MODULES
            )
    return False
