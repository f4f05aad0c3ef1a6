"""The metrics of a run: counts over an interval of steps, and what is computed from them.

The first rank writes them, one JSON object per line, and passes them on to other loggers.
"""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from relora_mora.config.secrets import redact
from relora_mora.data.errors import SKIP_REASONS
from relora_mora.distributed.collectives import gather_from_ranks
from relora_mora.engine.merging import MergeRecord
from relora_mora.evaluation.generation import Generated
from relora_mora.evaluation.loss import EvalResult
from relora_mora.system.files import append_line, sync, write_synced
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder

SAVED = "perf/checkpoint_stall_seconds"  # in the line of a checkpoint


class Logger(Protocol):
    """Another destination of metrics besides ``metrics.jsonl``, created in ``loggers.py``.

    Each method may raise any exception at any time. The error is reported once, training goes on, and the next
    ``write`` tries again.
    """

    title: str  # in messages

    def open(self, step: int) -> None:
        """A run begins (0) or continues after a step. Later steps will be written again.

        Called before the first ``write``, and again if the run goes back to an earlier step.
        """

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one event, with the tags of docs/metrics.md. Values that are not int or float are text."""

    def close(self) -> None:
        """The process ends. The run may continue in another one."""


class Metrics:
    """Writes ``metrics.jsonl`` in a run folder, and passes the same values to loggers. Begins with :meth:`open`.

    Only the first rank writes: on the others, every call does nothing. A line that cannot be written, such as on a full
    disk, is lost with one message, and training goes on.
    """

    def __init__(self, folder: Path, loggers: Sequence[Logger] = (), *, writes: bool = True) -> None:
        self.path = RunFolder(folder).metrics
        self._writes = writes
        self._loggers = loggers
        self._failing: set[str] = set()

    def open(self, step: int, *, rollback: bool = False) -> None:
        """The run continues after ``step``, at a start or after a ``rollback``.

        Lines of later steps are dropped, because those steps are repeated. A start also drops what was written about
        ``step`` after its checkpoint, such as an evaluation, because it does that again.
        """
        if not self._writes:
            return
        self._to_drop: tuple[int, bool] | None = step, rollback
        self._try(self.path.name, self._drop)
        for logger in self._loggers:
            self._try(logger.title, functools.partial(logger.open, step))

    def _append(self, line: str) -> None:
        self._drop()
        append_line(self.path, line)

    def _drop(self) -> None:
        """Drops what :meth:`open` says; before the next line if the disk was full then."""
        if self._to_drop is None:
            return
        step, rollback = self._to_drop
        before = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else None
        kept = []
        ended = False
        for line in (before or "").splitlines():
            try:
                values = json.loads(line)
                if values["step"] > step or ended:
                    break
                kept.append(line + "\n")
                ended = values["step"] == step and SAVED in values and not rollback
            except (ValueError, KeyError, TypeError):
                log.warning("metrics.jsonl: dropped a damaged line")
        text = "".join(kept)
        if text != before:  # a finished run writes nothing, since the disk may be full
            write_synced(self.path, text)
        self._to_drop = None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one event to the file and to each logger."""
        if not self._writes:
            return
        finite = {
            tag: None if isinstance(value, float) and not math.isfinite(value) else value
            for tag, value in values.items()
        }
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite}, allow_nan=False)
        self._try(self.path.name, functools.partial(self._append, line))
        for logger in self._loggers:
            self._try(logger.title, functools.partial(logger.write, step, values))

    def _try(self, target: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            if target not in self._failing:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                message = redact(" ".join(reason.split()) or type(error).__name__)
                log.error("%s: metrics cannot be written (%s) and will be missing; training goes on", target, message)
            self._failing.add(target)
        else:
            self._failing.discard(target)

    def sync(self) -> None:
        """Makes the lines so far survive a power cut, as checkpoints do, which record what has been evaluated."""
        if self._writes and self.path.exists():
            self._try(self.path.name, functools.partial(sync, self.path))

    def close(self) -> None:
        self.sync()
        for logger in self._loggers:
            with contextlib.suppress(Exception):
                logger.close()


def data_metrics(counts: Mapping[str, int], sources: Sequence[str], sequence_length: int) -> dict[str, int]:
    """What all ranks have read in total and from each source of a mixture; a collective.

    ``retries`` counts since the start of this process, everything else since step 0.
    """
    of_ranks = gather_from_ranks(dict(counts))

    def total(name: str) -> int:
        return sum(int(each.get(name, 0)) for each in of_ranks)

    def slowest(name: str) -> int:
        return min(int(each[name]) for each in of_ranks)

    skipped = {f"perf/data_skipped/{reason}": total(f"skipped/{reason}") for reason in SKIP_REASONS}
    return {
        "train/epoch": slowest("epoch"),
        "train/documents": total("documents"),
        **{f"train/epoch/{source}": slowest(f"epoch/{source}") for source in sources},
        **{f"train/tokens/{source}": total(f"blocks/{source}") * sequence_length for source in sources},
        "perf/data_bad_lines": total("bad"),
        "perf/data_retries": total("retries"),
        **{tag: rows for tag, rows in skipped.items() if rows},
    }


def eval_metrics(results: Mapping[str, EvalResult | Generated]) -> dict[str, float | int | str]:
    """``eval/<name>/loss`` and so on for each set; ``eval/loss`` for the name ""."""
    return {
        f"eval/{name}/{key}" if name else f"eval/{key}": value
        for name, result in results.items()
        for key, value in result.as_dict().items()
    }


def merge_metrics(record: MergeRecord) -> dict[str, Any]:
    """A merge record as metrics: ``merge/delta_norm/q_proj`` and so on."""
    values: dict[str, Any] = {
        "merge/layers": record.layers,
        "merge/zeroed_elements": record.zeroed,
        "merge/seconds": record.seconds,
        "merge/operator_before": record.operator_before,
        "merge/operator_after": record.operator_after,
    }
    values |= {f"merge/delta_norm/{kind}": value for kind, value in record.delta_norm.items()}
    values |= {f"merge/effective_rank/{kind}": value for kind, value in record.effective_rank.items()}
    return {key: value for key, value in values.items() if value is not None}
