"""The parts of a run, built in the order in which they depend on each other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from relora_mora import kernels
from relora_mora.config import Config
from relora_mora.merging import FrozenMasters, Merger
from relora_mora.methods.inject import inject
from relora_mora.model import LossModel, empty_model, put_values
from relora_mora.optim import (
    ParameterGroup,
    Parameters,
    build_optimizer,
    count_parameters,
    make_schedule,
    parameter_groups,
    set_trainable,
)
from relora_mora.plan.fit import choose_resident, stage_advice, uneven_widths
from relora_mora.plan.setup import Setup
from relora_mora.schedule import Schedule
from relora_mora.system.hardware import uses_cuda
from relora_mora.system.logs import log, shared_log
from relora_mora.train.check import Checked, memory_of_rank
from relora_mora.train.initial import initial_values, write_initial_values
from relora_mora.zero import ZeroEngine


@dataclass(frozen=True)
class Run:
    """What trains. Where it stands is a :class:`RunState`."""

    checked: Checked
    engine: ZeroEngine
    base: FrozenMasters
    merger: Merger
    groups: list[ParameterGroup]
    schedule: Schedule
    parameters: Parameters

    @property
    def config(self) -> Config:
        return self.checked.config


def build(
    checked: Checked,
    rank: int,
    world_size: int,
    *,
    resumes: bool = False,
    done: Callable[[str], None] = lambda part: None,
) -> Run:
    """A run at step 0; a collective. With ``resumes`` nothing is drawn or read: a checkpoint brings all values.

    ``done`` hears which part is finished: model, engine.
    """
    config = checked.config
    lm = empty_model(checked.model_config, attention=config.model.attention)
    if config.model.activation_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.method.uses_adapters:
        _add_adapters(lm, config, with_values=not resumes)
    set_trainable(lm, config.method)
    on_gpu = uses_cuda()
    available = memory_of_rank()
    setup = Setup(
        config, config.train.zero_stage, world_size, bf16=checked.bf16, on_gpu=on_gpu, compiled=checked.compiled
    )
    choose_resident(lm, setup, available)
    advice = stage_advice(lm, setup, available)
    if advice:
        shared_log.warning(advice)
    for note in uneven_widths(checked.model_config) if on_gpu else ():
        shared_log.warning("model: %s", note)
    groups = parameter_groups(lm, config.optim)
    counts = count_parameters(lm)
    log.info(
        "parameters: %s total, %s trainable, %s adapters",
        f"{counts.total:,}",
        f"{counts.trainable:,}",
        f"{counts.adapters:,}",
    )
    frozen = [name for name, p in lm.named_parameters() if not p.requires_grad]
    base = FrozenMasters(frozen, rank, world_size)
    # drawn and read while shapes are known; at ZeRO-3 a parameter shows none later
    maker, made = ({}, {}) if resumes else initial_values(lm, base, config, world_size)
    dtype = torch.bfloat16 if checked.bf16 else torch.float32
    # zeros take no memory until they are written to: DeepSpeed places, casts and partitions them
    put_values(lm, {name: torch.zeros(p.shape, dtype=dtype) for name, p in lm.named_parameters() if p.is_meta})
    done("model")
    module = LossModel(lm, compiled=checked.compiled)
    engine = ZeroEngine(
        module, lm, build_optimizer(lm, groups, config.optim), config.train, clip=config.optim.clip, bf16=checked.bf16
    )
    done("engine")
    if not resumes:
        write_initial_values(engine, base, maker, made)
        done("model")
    merger = Merger(engine, base, config.method, seed=config.train.seed)
    schedule = make_schedule(config.method, config.optim, config.train.steps)
    return Run(checked, engine, base, merger, groups, schedule, counts)


def _add_adapters(lm: PreTrainedModel, config: Config, *, with_values: bool) -> None:
    with contextlib.nullcontext() if with_values else torch.device("meta"):
        found = inject(lm, config.method, seed=config.train.seed)
    kinds = ", ".join(f"{len(names)} {kind}" for kind, names in found.items())
    used = kernels.describe("cuda" if uses_cuda() else "cpu")
    log.info("%s adapters on %d layers: %s; %s", config.method.name, sum(map(len, found.values())), kinds, used)
