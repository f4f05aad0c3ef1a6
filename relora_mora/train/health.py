"""Numbers that have gone wrong: steps that no rank made, one after the other, and loss spikes.

What is remembered of the last steps is part of a run's state: a resumed run judges the next step as the run that was
never stopped.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from relora_mora.config import TrainConfig


@dataclass
class Health:
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
