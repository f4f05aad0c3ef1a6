"""What launchers tell each process of a run through its environment."""

from __future__ import annotations

import os

_DEFAULTS = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}
_DEVICES = ("cpu", "cuda")


def check_environment() -> int:
    """The number of ranks that the environment tells of: 1 without a launcher.

    Raises ValueError, on each rank that is told nonsense, for numbers that are none or do not go together, and for a kind
    of device that this program has not.
    """
    remedy = "the launcher sets it: start with deepspeed, torchrun or python alone, or unset it"
    numbers = {}
    for name, default in _DEFAULTS.items():
        text = os.environ.get(name, str(default))
        if not (text.isascii() and text.isdigit()):
            raise ValueError(f"{name}={text} in the environment: expected a number from 0 on; {remedy}")
        numbers[name] = int(text)
    rank, world_size, port = numbers["RANK"], numbers["WORLD_SIZE"], numbers["MASTER_PORT"]
    if rank >= world_size:
        raise ValueError(
            f"RANK={rank} in the environment: expected less than WORLD_SIZE, which is {world_size}; {remedy}"
        )
    if port > 65535:
        raise ValueError(f"MASTER_PORT={port} in the environment: expected at most 65535; {remedy}")
    device = os.environ.get("DS_ACCELERATOR", "cpu")
    if device not in _DEVICES:
        raise ValueError(
            f"DS_ACCELERATOR={device} in the environment: expected one of {', '.join(_DEVICES)}, or unset it"
        )
    return world_size
