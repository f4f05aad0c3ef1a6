"""What launchers tell each process of a run through its environment."""

from __future__ import annotations

import os

import psutil

_DEFAULTS = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}
_DEVICES = ("cpu", "cuda")
_REMEDY = "the launcher sets it: start with deepspeed, torchrun or python alone, or unset it"


def check_environment() -> tuple[int, int]:
    """This process's rank and the number of ranks, 0 and 1 without a launcher.

    Raises ValueError, on each rank whose variables are wrong, for what is not a number, numbers that contradict each
    other, ranks that are told no place to meet, a network interface that this host has not, and a kind of device that
    is not supported.
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
                f"WORLD_SIZE={world_size} in the environment, and {name} is not set: the ranks need both to meet; "
                "the launcher sets it, and srun passes it on with --export=ALL"
            )
    interfaces = sorted(psutil.net_if_addrs())
    given = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if given and not set(given.split(",")).issubset(interfaces):
        raise ValueError(
            f"GLOO_SOCKET_IFNAME={given} in the environment: expected a network interface of this host, which has "
            f"{', '.join(interfaces)}"
        )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{name}={text} in the environment: expected a number from 0 on; {_REMEDY}")
    return int(text)
