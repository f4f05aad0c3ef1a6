"""A tiny run: settings, model and batches that several tests share."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from relora_mora.adapters.inject import choose_storage, inject
from relora_mora.config.schema import Config
from relora_mora.engine.merging import FrozenMasters, Merger
from relora_mora.model.causal import LossModel, build_model
from relora_mora.optim.groups import build_optimizer, make_schedule, parameter_groups, set_trainable
from relora_mora.system.hardware import uses_cuda
from tests.tools.runs import LLAMA, run_config

VOCABULARY, LENGTH, BATCH = 64, 16, 8


def tiny_llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**(LLAMA | {"vocab_size": VOCABULARY, "use_cache": False} | changes))


def tiny_config(world_size: int = 1, **sections: dict[str, Any]) -> Config:
    """As :func:`run_config`, of a run that reads no files."""
    own: dict[str, dict[str, Any]] = {
        "data": {"sequence_length": LENGTH},
        "optim": {"warmup_steps": 1},
        "train": {"steps": 40, "batch_size": BATCH, "micro_batch_size": 2, "zero_stage": 2},
    }
    changed = {name: own.get(name, {}) | sections.get(name, {}) for name in {**own, **sections}}
    return run_config(Path("unused"), "unused", Path("unused"), world_size, **changed)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step: input_ids and labels [BATCH, LENGTH]."""
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1000 + step))
    return tokens[:, :-1], tokens[:, 1:]


@dataclass
class Rig:
    """Everything a step needs, built as the trainer builds it."""

    config: Config
    engine: Any
    base: FrozenMasters
    merger: Merger
    groups: list[Any]
    schedule: Any
    initial: dict[str, Tensor]  # float32, whole, from before the engine

    def micro_batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        ids, labels = (tensor.to(self.engine.device) for tensor in batch(step))
        rank, world, micro = self.engine.rank, self.engine.world_size, self.config.train.micro_batch_size
        return list(zip(ids[rank::world].split(micro), labels[rank::world].split(micro), strict=True))

    def step(self, step: int, *, poison: bool = False, scale: float = 1.0) -> tuple[float, float, bool]:
        """One optimizer step: (mean loss over all ranks, gradient norm, applied)."""
        from relora_mora.optim.groups import group_rates

        micro = self.micro_batches(step)
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for index, (ids, labels) in enumerate(micro):
            loss = self.engine(ids, labels) * scale
            if poison and index == 0:
                loss = loss * float("nan")
            total += loss.detach().double()
            self.engine.accumulate(loss, last=index == len(micro) - 1)
        _, norm, applied = self.engine.step(group_rates(self.schedule, self.groups, step), total)
        return float(self.engine.all_reduce(total)) / len(micro) / self.engine.world_size, norm, applied

    def merge(self, step: int) -> Any:
        return self.merger.merge(step, self.schedule.merges_done(step), self.schedule.operator(step))

    def gather(self, name: str, key: str | None = None) -> Tensor:
        """The engine's answer in host memory."""
        return self.engine.gather(name, key).cpu()

    @torch.no_grad()
    def logits(self, step: int = 0) -> Tensor:
        self.engine.eval()
        ids = batch(step)[0][:2].to(self.engine.device)
        out = self.engine.lm(input_ids=ids, use_cache=False).logits.float().clone()
        self.engine.train()
        return out.cpu()


def build_rig(config: Config, *, bf16: bool = False, llama: LlamaConfig | None = None) -> Rig:
    from relora_mora.engine.engine import ZeroEngine

    lm = build_model(llama or tiny_llama(), seed=config.train.seed)
    if config.method.uses_adapters:
        inject(lm, config.method, seed=config.train.seed)
        choose_storage(lm, config.method, on_gpu=uses_cuda())
    set_trainable(lm, config.method)
    groups = parameter_groups(lm, config.optim)
    initial = {name: p.detach().clone() for name, p in lm.named_parameters()}
    from torch import distributed as dist

    base = FrozenMasters(
        [name for name, p in lm.named_parameters() if not p.requires_grad], dist.get_rank(), dist.get_world_size()
    )
    base.take(initial.__getitem__)
    optimizer = build_optimizer(lm, groups, config.optim)
    engine = ZeroEngine(LossModel(lm), lm, optimizer, config.train, clip=config.optim.clip, bf16=bf16)
    merger = Merger(engine, base, config.method, seed=config.train.seed)
    schedule = make_schedule(config.method, config.optim, config.train.steps)
    return Rig(config, engine, base, merger, groups, schedule, initial)


def whole_weights(engine: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies, in host memory, of whole parameters as the model computes with them; a collective on stage 3."""
    import deepspeed

    parameters = {name: engine.parameters[name] for name in names}
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=engine.stage == 3):
        return {name: parameter.data.clone().cpu() for name, parameter in parameters.items()}
