"""The loops that the trainer is compared with: the same steps on batches loaded beforehand, in one process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch

from launch.benchmark.device import synchronize
from relora_mora.adapters.inject import inject
from relora_mora.adapters.layers import adapter_layers
from relora_mora.config.schema import Config
from relora_mora.data.stream.packing import Batch
from relora_mora.data.stream.stream import TrainStream
from relora_mora.distributed.join import device_of_rank
from relora_mora.model.llama import LossModel, build_model
from relora_mora.optim.groups import group_rates, make_schedule, parameter_groups, set_trainable
from relora_mora.sizing.fit import choose_forms
from relora_mora.sizing.setup import Setup
from relora_mora.system.hardware import uses_cuda
from relora_mora.train.begin.build import build
from relora_mora.train.begin.check import ResolvedRun, memory_of_rank
from relora_mora.train.loop.loop import micro_batches


def make_batches(config: Config, steps: int) -> list[Batch]:

    with TrainStream(
        config.data,
        tokenizer_path=config.tokenizer_path,
        batch_size=config.train.batch_size,
        lanes=config.lanes,
        rank=0,
        world_size=1,
    ) as stream:
        return [next(stream) for _ in range(steps)]


class Loop(Protocol):
    def step(self, number: int, batch: Batch) -> float:
        """Makes optimizer step ``number`` (from 1) on a global batch; returns the loss of the last micro-batch."""


class EngineLoop:
    """The trainer's own model and engine."""

    def __init__(self, checked: ResolvedRun) -> None:
        self.run = build(checked, rank=0, world_size=1)
        self.micro_batch_size = checked.config.train.micro_batch_size
        self.device = self.run.engine.device

    def step(self, number: int, batch: Batch) -> float:
        engine = self.run.engine
        loss = torch.zeros(())
        engine.train()
        pieces = list(micro_batches(batch, self.micro_batch_size, self.device))
        for index, piece in enumerate(pieces):
            loss = engine(*piece)
            engine.accumulate(loss, last=index == len(pieces) - 1)
        return engine.step(group_rates(self.run.schedule, self.run.groups, number), loss.detach()).loss


class TorchLoop:
    """The same model and optimizer in plain torch, with float32 masters and float32 gradient sums."""

    def __init__(self, checked: ResolvedRun) -> None:
        config = checked.config
        lm = build_model(checked.model_config, seed=config.train.seed, attention=config.model.attention)
        if config.method.uses_adapters:
            inject(lm, config.method, seed=config.train.seed)
        if config.model.activation_checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        set_trainable(lm, config.method)
        setup = Setup(
            config, config.train.zero_stage, 1, bf16=checked.bf16, on_gpu=uses_cuda(), compiled=checked.compiled
        )
        choose_forms(lm, setup, memory_of_rank())
        self.layers = [layer for _, layer in adapter_layers(lm)]
        for layer in self.layers:
            layer.pack()
        self.groups = parameter_groups(lm, config.optim)
        self.schedule = make_schedule(config.method, config.optim, config.train.steps)
        self.clip = config.optim.clip
        self.device = device_of_rank()
        self.micro_batch_size = config.train.micro_batch_size
        names = [name for group in self.groups for name in group.parameters]
        masters = {name: lm.get_parameter(name).detach().to(self.device, torch.float32, copy=True) for name in names}
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        self.model = LossModel(lm, compiled=checked.compiled).to(
            self.device, torch.bfloat16 if checked.bf16 else torch.float32
        )
        self.pairs = [(lm.get_parameter(name), master) for name, master in masters.items()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [masters[name] for name in group.parameters], "weight_decay": group.weight_decay}
                for group in self.groups
            ],
            lr=0.0,
            betas=config.optim.betas,
            eps=config.optim.eps,
            fused=True,
        )

    def step(self, number: int, batch: Batch) -> float:
        self.model.train()
        pieces = list(micro_batches(batch, self.micro_batch_size, self.device))
        loss = torch.zeros(())
        for layer in self.layers:
            layer.keep_merged()
        for piece in pieces:
            loss = self.model(*piece)
            (loss / len(pieces)).backward()
            for parameter, master in self.pairs:
                if parameter.grad is not None and master.grad is not None:
                    master.grad += parameter.grad
                parameter.grad = None
        if self.clip:
            torch.nn.utils.clip_grad_norm_([master for _, master in self.pairs], self.clip)
        for group, rate in zip(
            self.optimizer.param_groups, group_rates(self.schedule, self.groups, number), strict=True
        ):
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            for parameter, master in self.pairs:
                parameter.copy_(master)
        for layer in self.layers:
            layer.drop_merged()
        return float(loss.detach())


def seconds_of(loop: Loop, batches: Sequence[Batch], *, skip: int) -> float:
    """Makes a step with each batch; returns the seconds of all steps except the first ``skip``."""
    begin = time.perf_counter()
    for number, batch in enumerate(batches, 1):
        loop.step(number, batch)
        if number == skip:
            begin = _now()
    return _now() - begin


def _now() -> float:
    synchronize(device_of_rank())
    return time.perf_counter()
