"""The state of a run besides its tensors, its form in a checkpoint, and the errors that end a run."""

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from relora_mora.checkpoint.layout import Manifest
from relora_mora.config.schema import TrainConfig
from relora_mora.distributed.collectives import sum_over_hosts


class TrainingError(RuntimeError):
    """A run cannot continue. The message is for the user, and the same on all ranks."""

    same_on_all_ranks = True


class DataError(ValueError):
    """The data of some rank cannot be read. What was trained before is saved."""

    same_on_all_ranks = True


@dataclass
class StabilityState:
    """A summary of the last steps, so that a resumed run judges its next step as if it had never stopped.

    ``losses`` has the last ``spike_window`` good steps, oldest first.
    """

    losses: list[float] = field(default_factory=list)
    spikes: int = 0  # in a row, up to the current step
    bad_steps: int = 0  # in a row, up to the current step
    bad_data: list[str] = field(default_factory=list)  # descriptions of the bad steps' data

    def bad(self, data: list[str]) -> None:
        """Records a skipped step."""
        self.bad_steps += 1
        self.bad_data = [*self.bad_data, *data]

    def good(self) -> None:
        self.bad_steps = 0
        self.bad_data = []

    def begin_window(self) -> None:
        """Forgets the losses so far, because the text changes."""
        self.losses = []
        self.spikes = 0

    def spike(self, loss: float, config: TrainConfig) -> float | None:
        """How many standard deviations a loss lies above the window's mean, if that is a spike; else None.

        A loss that is not a spike joins the window, unless it is NaN: a step without scored tokens has no loss. Nothing
        is a spike until the window is a quarter full. After that many spikes in a row, the loss has reached another
        level, and the window starts again.
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
                if self.spikes >= quarter:  # a resume may have lowered spike_window
                    self.begin_window()
                return height
        self.spikes = 0
        self.losses = [*self.losses, loss][-config.spike_window :]
        return None


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
    """The best value so far of ``checkpoint.keep_best``. ``digest`` is that of the tokens it is about, if any."""

    metric: str
    value: float
    step: int
    digest: str | None


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
    health: StabilityState = field(default_factory=StabilityState)
    interval: Interval = field(default_factory=Interval)
    data: dict[str, Any] = field(default_factory=dict)
    saved: int | None = None  # the step of the newest checkpoint in the run folder
    loaded: Manifest | None = field(default=None, compare=False)  # of the checkpoint that it was loaded from
    evaluated: int | None = None  # the step of the last evaluation
    best: Best | None = None

    def dump(self, world_size: int) -> dict[str, Any]:
        """The ``counters`` of a checkpoint's manifest; a collective."""
        return {
            "initial_seed": self.initial_seed,
            "tokens": self.tokens,
            "skipped_steps": self.skipped_steps,
            **asdict(self.health),
            "interval": self.interval.dump(world_size),
            "rollbacks": self.rollbacks,
            "evaluated": self.evaluated == self.step,
            "best": None if self.best is None else asdict(self.best),
        }

    @staticmethod
    def load(manifest: Manifest, *, own: bool) -> "RunState":
        """The state in a checkpoint. ``own``: it is in this run's folder, so its step counts as saved."""
        counters = manifest.counters
        health = StabilityState(**{key: counters[key] for key in ("losses", "spikes", "bad_steps", "bad_data")})
        if not own:
            health.good()  # its bad steps, and the checkpoints to go back to, are in another folder
        step = manifest.step
        best = counters.get("best")  # release 0.2 had none
        return RunState(
            initial_seed=counters["initial_seed"],
            step=step,
            tokens=counters["tokens"],
            skipped_steps=counters["skipped_steps"],
            rollbacks=counters["rollbacks"] if own else 0,
            health=health,
            interval=Interval(**counters["interval"]),
            data=manifest.data_state,
            saved=step if own else None,
            loaded=manifest,
            evaluated=step if own and counters["evaluated"] else None,
            best=Best(**best) if own and best else None,
        )
