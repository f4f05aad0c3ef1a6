"""What tasks gave: a table, and lines in the folder of the run that was scored."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from relora_mora.system.disk_errors import disk_faults_named, without_disk_errors
from relora_mora.system.files import append_synced
from relora_mora.system.run_folder import RunFolder

Results = Mapping[str, Mapping[str, float]]


def table(results: Results) -> str:
    rows = [(task, metric, f"{value:.4f}") for task, numbers in results.items() for metric, value in numbers.items()]
    rows = [("task", "metric", "value"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def record(run: Path, step: int, results: Results, *, num_fewshot: int | None, limit: int | None) -> None:
    """Adds a line to ``tasks.jsonl`` of a run folder, and points to its TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    folder = RunFolder(run)
    numbers = {f"tasks/{task}/{metric}": value for task, found in results.items() for metric, value in found.items()}
    how = {"num_fewshot": num_fewshot, "limit": limit}
    append_synced(folder.tasks, json.dumps({"step": step, "time": time.time(), **how, **numbers}))
    shots = "" if num_fewshot is None else f"/{num_fewshot}-shot"
    part = "" if limit is None else f"/first-{limit}"
    threading.excepthook = without_disk_errors
    with disk_faults_named(folder.tensorboard), SummaryWriter(str(folder.tensorboard)) as writer:
        for tag, value in numbers.items():
            writer.add_scalar(f"{tag}{shots}{part}", value, step)
