"""The clock: learning rate, merges and operators as pure functions of ``step``, the number of optimizer steps done.

Nothing here has state, so a resume at any step sees exactly the same as an uninterrupted run. Evaluate the rate of the
next step at ``step + 1``, and what happens at the end of step ``s`` at ``s``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from relora_mora.config.registry import ScheduleKind


def cosine(step: int, *, total_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """A cosine from 1 at ``warmup_steps`` to ``min_ratio`` at ``total_steps``."""
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Schedule:
    """Everything about a run that depends only on ``step`` and the settings.

    ``merge_every=0`` means that the method never merges, and ``merge_until_step=None`` that it merges until the end.
    ``operators`` is the cycle of mora types, empty for other methods. ``decay_steps`` is the length of the linear decay
    at the end of ``wsd``; no other kind uses it.
    """

    kind: ScheduleKind
    total_steps: int
    warmup_steps: int
    min_ratio: float
    decay_steps: int = 0
    merge_every: int = 0
    merge_until_step: int | None = None
    restart_warmup_steps: int = 0
    operators: Sequence[int] = ()

    def envelope(self, step: int) -> float:
        """The multiplier of step ``step`` without restarts."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        total = self.total_steps
        match self.kind:
            case "cosine":
                return cosine(step, total_steps=total, warmup_steps=self.warmup_steps, min_ratio=self.min_ratio)
            case "linear":
                return self._line(step, total - self.warmup_steps)
            case "wsd":
                return self._line(step, self.decay_steps)
            case "constant":
                return 1.0
            case _:
                assert_never(self.kind)

    def _line(self, step: int, length: int) -> float:
        """From 1 to ``min_ratio`` over the last ``length`` steps."""
        left = (self.total_steps - step) / max(1, length)
        return self.min_ratio + (1 - self.min_ratio) * min(1.0, max(0.0, left))

    def rate(self, step: int, *, rewarm: bool = True) -> float:
        """The multiplier of the peak rate in step number ``step`` (the first is 1).

        The step that ends a cycle has the envelope's rate. The n-th step after a merge has n / restart_warmup_steps of
        the envelope at the end of the restart warmup, or of the envelope at this step if the run ends by then. So no
        batch is spent at rate zero, except the last one if ``min_ratio`` is 0.
        """
        merge = self.merges_done(step - 1) * self.merge_every
        since = step - merge
        if not rewarm or not merge or since >= self.restart_warmup_steps:
            return self.envelope(step)
        end = step - since + self.restart_warmup_steps
        return since / self.restart_warmup_steps * self.envelope(step if end >= self.total_steps else end)

    def merge_after(self, step: int) -> bool:
        """Whether there is a merge at the end of step ``step``. Not after the last step, since the export merges."""
        return self.merges_done(step) > self.merges_done(step - 1)

    def merges_done(self, step: int) -> int:
        """The number of merges done after ``step`` steps, including a merge at the end of that step."""
        last = self.total_steps - 1
        if self.merge_until_step is not None:
            last = min(last, self.merge_until_step)
        return max(0, min(step, last)) // self.merge_every if self.merge_every else 0

    def operator(self, step: int) -> int | None:
        """The mora type in use after ``step`` steps and the merge at their end; None without operators."""
        return self._operator_after(self.merges_done(step))

    def operators_left(self, step: int) -> list[int | None]:
        """The mora types in use from ``step`` to the end, each once, in the order of their first use."""
        merges_done = range(self.merges_done(step), self.merges_done(self.total_steps) + 1)
        return list(dict.fromkeys(map(self._operator_after, merges_done)))

    def _operator_after(self, merges_done: int) -> int | None:
        return self.operators[merges_done % len(self.operators)] if self.operators else None
