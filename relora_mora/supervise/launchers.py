"""The launchers of a process: the variables that they set in its environment, and whether they are still alive.

The kernel can signal a process when its parent dies (PR_SET_PDEATHSIG). But that only works for the direct parent, not
for ``deepspeed`` above its ``launch.py``, and not for a parent that died before the process could ask for the signal.
Both cases need the chain of ancestors, which includes the direct parent.
"""

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

    It also notices a launcher that was killed earlier, because the launcher's child is now a child of process 1.
    """

    def __init__(self) -> None:
        self.processes: list[psutil.Process] = []
        self._missing: str | None = None
        child = psutil.Process()
        # DeepSpeed adds --local_rank, and torchrun sets the variable
        has_launcher = "TORCHELASTIC_RUN_ID" in os.environ or any(word.startswith("--local_rank") for word in sys.argv)
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
        """The launcher that has ended; None while all are alive."""
        for process in self.processes:
            try:
                alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                alive = False
            if not alive:
                return f"pid {process.pid}"
        return self._missing


def is_launcher(command: list[str]) -> bool:
    """Whether a launcher has this command line: ``python .../bin/deepspeed``, ``python -m torch.distributed.run``."""
    for index, argument in enumerate(command[:6]):
        if argument == "-m":
            return index + 1 < len(command) and command[index + 1] in _MODULES
        name = Path(argument).name
        if not argument.startswith("-") and (index > 0 or name in _SCRIPTS):  # the first argument is the interpreter
            return name in _SCRIPTS or argument.endswith(_FILES)
    return False


def _started_by_deepspeed(command: list[str]) -> bool:
    """Whether a launch.py is a child of ``deepspeed`` on this host: then its only host is ``localhost``."""
    for argument in command:
        if argument.startswith("--world_info="):
            try:
                return b'"localhost"' in base64.urlsafe_b64decode(argument.partition("=")[2])
            except ValueError:
                return False
    return False


def _is_orphan(process: psutil.Process) -> bool:
    """Whether the parent has died: Linux then makes process 1 the parent."""
    try:
        return process.pid != 1 and process.ppid() == 1
    except psutil.Error:
        return False


_DEVICES = ("cpu", "cuda")


def check_environment() -> tuple[int, int]:
    """This process's rank and the number of ranks; 0 and 1 without a launcher.

    Raises ValueError on each rank whose variables are wrong: for values that are not numbers, a missing address or
    port, a network interface that this host does not have, and an unsupported device.
    """
    rank = _number("RANK", 0)
    world_size = _number("WORLD_SIZE", 1)
    if world_size > 1:
        _check_meeting(world_size)
    device = os.environ.get("DS_ACCELERATOR", "cpu")
    if device not in _DEVICES:
        raise ValueError(
            f"DS_ACCELERATOR={device} in the environment: expected one of {', '.join(_DEVICES)}, or unset it"
        )
    return rank, world_size


def _check_meeting(world_size: int) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if os.environ.get(name, "") in ("", "0"):
            raise ValueError(
                f"WORLD_SIZE={world_size} in the environment, but {name} is not set: the ranks need both to meet; "
                "the launcher sets it, and srun passes it on with --export=ALL"
            )
    interfaces = sorted(psutil.net_if_addrs())
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if chosen and not set(chosen.split(",")).issubset(interfaces):
        raise ValueError(
            f"GLOO_SOCKET_IFNAME={chosen} in the environment: expected a network interface of this host, which has "
            f"{', '.join(interfaces)}"
        )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise ValueError(
            f"{name}={text} in the environment: expected a number of 0 or more; the launcher sets it: start with "
            "deepspeed, torchrun or plain python, or unset it"
        )
    return int(text)
