"""Masters, optimizer state and frozen weights by name, however DeepSpeed has cut them: a view of its optimizer."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from relora_mora.adapters.layers import adapter_layers
from relora_mora.adapters.stored import PLAIN
from relora_mora.engine.masters import Fragment, owned_fragments, stage_of, update_parameters
from relora_mora.engine.protocol import Engine
from relora_mora.engine.torch_state import moments_in, restart_counts, restart_state, whole_shapes


class ZeroState(Engine):
    """What DeepSpeed's optimizer ``zero`` holds of ``lm``: most of an engine.

    Resets, merges and checkpoints only use the ``fragments``. A subclass knows which moments there are.
    """

    def __init__(self, lm: nn.Module, zero: Any, shapes: Mapping[str, torch.Size], stage: int) -> None:
        self.lm = lm
        self.zero = zero
        self.shapes = shapes
        self.stage = stage
        self.device = next(lm.parameters()).device
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.copies = 1 if stage else self.world_size  # ranks that hold each element of a master
        self.parameters: dict[str, nn.Parameter] = dict(lm.named_parameters())
        self.layers = {f"{name}.weight": layer for name, layer in adapter_layers(lm)}
        self.fragments = self.fragments_of_rank(self.rank)
        self.fragments_of: dict[str, list[Fragment]] = {}
        for fragment in self.fragments:
            self.fragments_of.setdefault(fragment.name, []).append(fragment)

    def fragments_of_rank(self, rank: int) -> list[Fragment]:
        """The fragments that a rank owns. Those of another rank refer to the flat tensors of this one."""
        return list(owned_fragments(self.zero, self.parameters, rank))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer, whose state is keyed by the flat masters."""
        optimizer: torch.optim.Optimizer = getattr(self.zero, "optimizer", self.zero)
        return optimizer

    def flats(self, names: Set[str] | None = None) -> list[Tensor]:
        """The flat masters of these parameters (default: of all), each once."""
        parts = (part for part in self.fragments if names is None or part.name in names)
        return list({id(part.flat): part.flat for part in parts}.values())

    def state_of(self, flat: Tensor) -> dict[str, Any]:
        """The optimizer's moments and ``step`` of a flat master."""
        state: dict[str, Any] = self.optimizer.state[flat]
        return state

    def parts(self, name: str, key: str | None = None) -> list[Tensor]:
        fragments = self.fragments_of.get(name, [])
        return [part.of(part.flat if key is None else self.state_of(part.flat)[key]) for part in fragments]

    @torch.no_grad()
    def write_masters(self, values: Mapping[str, Tensor]) -> None:
        """Sets masters from whole float32 parameters, the same on every rank, and then parameters from masters."""
        for name, value in values.items():
            self.scatter(name, value)
        self.refresh()

    @torch.no_grad()
    def scatter(self, name: str, value: Tensor, key: str | None = None) -> int:
        parts = self.parts(name, key)
        for fragment, part in zip(self.fragments_of.get(name, []), parts, strict=True):
            # does not wait if the value is in host memory
            part.copy_(fragment.of_whole(value.reshape(-1)), non_blocking=True)
        return sum(part.numel() for part in parts)

    def refresh(self) -> None:
        """Updates the parameters from the masters."""
        self.drop_merged()
        update_parameters(self.zero)

    @torch.no_grad()
    def gather(self, name: str, key: str | None = None, to: int | None = None) -> Tensor:
        """See the base class. The masters of frozen weights are in ``FrozenMasters`` (engine/merging.py)."""
        assert self.parameters[name].requires_grad, f"{name} is frozen"
        whole = torch.zeros(self.shapes[name].numel(), dtype=torch.float32, device=self.device)
        for fragment, part in zip(self.fragments_of.get(name, []), self.parts(name, key), strict=True):
            fragment.of_whole(whole).copy_(part)
        if self.world_size > 1 and self.stage > 0:
            # every element has one owner, and adding the zeros of the other ranks keeps its bits
            if to is None:
                dist.all_reduce(whole)
            else:
                dist.reduce(whole, dst=to)
        return whole.view(self.shapes[name])

    @torch.no_grad()
    def read_weight(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
            return parameter.data.clone()

    def is_whole(self, name: str) -> bool:
        return self.stage < 3

    @torch.no_grad()
    def write_weight(self, name: str, value: Tensor | None, owner: int) -> None:
        self.drop_merged()
        parameter = self.parameters[name]
        stored = self.layers[name].stored if name in self.layers else PLAIN
        if value is not None and stored != PLAIN:
            value = stored.encode(value.to(self.device))
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=owner, enabled=self.stage == 3):
            if self.rank == owner:
                assert value is not None
                parameter.data.copy_(value)
        if self.stage < 3:
            self.broadcast(parameter.data, owner)

    def drop_merged(self) -> None:
        """Drops every ``W + delta`` of the resident layers; call it before their values change."""
        for layer in self.layers.values():
            layer.drop_merged()


class UserZero(ZeroState):
    """DeepSpeed's optimizer ``zero`` of ``lm``, with whichever torch optimizer is inside.

    Raises ValueError if the optimizer does not train all of ``names``, the parameters to merge and reset, or if it
    trains other parameters in the same groups.
    """

    def __init__(self, lm: nn.Module, zero: Any, names: Sequence[str]) -> None:
        super().__init__(lm, zero, whole_shapes(lm), stage_of(zero))
        held = self.elements_held(names)
        expected = sum(self.shapes[name].numel() for name in names)
        if held != expected:
            raise ValueError(
                f"DeepSpeed's optimizer trains {held:,} of {expected:,} adapter elements; "
                "call attach() before deepspeed.initialize(), and make the optimizer from parameter_groups()"
            )
        flats = {id(flat) for flat in self.flats(set(names))}
        mixed = [part.name for part in self.fragments if id(part.flat) in flats and part.name not in names]
        if mixed:
            raise ValueError(
                f"the optimizer has adapters and other parameters ({mixed[0]}, ...) in one group, and DeepSpeed keeps "
                "one step count per group, so a merge cannot reset the adapters' count; make the optimizer from "
                "parameter_groups()"
            )

    def moments_of(self, name: str) -> Sequence[str]:
        """See :class:`relora_mora.engine.protocol.Engine`; the same on all ranks, also on those that hold nothing."""
        flats = [part.flat for part in self.fragments_of.get(name, self.fragments)]
        return moments_in(self.state_of(flats[0]), flats[0].shape) if flats else []

    @torch.no_grad()
    def clear_state(self, names: Set[str]) -> None:
        """See :func:`restart_state`; also zeroes a step count that the optimizer keeps for a whole group."""
        flats = self.flats(names)
        for flat in flats:
            restart_state(self.optimizer, flat)
        cleared = {id(flat) for flat in flats}
        restart_counts(self.optimizer, cleared)
