"""Run folders with made-up metrics."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relora_mora.config.load import dump, validate
from relora_mora.experiments.compare.runs import Run, read_run
from relora_mora.system.run_folder import RunFolder
from tests.tools.config_tools import tree

STEPS = 40
EVALUATED = 10
MERGED = 20
TOKENS = 8 * 16  # of a step
PARAMETERS = {"total": 1_000_000, "trainable": 1_234_567, "adapters": 54_321, "frozen": 5}


def write_run(
    folder: Path,
    losses: Sequence[float],
    *,
    sets: Sequence[str] = (),
    digest: str | None = None,
    step_seconds: float = 2.0,
    **sections: dict[str, Any],
) -> Path:
    """A run of 40 steps with one line each, and an evaluation every 10 steps with the next loss; without ``sets`` the
    set has no name. With fewer than five losses the run is unfinished. ``digest``: of the scored text."""
    settings: dict[str, dict[str, Any]] = {
        "data": {"sequence_length": 16},
        "method": {"rank": 4, "merge_every": MERGED},
        "optim": {"warmup_steps": 2, "restart_warmup_steps": 2},
        "train": {"run_dir": str(folder), "steps": STEPS, "batch_size": 8, "micro_batch_size": 8},
    }
    for section, values in sections.items():
        settings[section] = {**settings.get(section, {}), **values}
    config = validate(tree(**settings), "the test")
    lines = []
    for step in range((len(losses) - 1) * EVALUATED + 1):
        if step:
            if config.method.merges and step == MERGED:
                lines.append(
                    {"step": step, "merge/layers": 3, "merge/seconds": 5.0} | {"merge/effective_rank/q_proj": 7.5}
                )
            lines.append(_training(step, step_seconds))
        if step % EVALUATED == 0:
            lines.append({"step": step, **_evaluation(losses[step // EVALUATED], sets, digest)})
    files = RunFolder(folder)
    folder.mkdir(parents=True)
    files.config.write_text(dump(config))
    files.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files.starts.write_text(json.dumps({"step": 0, "parameters": PARAMETERS}) + "\n")
    return folder


def _training(step: int, step_seconds: float) -> dict[str, Any]:
    return {
        "step": step,
        "train/loss": 100.0 - step,
        "train/lr": 1e-3 / step,
        "train/tokens": step * TOKENS,
        "perf/tokens_per_second": TOKENS / step_seconds,
        "perf/peak_memory_gib": 1.0 + step / 100,
    }


def _evaluation(loss: float, sets: Sequence[str], digest: str | None) -> dict[str, Any]:
    scored = {"tokens": 500} if digest is None else {"tokens": 500, "digest": digest}
    found: dict[str, Any] = {"eval/loss": loss} | {f"eval/{name}/loss": loss + n for n, name in enumerate(sets)}
    for of_set in ("eval", *(f"eval/{name}" for name in sets)):
        found |= {f"{of_set}/{name}": value for name, value in scored.items()}
    return found


def made_run(folder: Path, losses: Sequence[float] = (9.0, 4.0, 3.0, 2.0, 1.0), **given: Any) -> Run:
    return read_run(write_run(folder, losses, **given))
