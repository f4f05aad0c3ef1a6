"""What the ranks compare before a run is built: that they were started alike, read the same, and share the run folder."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from relora_mora.checkpoint import changed_settings
from relora_mora.config import ConfigError
from relora_mora.distributed.collectives import gather_from_ranks
from relora_mora.model.config import plain_model_config
from relora_mora.train.check import Checked

APPEAR_SECONDS = 15.0  # for a file that another host has just written


def check_agreement(checked: Checked) -> None:
    """Raises :class:`ConfigError` on all ranks when one has other settings, or found another model, tokenizer or text; a collective."""
    mine = {
        "the model's settings": json.dumps(plain_model_config(checked.model_config), sort_keys=True),
        "the tokenizer": (checked.tokenizer_fingerprint, checked.tokenizer.eos_token_id),
        "the training data": (checked.data_fingerprint, checked.data_content),
        "the precision that is fast": checked.bf16,
    }
    found = gather_from_ranks((socket.gethostname(), checked.config.model_dump(mode="json"), mine))
    faults = []
    for rank, (host, settings, values) in enumerate(found):
        other = [
            *changed_settings(found[0][1], settings),
            *(what for what, value in values.items() if value != found[0][2][what]),
        ]
        if other:
            faults.append(
                f"rank {rank} ({host}): {', '.join(other)}: not as on the first rank ({found[0][0]}); start all ranks with the same command, "
                "and give all hosts the same files"
            )
    if faults:
        raise ConfigError(faults, "what the ranks found")


def check_shared(file: Path, content: str) -> None:
    """Raises :class:`ConfigError` on all ranks when one does not see a file as the first rank has written it; a collective."""
    deadline = time.monotonic() + APPEAR_SECONDS
    while not (seen := _content(file) == content) and time.monotonic() < deadline:
        time.sleep(0.2)
    missing = [place for place in gather_from_ranks(None if seen else socket.gethostname()) if place is not None]
    if missing:
        raise ConfigError(
            [
                f"train.run_dir: {file.parent} is another folder on {', '.join(dict.fromkeys(missing))}; put it on a file system that all "
                "hosts share"
            ],
            "what the ranks found",
        )


def _content(file: Path) -> Any:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return None
