"""The record that outlives a run's folder: enough for tables and plots."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from relora_mora.config.yaml_text import parse_yaml
from relora_mora.experiments.study.design import Cell
from relora_mora.experiments.study.folder import StudyFolder
from relora_mora.system.files import write_synced
from relora_mora.system.run_folder import joined_start, read_json_lines

KEPT_LINES = 40  # of training, evenly over the steps, and as many with ranks at merges; all evaluations are kept
OF_TRAINING = ("train/loss", "train/tokens", "perf/tokens_per_second", "perf/peak_memory_gib")
RANKS = "merge/effective_rank/"
NOT_KEPT = ("command", "host")  # of a start, because they are local


def write_records(cells: Sequence[Cell], folder: StudyFolder) -> None:
    """Writes one line for each finished cell, in the order of ``cells``.

    A line has the cell's ``name`` and ``seed``; ``given``, all settings that it was started with; ``config``, these
    settings as the run resolved them; ``start``, the commit, versions and machine of the last start and the ``step`` of
    the first; and ``metrics``, the part of ``metrics.jsonl`` that tables and figures need. Existing lines stay; lines
    of cells outside ``cells`` come last.
    """
    kept = folder.kept()
    new = {cell.name: _record(cell, folder) for cell in cells if cell.name not in kept and folder.has_run(cell)}
    if new:
        records = {**kept, **new}
        names = dict.fromkeys([*(cell.name for cell in cells), *records])
        write_synced(folder.records, "".join(json.dumps(records[name]) + "\n" for name in names if name in records))


def final_metric(record: Mapping[str, Any], metric: str) -> float | None:
    """The metric of the evaluation at the last step of a recorded run; None if it is not finite.

    Raises ValueError if no evaluation has the metric, or if the evaluation of the last step is lost.
    """
    name = record["name"]
    lines = [line for line in record["metrics"] if metric in line]
    if not lines:
        raise ValueError(f"choose: {name} has no evaluation with the metric {metric}; docs/metrics.md lists them")
    step = lines[-1]["step"]
    steps = record["config"]["train"]["steps"]
    if step != steps:
        raise ValueError(
            f"choose: the last {metric} of {name} is from step {step}, but the run has {steps} steps and its last "
            "evaluation is lost; remove its folder, and its line in the records, so that the study repeats the run"
        )
    value: float | None = lines[-1][metric]
    return value


def _record(cell: Cell, folder: StudyFolder) -> dict[str, Any]:
    run = folder.run(cell)
    start = joined_start(read_json_lines(run.starts))
    return {
        "name": cell.name,
        "seed": cell.seed,
        "given": folder.given(cell),
        "config": parse_yaml(run.config.read_text(encoding="utf-8")),
        "start": {key: value for key, value in start.items() if key not in NOT_KEPT},
        "metrics": _thinned(read_json_lines(run.metrics)),
    }


def is_kept(tag: str) -> bool:
    is_result = tag.startswith(("eval/", RANKS)) and tag != "eval/seconds"
    return is_result or tag in (*OF_TRAINING, "merge/layers", "merge/seconds")


def _thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    training = _evenly([number for number, line in enumerate(lines) if "train/loss" in line])
    merges = _evenly([number for number, line in enumerate(lines) if "merge/layers" in line])
    thinned = []
    for number, line in enumerate(lines):
        values = {
            tag: float(f"{value:.8g}") if isinstance(value, float) else value  # float32 has no more digits
            for tag, value in line.items()
            if is_kept(tag)
            and (number in training or tag not in OF_TRAINING)
            and (number in merges or not tag.startswith(RANKS))
        }
        if values:
            thinned.append({"step": line["step"], **values})
    return thinned


def _evenly(numbers: list[int]) -> set[int]:
    every = max(1, -(-len(numbers) // KEPT_LINES))
    return {*numbers[::every], *numbers[-1:]}
