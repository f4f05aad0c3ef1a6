"""What launchers tell each process of a run through its environment."""

from __future__ import annotations

import os

_DEFAULTS = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}
_DEVICES = ("cpu", "cuda")
_REMEDY = "the launcher sets it: start with deepspeed, torchrun or python alone, or unset it"


def check_environment() -> tuple[int, int]:
    """This process's rank and the number of ranks, 0 and 1 without a launcher.

    Raises ValueError, on each rank whose variables are wrong, for what is not a number, numbers that contradict each
    other, and a kind of device that is not supported.
    """
    numbers = {name: _number(name, default) for name, default in _DEFAULTS.items()}
    rank = numbers["RANK"]
    world_size = numbers["WORLD_SIZE"]
    port = numbers["MASTER_PORT"]
    if rank >= world_size:
        raise ValueError(
            f"RANK={rank} in the environment: expected less than WORLD_SIZE, which is {world_size}; {_REMEDY}"
        )
    if port > 65535:
        raise ValueError(f"MASTER_PORT={port} in the environment: expected at most 65535; {_REMEDY}")
    device = os.environ.get("DS_ACCELERATOR", "cpu")
    if device not in _DEVICES:
        raise ValueError(
            f"DS_ACCELERATOR={device} in the environment: expected one of {', '.join(_DEVICES)}, or unset it"
        )
    return rank, world_size


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{name}={text} in the environment: expected a number from 0 on; {_REMEDY}")
    return int(text)
