"""Compiles all that a run will use before its first step: a merge that switches operators then costs no compilation."""

from __future__ import annotations

import torch

from relora_mora.data import document_boundaries
from relora_mora.schedule import Schedule
from relora_mora.supervise import LONG_SECONDS, Guard
from relora_mora.train.build import Run
from relora_mora.train.state import RunState


def warm_up(run: Run, state: RunState, guard: Guard) -> None:
    """One micro-batch of training and one of evaluation with each operator that is still to come, on this rank alone.

    Nothing of the run changes. Only for layers that torch.compile compiles.
    """
    config = run.config
    sizes = {True: config.train.micro_batch_size, False: config.eval.micro_batch_size or config.train.micro_batch_size}
    module = run.engine.module
    before = run.merger.operator()
    for operator in operators_left(run.schedule, state.step):
        run.merger.set_operator(operator)
        for training, size in sizes.items():
            guard.begin("compiling the decoder layers", within=LONG_SECONDS)
            ids = torch.zeros(size, config.data.sequence_length, dtype=torch.int64, device=run.engine.device)
            boundaries = document_boundaries(ids.cpu()).to(ids.device) if config.data.masks_documents else None
            run.engine.keep_merged()
            module.train(training)
            with torch.set_grad_enabled(training):
                loss = module(ids, ids, boundaries, float(ids.numel()))
            if training:  # the gradients go nowhere: no hook of ZeRO hears of them
                torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])
    run.merger.set_operator(before)


def operators_left(schedule: Schedule, step: int) -> list[int | None]:
    """Those in use from ``step`` to the end, each once; None for methods without."""
    if not schedule.operators:
        return [None]
    merges = range(schedule.merges_done(step), schedule.merges_done(schedule.total_steps) + 1)
    return list(dict.fromkeys(schedule.operators[done % len(schedule.operators)] for done in merges))
