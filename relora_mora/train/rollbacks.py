"""What a run remembers of its rollbacks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relora_mora.system.run_folder import RunFolder


@dataclass(frozen=True)
class Rollback:
    """The run went back from ``at`` to the checkpoint of ``step``, and on with the data behind ``at``."""

    step: int
    at: int
    reason: str
    data_state: dict[str, Any]  # of all lanes


def read_rollbacks(folder: Path) -> list[Rollback]:
    """The rollbacks of a run, oldest first. Raises ValueError when the file does not hold what :func:`dump_rollbacks` gives."""
    path = RunFolder(folder).rollbacks
    if not path.exists():
        return []
    try:
        return [Rollback(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); it says which data to skip: restore it, or move it away to read that data again"
        ) from error


def dump_rollbacks(rollbacks: list[Rollback]) -> str:
    return json.dumps([asdict(rollback) for rollback in rollbacks], indent=1) + "\n"
