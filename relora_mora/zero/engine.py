"""One view of masters and optimizer state for ZeRO 0, 1, 2 and 3.

DeepSpeed keeps the float32 masters of the trainable parameters in flat tensors that differ by stage and precision, and
Adam's state hangs at those. :class:`Fragment` describes what one rank owns of one parameter as a piece of such a tensor;
resets, merges and checkpoints are written against fragments only. Where the flat tensors live (DeepSpeed 0.19):

=========  ======================================================================================
stage      masters
=========  ======================================================================================
0, fp32    the parameters themselves
0, bf16    ``FP16_UnfusedOptimizer.fp32_groups[group][i]``
1, bf16    ``BF16_Optimizer.fp32_groups_flat_partition[group]`` (gradients accumulate in float32)
1, 2       ``DeepSpeedZeroOptimizer.single_partition_of_fp32_groups[group]``
3          ``DeepSpeedZeroOptimizer_Stage3.fp32_partitioned_groups_flat[subgroup]``
=========  ======================================================================================
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from relora_mora.config import Config
from relora_mora.optim import MOMENTS
from relora_mora.zero.settings import deepspeed_settings
from relora_mora.zero.start import quiet


@dataclass(frozen=True)
class Fragment:
    """What this rank owns of one parameter: ``flat[offset : offset + numel]`` is ``parameter.view(-1)[start : start + numel]``."""

    name: str
    start: int
    numel: int
    flat: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """The piece of ``flat`` (the master, or a moment of the same layout) that belongs to this fragment."""
        return flat.view(-1).narrow(0, self.offset, self.numel)


class ZeroEngine:
    """A DeepSpeed engine with its masters, optimizer state and frozen weights made visible.

    ``lm`` is the causal LM inside ``module`` and gives the parameter names. The float32 values of the trainable
    parameters before DeepSpeed casts them become the masters exactly.
    """

    def __init__(
        self, module: nn.Module, lm: nn.Module, optimizer: torch.optim.Optimizer, config: Config, *, bf16: bool
    ) -> None:
        self.lm, self.bf16, self.stage = lm, bf16, config.train.zero_stage
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        self.parameters: dict[str, nn.Parameter] = dict(lm.named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        self.group_names = [group["name"] for group in optimizer.param_groups]
        self.members = [[self._name_of(p) for p in group["params"]] for group in optimizer.param_groups]
        initial = {
            name: p.data.clone() if not bf16 else p.data for name, p in self.parameters.items() if p.requires_grad
        }
        self.clip = config.optim.clip
        trainable = sum(self.shapes[name].numel() for names in self.members for name in names)
        settings = deepspeed_settings(config, bf16=bf16, world_size=self.world_size, trainable=trainable)
        with quiet():
            self.deepspeed, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self.device = self.deepspeed.device
        self.fragments = list(self._fragments())
        self.fragments_of: dict[str, list[Fragment]] = {}
        for fragment in self.fragments:
            self.fragments_of.setdefault(fragment.name, []).append(fragment)
        self.clear_state()
        self.write_masters(initial)

    def _name_of(self, parameter: Tensor) -> str:
        return next(name for name, other in self.parameters.items() if other is parameter)

    # ---- masters ----------------------------------------------------------------------------------------------

    @property
    def adam(self) -> torch.optim.Optimizer:
        """The torch optimizer whose state hangs at the flat masters."""
        optimizer = self.deepspeed.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def _fragments(self) -> Iterator[Fragment]:
        optimizer = self.deepspeed.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            yield from self._stage3_fragments(optimizer)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            groups = zip(
                optimizer.round_robin_bit16_groups,
                optimizer.single_partition_of_fp32_groups,
                optimizer.round_robin_bit16_offsets,
                strict=True,
            )
            for parameters, flat, offsets in groups:  # in the order of the flat tensor, which DeepSpeed may change
                yield from self._flat_fragments([self._name_of(p) for p in parameters], flat, offsets)
        elif isinstance(optimizer, BF16_Optimizer):
            for names, flat in zip(self.members, optimizer.fp32_groups_flat_partition, strict=True):
                yield from self._flat_fragments(names, flat, _running(self.shapes[name].numel() for name in names))
        elif isinstance(optimizer, FP16_UnfusedOptimizer):
            for names, masters in zip(self.members, optimizer.fp32_groups, strict=True):
                for name, master in zip(names, masters, strict=True):
                    yield Fragment(name, 0, master.numel(), master, 0)
        else:
            for names in self.members:
                for name in names:
                    yield Fragment(name, 0, self.shapes[name].numel(), self.parameters[name], 0)

    def _flat_fragments(self, names: list[str], flat: Tensor, offsets: Iterable[int]) -> Iterator[Fragment]:
        """Parameters laid end to end and cut into equal partitions, one per rank."""
        begin = self.rank * flat.numel()
        end = begin + flat.numel()
        for name, at in zip(names, offsets, strict=True):
            left, right = max(begin, at), min(end, at + self.shapes[name].numel())
            if left < right:
                yield Fragment(name, left - at, right - left, flat, left - begin)

    def _stage3_fragments(self, optimizer: Any) -> Iterator[Fragment]:
        """Every parameter is cut into equal partitions, one per rank; a subgroup lays its ranks' partitions end to end."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for flat, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            offset = 0
            for parameter in parameters:
                part = parameter.partition_numel()
                name = names[id(parameter)]
                start = self.rank * part
                owned = max(0, min(part, self.shapes[name].numel() - start))
                if owned:
                    yield Fragment(name, start, owned, flat, offset)
                offset += part

    def flats(self, group: str | None = None) -> list[Tensor]:
        """The flat masters of one parameter group (default: of all), each once."""
        names = None if group is None else set(self.members[self.group_names.index(group)])
        found = {
            id(fragment.flat): fragment.flat for fragment in self.fragments if names is None or fragment.name in names
        }
        return list(found.values())

    def state_of(self, flat: Tensor) -> dict[str, Tensor]:
        """Adam's ``exp_avg``, ``exp_avg_sq`` and ``step`` of a flat master, made with zeros where Adam has not made them."""
        state = self.adam.state[flat]
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        return state

    @torch.no_grad()
    def clear_state(self, group: str | None = None) -> None:
        """Forgets the optimizer state of a parameter group: both moments and the step count.

        Also called at the start: DeepSpeed's wrapper for stage 0 in bf16 has then made one step with zero gradients.
        """
        for flat in self.flats(group):
            for value in self.state_of(flat).values():
                value.zero_()

    def group_steps(self) -> dict[str, int]:
        """Adam's step count of each group on this rank (-1 where the rank owns nothing of the group)."""
        counts = {}
        for group in self.group_names:
            flats = self.flats(group)
            counts[group] = int(self.state_of(flats[0])["step"].item()) if flats else -1
        return counts

    @torch.no_grad()
    def write_masters(self, values: Mapping[str, Tensor]) -> None:
        """Sets masters of whole parameters (float32, given on every rank) and everything that is derived from them."""
        for name, value in values.items():
            self.scatter(name, value)
        self.refresh()

    @torch.no_grad()
    def scatter(self, name: str, value: Tensor, key: str | None = None) -> int:
        """Puts this rank's part of a whole value into the master of a parameter, or into its moment ``key``.

        Returns the elements written. The parameters follow with :meth:`refresh`.
        """
        for fragment in self.fragments_of.get(name, ()):
            target = fragment.flat if key is None else self.state_of(fragment.flat)[key]
            fragment.of(target).copy_(value.reshape(-1)[fragment.start : fragment.start + fragment.numel])
        return sum(fragment.numel for fragment in self.fragments_of.get(name, ()))

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the parameters what the masters say, wherever they stand."""
        optimizer = self.deepspeed.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
                optimizer.fp16_partitioned_groups_flat[index].copy_(flat)
                optimizer._unflatten_partitioned_parameters(index)
            persistent = optimizer.persistent_parameters
            if persistent:  # small parameters stay gathered and would keep their old values
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
            optimizer.update_lp_params()
        elif isinstance(optimizer, FP16_UnfusedOptimizer):
            for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for parameter, master in zip(parameters, masters, strict=True):
                    parameter.data.copy_(master)

    @torch.no_grad()
    def gather(self, name: str, key: str | None = None, to: int | None = None) -> Tensor:
        """The whole float32 master of a parameter, or its moment ``key``, on every rank (``to``: valid on that rank only).

        A collective: all ranks call it with the same arguments.
        """
        whole = torch.zeros(self.shapes[name].numel(), dtype=torch.float32, device=self.device)
        for fragment in self.fragments_of.get(name, ()):
            source = fragment.flat if key is None else self.state_of(fragment.flat)[key]
            whole[fragment.start : fragment.start + fragment.numel] = fragment.of(source)
        if self.world_size > 1 and self.stage > 0:
            if to is None:
                dist.all_reduce(whole)
            else:
                dist.reduce(whole, dst=to)  # every element has one owner: adding zeros keeps its bits
        return whole.view(self.shapes[name])

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sums over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, value: Tensor, src: int) -> None:
        """Gives every rank the value of rank ``src``, in place; a collective."""
        if self.world_size > 1:
            dist.broadcast(value, src=src)

    def sum_over_ranks(self, value: float) -> float:
        """A number's sum over the ranks, exact for whole numbers up to 2^53."""
        return float(self.all_reduce(torch.tensor(value, dtype=torch.float64, device=self.device)))

    # ---- frozen weights ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def write_weight(self, name: str, value: Tensor | None, owner: int) -> None:
        """Sets a frozen weight from the owner's float32 value on all ranks; a collective."""
        parameter = self.parameters[name]
        if self.stage == 3:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=owner):
                if self.rank == owner:
                    assert value is not None
                    parameter.data.copy_(value)
            return
        if self.rank == owner:
            assert value is not None
            parameter.data.copy_(value)
        self.broadcast(parameter.data, owner)

    @contextlib.contextmanager
    def gathered(self, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """Whole parameters to read, on every rank; a collective on stage 3."""
        chosen = {name: self.parameters[name] for name in names}
        with deepspeed.zero.GatheredParameters(list(chosen.values()), enabled=self.stage == 3):
            yield {name: parameter.data for name, parameter in chosen.items()}

    # ---- steps ------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """The module's forward: see :class:`relora_mora.model.LossModel`."""
        return self.deepspeed(*inputs)

    def train(self) -> None:
        self.deepspeed.train()

    def eval(self) -> None:
        self.deepspeed.eval()

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        """Backward of one micro-batch; ``last`` of the step leaves the averaged gradients for :meth:`step`."""
        self.deepspeed.backward(loss)
        if not last:
            self.deepspeed.step()  # counts the micro-batch

    def step(self, rates: list[float]) -> tuple[float, bool]:
        """One optimizer step at a rate per group; returns (global gradient norm before clipping, was it applied).

        A step with a non-finite gradient is skipped on all ranks, on every stage. At stage 0 in float32 DeepSpeed would
        make it, so there norm, check and clipping are ours.
        """
        for group, rate in zip(self.adam.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.stage == 0 and not self.bf16:
            norm, applied = self._clip_plain()
            self.deepspeed.step()
            return norm, applied
        self.deepspeed.step()
        reported = self.deepspeed.get_global_grad_norm()
        norm = float("nan") if reported is None else float(reported)
        return norm, bool(self.deepspeed.was_step_applied()) and math.isfinite(norm)

    def _clip_plain(self) -> tuple[float, bool]:
        """Norm of the gradients, which backward has averaged over the ranks, then clips them; not finite: drops them."""
        owners = [p for p in self.deepspeed.module.parameters() if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in owners])))
        if not math.isfinite(norm):
            for parameter in owners:
                parameter.grad = None  # AdamW makes no step without a gradient
        elif self.clip and (scale := self.clip / (norm + 1e-6)) < 1:
            for parameter in owners:
                parameter.grad *= scale
        return norm, math.isfinite(norm)


def _running(sizes: Iterable[int]) -> Iterator[int]:
    total = 0
    for size in sizes:
        yield total
        total += size
