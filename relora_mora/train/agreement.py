"""Before a run is built: were the ranks started alike, do they read the same, do they share the run folder?"""

from __future__ import annotations

import socket
import time
from pathlib import Path

from relora_mora.config import ConfigError
from relora_mora.distributed import gather_from_ranks, same_on_all_ranks
from relora_mora.train.identity import Identity, unlike

APPEAR_SECONDS = 15.0  # for a file that another host has just written


def check_agreement(identity: Identity) -> None:
    """A collective. Raises :class:`ConfigError` on all ranks when one was given, or has found, other things."""
    found = gather_from_ranks((socket.gethostname(), identity))
    first_host, first = found[0]
    faults = []
    for rank, (host, other) in enumerate(found):
        different = unlike(first, other)
        if different:
            faults.append(
                f"rank {rank} ({host}): {', '.join(different)}: not as on the first rank ({first_host}); "
                "start all ranks with the same command, and give all hosts the same files"
            )
    if faults:
        raise same_on_all_ranks(ConfigError(faults, "what the ranks found"))


def check_shared(file: Path, content: str) -> None:
    """A collective. Raises :class:`ConfigError` on all ranks when one does not see what the first rank wrote."""
    deadline = time.monotonic() + APPEAR_SECONDS
    while not (seen := _content(file) == content) and time.monotonic() < deadline:
        time.sleep(0.2)
    missing = [place for place in gather_from_ranks(None if seen else socket.gethostname()) if place is not None]
    if missing:
        hosts = ", ".join(dict.fromkeys(missing))
        fault = (
            f"train.run_dir: {file.parent} is another folder on {hosts}; put it on a file system that all hosts share"
        )
        raise same_on_all_ranks(ConfigError([fault], "what the ranks found"))


def _content(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return None
