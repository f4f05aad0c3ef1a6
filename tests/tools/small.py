"""A small model of one's own with adapters, and a plain loop."""

from typing import Any

import torch
from torch import Tensor, nn

import relora_mora as rm


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))


def merging(every: int = 2, **settings: Any) -> rm.AttachedAdapters:
    """The model with adapters that are merged every few steps."""
    return rm.attach(mlp(), rm.ReMoRA(**{"rank": 2, "merge_every": every, **settings}))


def adamw(remora: rm.AttachedAdapters) -> torch.optim.AdamW:
    return torch.optim.AdamW(remora.parameter_groups(lr=0.02))


def steps(remora: rm.AttachedAdapters, optimizer: Any, count: int, schedule: Any = None) -> rm.MergeRecord | None:
    """Returns what the last step's merge did."""
    record = None
    x = torch.ones(3, 16, dtype=next(remora.model.parameters()).dtype)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = remora.model(x).square().mean()
        value.backward()
        return value

    for _ in range(count):
        optimizer.step(loss)
        if schedule is not None:
            schedule.step()
        record = remora.after_step(optimizer)
    return record
