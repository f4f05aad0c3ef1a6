"""Messages between the background threads of the ranks: neither a collective nor a file."""

from __future__ import annotations

import json
import time
from typing import Any

import torch

POLL_SECONDS = 0.05


class Mailbox:
    """Messages in the job's key-value store, which works where a disk is full or cannot be written.

    ``job`` keeps the messages of one writer apart from those of others; it is the same on all ranks.
    """

    def __init__(self, job: str) -> None:
        everyone = torch.distributed.group.WORLD
        assert everyone is not None, "the processes of a run are joined before it is built"
        self._store = torch.distributed.PrefixStore(f"checkpoint/{job}", everyone.get_group_store())

    def send(self, about: str, rank: int, message: dict[str, Any]) -> None:
        self._store.set(f"{about}/{rank}", json.dumps(message))

    def receive(self, about: str, rank: int, deadline: float) -> dict[str, Any] | None:
        """Takes a rank's message from the store; None when there is none by ``deadline`` (of ``time.monotonic``)."""
        key = f"{about}/{rank}"
        while not self._store.check([key]):  # to wait in the store would block its connection for the main thread
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_SECONDS)
        message = json.loads(self._store.get(key))
        self._store.delete_key(key)
        return message
