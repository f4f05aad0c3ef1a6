"""What a run remembers besides its tensors, how a checkpoint holds it, and the errors that end a run.

The memory of the last steps is part of the state: a resumed run judges its next step as if it had never stopped.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from relora_mora.checkpoint.layout import Manifest
from relora_mora.config.schema import TrainConfig
from relora_mora.engine.merging import MergeRecord
from relora_mora.train.log.report import Interval


class TrainingError(RuntimeError):
    """A run that cannot go on; the reason is for the user, and the same on all ranks."""

    same_on_all_ranks = True


class DataError(ValueError):
    """The data of some rank cannot be read; what was trained before is saved."""

    same_on_all_ranks = True


class MemoryShortage(ValueError):
    """Settings that ask for more memory than there is."""


@dataclass
class StabilityState:
    """What the last steps looked like. ``losses`` are those of the last ``spike_window`` good steps, oldest first."""

    losses: list[float] = field(default_factory=list)
    spikes: int = 0  # in a row, up to the present one
    bad_steps: int = 0  # in a row, up to the present one
    bad_data: list[str] = field(default_factory=list)  # theirs, in words

    def bad(self, data: list[str]) -> int:
        """A step was not made; returns how many in a row."""
        self.bad_steps += 1
        self.bad_data = [*self.bad_data, *data]
        return self.bad_steps

    def good(self) -> None:
        self.bad_steps = 0
        self.bad_data = []

    def begin_window(self) -> None:
        """What comes is not to be judged by what was: the text is another."""
        self.losses = []
        self.spikes = 0

    def spike(self, loss: float, config: TrainConfig) -> float | None:
        """How many standard deviations a loss lies above the window's mean, if those are too many.

        Else the loss joins the window, if it is a number: a step without scored tokens has none. A quarter of the
        window must be there before anything is judged; after as many spikes in a row the loss has another level, and
        the window begins anew.
        """
        if not math.isfinite(loss):
            return None
        quarter = config.spike_window // 4
        if len(self.losses) >= quarter:
            mean = statistics.fmean(self.losses)
            deviation = max(statistics.stdev(self.losses, mean), 1e-6 * abs(mean))
            height = (loss - mean) / deviation
            if height > config.spike_deviations:
                self.spikes += 1
                if self.spikes >= quarter:  # which may have become less at a resume
                    self.begin_window()
                return height
        self.spikes = 0
        self.losses = [*self.losses, loss][-config.spike_window :]
        return None


@dataclass
class RunState:
    """Where a run stands. Everything that a resumed run needs to go on as if it had never been stopped.

    ``data`` says where the lanes stand in the training data: those of this rank, or of all ranks when the state has
    just been loaded.
    """

    initial_seed: int  # of the weights at step 0 of this run, or of the one whose checkpoint it began with
    step: int = 0  # optimizer steps done, those skipped for bad numbers included
    tokens: int = 0
    skipped_steps: int = 0
    rollbacks: int = 0  # of this run
    health: StabilityState = field(default_factory=StabilityState)
    interval: Interval = field(default_factory=Interval)
    trouble: str | None = None  # why the run must go back to an earlier checkpoint
    data: dict[str, Any] = field(default_factory=dict)
    saved: int | None = None  # the step of the newest checkpoint in the run folder
    evaluated: int | None = None  # the step of the last evaluation
    made_up: MergeRecord | None = None  # the merge of this step, where it was made when the state was loaded

    def dump(self, world_size: int) -> dict[str, Any]:
        """The ``counters`` of a checkpoint's manifest; a collective."""
        return {
            "initial_seed": self.initial_seed,
            "tokens": self.tokens,
            "skipped_steps": self.skipped_steps,
            **asdict(self.health),
            "trouble": self.trouble,
            "interval": self.interval.dump(world_size),
            "rollbacks": self.rollbacks,
            "evaluated": self.evaluated == self.step,
        }

    @staticmethod
    def load(manifest: Manifest, *, own: bool) -> RunState:
        """The state that a checkpoint holds. ``own``: it is one of this run's folder, so its step is saved there."""
        counters = manifest.counters
        health = StabilityState(**{key: counters[key] for key in ("losses", "spikes", "bad_steps", "bad_data")})
        if not own:
            health.good()  # what was bad, and the way back, are in another folder
        step = manifest.step
        return RunState(
            initial_seed=counters["initial_seed"],
            step=step,
            tokens=counters["tokens"],
            skipped_steps=counters["skipped_steps"],
            rollbacks=counters["rollbacks"] if own else 0,
            health=health,
            interval=Interval(**counters["interval"]),
            trouble=counters["trouble"] if own else None,
            data=manifest.data_state,
            saved=step if own else None,
            evaluated=step if own and counters["evaluated"] else None,
        )
