"""What is kept of a run when its folder is gone: enough for tables, plots, and to run it again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence, Set
from typing import Any

from relora_mora.config.yaml_text import parse_yaml
from relora_mora.experiments.study.design import Cell
from relora_mora.experiments.study.folder import StudyFolder
from relora_mora.system.files import write_synced
from relora_mora.system.run_folder import CHANGES, NOTED, changes_since_first, noted_digests, read_json_lines

KEPT_LINES = 40  # of a run's training, evenly over its steps, and of what merges did; evaluations are kept whole
SPEED = "perf/tokens_per_second"
OF_TRAINING = ("train/loss", "train/lr", "train/tokens", SPEED, "perf/peak_memory_gib")
OF_ALL_MERGES = ("merge/layers", "merge/seconds")
NO_RESULTS = ("seconds", "/digest", "/answers")  # time; what was scored, which earlier versions did not note
DIGITS = 8  # of a float; float32 has no more


def write_records(cells: Sequence[Cell], folder: StudyFolder) -> int:
    """Writes a line for each cell that is done, by the order given; returns how many.

    A line has the cell's ``name`` and ``seed``, ``given`` (all settings that it was begun with), ``config`` (the same,
    as the run settled them), ``start`` (commit, versions and machine of the last start, without the command, which
    names places of the machine; the ``step`` of the first) and ``metrics``, lines of ``metrics.jsonl`` without the
    clock. Lines that are there already stay, also those that name none of the cells; they come last.
    """
    kept = folder.kept()
    new = {cell.name: _record(cell, folder) for cell in cells if cell.name not in kept and folder.has_run(cell)}
    named = {cell.name: None for cell in cells}
    found = {**kept, **new}
    lines = [json.dumps(found[name]) + "\n" for name in {**named, **found} if name in found]
    write_synced(folder.records, "".join(lines))
    return len(found.keys() & named)


def final_metric(cell: Cell, folder: StudyFolder, metric: str) -> float | None:
    """The metric of the evaluation at the end; None where it is not finite, or the run is not done.

    Raises ValueError where no evaluation has it, or that of the last step is lost.
    """
    if not folder.is_done(cell):
        return None
    run = folder.run(cell)
    if folder.has_run(cell):
        config = parse_yaml(run.config.read_text(encoding="utf-8"))
        lines = read_json_lines(run.metrics)
    else:
        config, lines = (folder.kept()[cell.name][key] for key in ("config", "metrics"))
    found = [line for line in lines if metric in line]
    if not found:
        raise ValueError(f"choose: no line of {run.metrics} has a number {metric}; docs/metrics.md lists them")
    last = found[-1]
    if last["step"] != config["train"]["steps"]:
        raise ValueError(
            f"choose: the last {metric} of {run.metrics} is of step {last['step']}, and that of the end, step "
            f"{config['train']['steps']}, is lost; remove {run.path}, and its line, if any, in {folder.records}: "
            "the study makes the run again"
        )
    return None if last[metric] is None else float(last[metric])


def differences(cell: Cell, first: StudyFolder, second: StudyFolder) -> tuple[int, list[str]]:
    """Compares the numbers of a run in two folders that do not depend on the clock.

    Where the first has no more than a record of it, those that records keep. Returns how many the first has, and a line
    for each that is not exactly the same in the second.
    """
    if first.has_run(cell):
        numbers, others = (_numbers(read_json_lines(folder.run(cell).metrics)) for folder in (first, second))
    else:
        numbers = _numbers(first.kept()[cell.name]["metrics"])
        others = _numbers(_record(cell, second)["metrics"])
    return len(numbers), [
        f"{tag} at step {step}: {numbers.get((step, tag))} and {others.get((step, tag))}"
        for step, tag in sorted({*numbers, *others})
        if numbers.get((step, tag)) != others.get((step, tag))
    ]


def _numbers(lines: Iterable[dict[str, Any]]) -> dict[tuple[int, str], Any]:
    return {
        (line["step"], tag): value
        for line in lines
        for tag, value in line.items()
        if tag.partition("/")[0] in ("train", "eval", "merge") and not tag.endswith(NO_RESULTS)
    }


def _record(cell: Cell, folder: StudyFolder) -> dict[str, Any]:
    run = folder.run(cell)
    starts = read_json_lines(run.starts)
    start = {**starts[-1], "step": starts[0]["step"]}
    if digests := noted_digests(starts):
        start[NOTED] = digests
    if changes := changes_since_first(starts):
        start[CHANGES] = changes
    return {
        "name": cell.name,
        "seed": cell.seed,
        "given": folder.given(cell),
        "config": parse_yaml(run.config.read_text(encoding="utf-8")),
        "start": {key: value for key, value in start.items() if key != "command"},
        "metrics": _thinned(read_json_lines(run.metrics), starts[0]["step"]),
    }


def _thinned(lines: list[dict[str, Any]], begin: int) -> list[dict[str, Any]]:
    training = _evenly([number for number, line in enumerate(lines) if "train/loss" in line])
    speeds = _speeds_over_gaps(lines, training, begin)
    merges = _evenly([number for number, line in enumerate(lines) if "merge/layers" in line])
    result = []
    for number, line in enumerate(lines):
        values = {
            tag: _rounded(value)
            for tag, value in {**line, **speeds.get(number, {})}.items()
            if tag.startswith("eval/")
            or (tag.startswith("merge/") and (number in merges or tag in OF_ALL_MERGES))
            or (number in training and tag in OF_TRAINING)
        }
        if values:
            result.append({"step": line["step"], **values})
    return result


def _speeds_over_gaps(lines: list[dict[str, Any]], kept: Set[int], begin: int) -> dict[int, dict[str, float]]:
    """Tokens per second of each line that is kept over all steps since the one before, so that times add up."""
    found = {}
    before = last_kept = begin
    steps_over_speed = 0.0
    for number, line in enumerate(lines):
        if not line.get(SPEED):
            continue
        steps_over_speed += (line["step"] - before) / line[SPEED]
        before = line["step"]
        if number in kept and steps_over_speed:
            found[number] = {SPEED: (before - last_kept) / steps_over_speed}
            last_kept = before
            steps_over_speed = 0.0
    return found


def _evenly(numbers: list[int]) -> set[int]:
    every = max(1, -(-len(numbers) // KEPT_LINES))
    return {*numbers[::every], *numbers[-1:]}


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
