"""Compiles all that a run will use before its first step: a merge that switches operators then costs no compilation."""

from __future__ import annotations

import torch

from relora_mora.data import document_boundaries
from relora_mora.model.compiler import allow_programs
from relora_mora.operators import Draw
from relora_mora.supervise import LONG_SECONDS, Guard
from relora_mora.system.logs import log
from relora_mora.train.build import Run
from relora_mora.train.state import RunState


def warm_up(run: Run, state: RunState, guard: Guard) -> None:
    """One micro-batch of each kind in training and evaluation with each operator that is still to come, on this rank.

    Nothing of the run changes. Only for layers that torch.compile compiles. An operator that is drawn anew at every
    merge is another one to the compiler each time, since pieces of groupings are constants of its programs.
    """
    config = run.config
    data = config.data
    train_size = config.train.micro_batch_size
    eval_size = config.eval.micro_batch_size or train_size
    # (training, sequences, whether documents are kept apart) of all batches there will be
    batches = {(True, train_size, data.masks_documents_of([source])) for source in data.train_sources}
    batches |= {(False, eval_size, data.masks_documents_of(sources)) for sources in data.validation_sets.values()}
    module = run.engine.module
    merger = run.merger
    before = merger.operator(), merger.draw
    left = run.schedule.operators_left(state.step)
    allow_programs(len(batches) * len(left))
    if len(left) > 1:
        log.info("compiling the decoder layers for %d operators", len(left))
    for operator, merges_done in left:
        now = merges_done == merger.draw.merges_done
        merger.set_operator(operator, merger.draw if now else Draw(merger.seed, merges_done))
        for training, size, masked in sorted(batches, reverse=True):
            guard.begin("compiling the decoder layers", within=LONG_SECONDS)
            ids = torch.zeros(size, config.data.sequence_length, dtype=torch.int64, device=run.engine.device)
            boundaries = document_boundaries(ids.cpu()).to(ids.device) if masked else None
            run.engine.keep_merged()
            module.train(training)
            with torch.set_grad_enabled(training):
                loss = module(ids, ids, boundaries, float(ids.numel()))
            if training:  # the gradients go nowhere: no hook of ZeRO hears of them
                torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])
    merger.set_operator(*before)
