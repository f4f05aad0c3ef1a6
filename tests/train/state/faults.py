"""Runs whose losses are made wrong at chosen batches."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from relora_mora.system.run_folder import read_json_lines
from tests.tools.runs import Stopped, checkpoint_at, manifest_at, run_config, tensors


def faulty(
    config: Any,
    factors: dict[int, float],
    rank: int = 1,
    *,
    added: dict[int, float] | None = None,
    drop: tuple[int, ...] = (),
    stop_at: tuple[int, int] | None = None,
) -> str:
    """Trains on every rank, with the loss of ``rank`` multiplied at some global batches (numbered from 1, in the order
    of the stream).

    What is ``added`` to the loss changes no gradient. ``drop`` leaves batches out of the stream; ``stop_at``
    (rollbacks, step) cuts the run off as a kill would. Returns the error's text.
    """
    from relora_mora.model.causal import LossModel
    from relora_mora.train.loop.loop import Trainer
    from relora_mora.train.pretrain import pretrain
    from relora_mora.train.state.run_state import TrainingError

    next_batch, forward, seen = Trainer.next_batch, LossModel.forward, {}

    def numbered(self: Trainer) -> Any:
        batch = next_batch(self)
        if not hasattr(self, "data_numbers"):
            self.data_numbers = config_start(self)
        number = self.data_numbers = self.data_numbers + 1
        while number in drop and batch is not None:
            self.state.data = batch.batch.state
            batch = next_batch(self)
            number = self.data_numbers = number + 1
        seen["number"] = number
        if stop_at == (self.state.rollbacks, self.state.step):
            raise Stopped
        return batch

    def config_start(trainer: Trainer) -> int:
        """How many batches came before this process, including those that rollbacks skipped."""
        before = rollbacks(Path(trainer.config.train.run_dir))[: trainer.state.rollbacks]
        return trainer.state.step + sum(at - step for step, at in before)

    def poisoned(self: LossModel, *batch: Any) -> torch.Tensor:
        loss = forward(self, *batch)
        if not self.training or int(os.environ["RANK"]) != rank or isinstance(loss, FakeTensor):
            return loss
        return loss * factors.get(seen["number"], 1.0) + (added or {}).get(seen["number"], 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "next_batch", numbered)
        patch.setattr(LossModel, "forward", poisoned)
        try:
            pretrain(config)
        except (Stopped, TrainingError) as error:
            return str(error)
    return ""


def rollbacks(folder: Path) -> list[tuple[int, int]]:
    """The step that each rollback went back to, and the step that it came from."""
    path = folder / "metrics.jsonl"
    lines = read_json_lines(path) if path.exists() else []
    return [(line["step"], line["train/rolled_back_from"]) for line in lines if "train/rollbacks" in line]


NAN = {4: float("nan"), 5: float("nan")}


def fault_settings(folder: Path, inputs: Path, tokenizer: str, **train: Any) -> Any:
    given = {"precision": "bf16", "max_bad_steps": 2, **train}
    sections = {"checkpoint": {"every_steps": 3}, "method": {"merge_every": 4}}
    return run_config(inputs, tokenizer, folder, 2, train=given, eval={"every_steps": 0, "at_start": False}, **sections)


def same_run(a: Path, b: Path) -> bool:
    first, second = tensors(checkpoint_at(a, 10)), tensors(checkpoint_at(b, 10))
    state = [manifest_at(f, 10)["data_state"] for f in (a, b)]
    return (
        set(first) == set(second)
        and all(torch.equal(first[key], second[key]) for key in first)
        and state[0] == state[1]
    )
