"""What a run remembers beside its tensors, and how a checkpoint holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from relora_mora.checkpoint import Manifest
from relora_mora.merging import MergeRecord
from relora_mora.train.health import Health
from relora_mora.train.report import Interval


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
    health: Health = field(default_factory=Health)
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
        health = Health(**{key: counters[key] for key in ("losses", "spikes", "bad_steps", "bad_data")})
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
