"""The state of a run besides its tensors, its form in a checkpoint, and the errors that end a run."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from relora_mora.checkpoint.layout import Manifest
from relora_mora.distributed.collectives import sum_over_hosts


class TrainingError(RuntimeError):
    """A run cannot continue. The message is for the user, and the same on all ranks."""

    same_on_all_ranks = True


class DataError(ValueError):
    """The data of some rank cannot be read. What was trained before is saved."""

    same_on_all_ranks = True


@dataclass
class Interval:
    """Counts since the last line of metrics."""

    loss: float = 0.0  # float64, of this rank; summed over the steps that were applied
    good_steps: int = 0
    grad_norm: float = 0.0
    # only of this process, including skipped steps
    steps: int = 0
    last_loss: float = math.nan  # of the last step, of this rank; NaN if it was skipped
    step_seconds: float = 0.0
    data_seconds: float = 0.0
    data_counts: dict[str, int] = field(default_factory=dict)  # read so far by this rank

    def dump(self, world_size: int) -> dict[str, Any]:
        """The part that a checkpoint keeps, independent of the number of ranks; a collective."""
        [loss] = sum_over_hosts([self.loss])
        return {"loss": loss / world_size, "good_steps": self.good_steps, "grad_norm": self.grad_norm}


@dataclass(frozen=True)
class Best:
    """The best value so far of ``checkpoint.keep_best``. ``digest`` says what it is comparable with: that of the scored
    tokens, or the few-shot rows and the limit of tasks, if any."""

    metric: str
    value: float
    step: int
    digest: str | None


# fields of a RunState that a checkpoint keeps as they are
_COUNTERS = ("initial_seed", "tokens", "skipped_steps", "rollbacks", "bad_steps", "bad_data")


@dataclass
class RunState:
    """The progress of a run: everything that a resumed run needs to continue as if it had never stopped.

    ``data`` has the positions of the lanes in the training data: those of this rank, or those of all ranks if the state
    has just been loaded.
    """

    initial_seed: int  # of the weights at step 0 of this run, or of the run whose checkpoint it began with
    step: int = 0  # optimizer steps done, including those skipped for bad numbers
    tokens: int = 0
    skipped_steps: int = 0
    rollbacks: int = 0  # of this run
    bad_steps: int = 0  # in a row, up to the current step
    bad_data: list[str] = field(default_factory=list)  # descriptions of the bad steps' data
    interval: Interval = field(default_factory=Interval)
    data: dict[str, Any] = field(default_factory=dict)
    saved: int | None = None  # the step of the newest checkpoint in the run folder
    loaded: Manifest | None = field(default=None, compare=False)  # of the checkpoint that it was loaded from
    evaluated: int | None = None  # the step of the last evaluation
    best: Best | None = None

    def dump(self, world_size: int) -> dict[str, Any]:
        """The ``counters`` of a checkpoint's manifest; a collective."""
        return {
            **{name: getattr(self, name) for name in _COUNTERS},
            "interval": self.interval.dump(world_size),
            "evaluated": self.evaluated == self.step,
            "best": None if self.best is None else asdict(self.best),
        }

    @staticmethod
    def load(manifest: Manifest, *, own: bool) -> "RunState":
        """The state in a checkpoint. ``own``: it is in this run's folder, so its step counts as saved."""
        counters = manifest.counters
        state = RunState(
            **{name: counters[name] for name in _COUNTERS},
            step=manifest.step,
            interval=Interval(**counters["interval"]),
            data=manifest.data_state,
            loaded=manifest,
        )
        if not own:  # its evaluations, and the checkpoints to go back to, are in another folder
            return replace(state, rollbacks=0, bad_steps=0, bad_data=[])
        evaluated = state.step if counters["evaluated"] else None
        best = counters["best"]
        return replace(state, saved=state.step, evaluated=evaluated, best=best and Best(**best))
