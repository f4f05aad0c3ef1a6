"""How long a start takes, part by part: one line in the log, and once in the metrics."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

from relora_mora.data import Batch
from relora_mora.supervise.launchers import Launchers
from relora_mora.system.logs import log
from relora_mora.train.loop import Trainer


class Startup:
    """Seconds of each part on this rank, from the start of the command to the end of the first step.

    ``launcher``: until this process began; ``imports``: Python, imports and settings; ``rendezvous``: the ranks meet;
    ``checks``: settings, tokenizer, hub; ``model``: initial weights; ``engine``: DeepSpeed; ``resume``: the checkpoint; ``data``:
    run folder and first batch; ``evaluation``: the one at the start; ``first_step``. The command is this host's launcher.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        age = _age_of_interpreter()
        with contextlib.suppress(OSError, ValueError):  # no launcher, or it is gone already
            self.seconds["launcher"] = max(_age(process.pid) for process in Launchers().processes) - age
        self._last = time.monotonic() - age

    def done(self, part: str) -> None:
        """A part is finished, which began where the one before ended."""
        now = time.monotonic()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        parts = {f"startup/{part}_seconds": seconds for part, seconds in self.seconds.items()}
        return {**parts, "startup/seconds": sum(self.seconds.values())}

    def __str__(self) -> str:
        parts = ", ".join(f"{part.replace('_', ' ')} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s from the command to the end of the first step: {parts}"


class StartedTrainer(Trainer):
    """A trainer that reports the start when its first step is made."""

    startup: Startup | None = None

    def evaluate(self) -> bool:
        good = super().evaluate()
        if self.startup is not None:
            self.startup.done("evaluation")
        return good

    def next_batch(self) -> Batch | None:
        batch = super().next_batch()
        if self.startup is not None:
            self.startup.done("data")
        return batch

    def train_step(self, batch: Batch) -> None:
        super().train_step(batch)
        if self.startup is not None:
            self.startup.done("first_step")
            self.write(self.startup.metrics())
            log.info("start: %s", self.startup)
            self.startup = None


def _age_of_interpreter() -> float:
    """Seconds since Python loaded its logging module, one of its first. The age of the process may be hours more: a shell
    that ends with ``exec`` hands its process on."""
    return logging.makeLogRecord({}).relativeCreated / 1000


def _age(pid: int) -> float:
    """Seconds since a process of this host was started."""
    after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
