"""Parameters, optimizer state and frozen weights of a training loop in plain torch: one process, DDP or FSDP2."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from relora_mora.engine.protocol import Engine

STARTS_AT_ZERO = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


class TorchState(Engine):
    """What ``optimizer`` trains of ``lm``.

    All ranks of ``group`` train the same model. Its parameters are plain tensors, which every rank has (one process,
    DDP), or DTensors (``fully_shard``). ``names`` are the parameters to merge and reset.

    Without an optimizer, parameters can only be read. Raises ValueError if it does not train all of ``names``.
    """

    def __init__(
        self, lm: nn.Module, optimizer: torch.optim.Optimizer | None, names: Sequence[str], group: Any = None
    ) -> None:
        self.lm = lm
        self.group = group
        self.parameters = dict(lm.named_parameters())
        self.names = list(names)
        self.rank, self.world_size = rank_and_size(group)
        first = self.parameters[names[0]]
        self.device: torch.device = first.device
        if any(self.parameters[name].device != self.device for name in names):
            raise ValueError("the adapters are on several devices; put the whole model on one, or shard it over ranks")
        self.copies = self.world_size // _shards(first)
        self.shapes = whole_shapes(lm)
        if optimizer is None:
            return
        self.optimizer = optimizer
        trained = {id(parameter) for members in optimizer.param_groups for parameter in members["params"]}
        missing = [name for name in names if id(self.parameters[name]) not in trained]
        if missing:
            raise ValueError(
                f"{type(optimizer).__name__} does not train {len(missing)} of {len(names)} adapter parameters "
                f"({missing[0]}, ...); make the optimizer after attach() and fully_shard(), from parameter_groups()"
            )

    def moments_of(self, name: str) -> Sequence[str]:
        """The names of a parameter's state that has one value per element; empty before its first step.

        Raises ValueError for other state, unless that is a number.
        """
        state = self.optimizer.state.get(self.parameters[name], {})
        moments = moments_in(state, self.shapes[name])
        for key, value in state.items():
            is_number = value is None or isinstance(value, int | float) or torch.as_tensor(value).numel() == 1
            if key not in moments and not is_number:
                raise ValueError(
                    f"{type(self.optimizer).__name__} keeps {key!r} of {name}, which has no value per element; "
                    "use reset='full', which starts the state again, or an optimizer such as AdamW"
                )
        return moments

    def check_state(self, reset: str) -> None:
        """Raises ValueError if the optimizer, after its first step, has state that ``method.reset`` cannot reset."""
        kind = type(self.optimizer).__name__
        groups = self.optimizer.param_groups
        if kind == "ZeroRedundancyOptimizer" or _is_joint(self.optimizer):
            raise ValueError(
                f"{kind} does not keep the state of each parameter on each rank, so a merge cannot reset it; use an "
                "optimizer that does, such as AdamW"
            )
        adapters = {id(self.parameters[name]) for name in self.names}
        mixed = [group for group in groups if len({id(parameter) in adapters for parameter in group["params"]}) > 1]
        if reset == "full" and any("step" in group for group in mixed):
            raise ValueError(
                f"{kind} keeps one step count per group, and a group has adapters and other parameters, so a merge "
                "cannot reset the adapters' count; make the optimizer from parameter_groups()"
            )
        if reset not in ("full", "none"):
            for name in self.names:
                self.moments_of(name)

    def clear_state(self, names: Set[str]) -> None:
        for name in names:
            restart_state(self.optimizer, self.parameters[name])
        restart_counts(self.optimizer, {id(self.parameters[name]) for name in names})

    def parts(self, name: str, key: str | None = None) -> list[Tensor]:
        return [_local(self._tensor(name, key))]

    def _tensor(self, name: str, key: str | None) -> Tensor:
        parameter = self.parameters[name]
        moment: Tensor = parameter if key is None else self.optimizer.state[parameter][key]
        return moment

    @torch.no_grad()
    def gather(self, name: str, key: str | None = None, to: int | None = None) -> Tensor:
        """A whole parameter or its moment ``key``, in float32; a collective. All ranks get it."""
        return _whole(self._tensor(name, key)).to(torch.float32, copy=True)

    @torch.no_grad()
    def read_weight(self, name: str) -> Tensor:
        return _whole(self.parameters[name])

    def is_whole(self, name: str) -> bool:
        return not isinstance(self.parameters[name], DTensor)

    @torch.no_grad()
    def scatter(self, name: str, value: Tensor, key: str | None = None) -> int:
        return _write(self._tensor(name, key), value.to(self.device).view(self.shapes[name]))

    @torch.no_grad()
    def write_weight(self, name: str, value: Tensor | None, owner: int) -> None:
        weight = self.parameters[name]
        rounded = torch.empty(self.shapes[name], dtype=weight.dtype, device=self.device)
        if self.rank == owner:
            assert value is not None
            rounded.copy_(value)
        self.broadcast(rounded, owner)
        _write(weight, rounded)

    def refresh(self) -> None:
        """Nothing to do: the model computes with the values that the optimizer changes."""


def whole_shapes(lm: nn.Module) -> dict[str, torch.Size]:
    """The shapes of the whole parameters, also of those that DeepSpeed's ZeRO-3 has cut into parts."""
    return {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in lm.named_parameters()}


def rank_and_size(group: Any) -> tuple[int, int]:
    """This process's rank and the number of ranks in a process group; (0, 1) without ``torch.distributed``."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(group), distributed.get_world_size(group)


def moments_in(state: Mapping[str, Any], shape: torch.Size) -> list[str]:
    """The names of the state of a parameter of this shape that has one value per element."""
    return [key for key, value in state.items() if _is_plain(value) and value.shape == shape]


def restart_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Makes the optimizer state of a parameter as it is before its first step.

    That is zeros for Adam and its like, where the entries stay, so that a checkpoint that is saved now has them. Any
    other state is removed, such as moments in 8 bits, and the optimizer makes it again at its next step.
    """
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    kept = state.keys() <= STARTS_AT_ZERO and all(_is_plain(v) or not isinstance(v, Tensor) for v in state.values())
    if not kept:
        del optimizer.state[parameter]
        return
    for key, value in state.items():
        state[key] = value.zero_() if isinstance(value, Tensor) else 0


def restart_counts(optimizer: torch.optim.Optimizer, parameters: Set[int]) -> None:
    """Zeroes the step count that some optimizers keep for a whole group, if it has one of these (ids of) parameters."""
    for group in optimizer.param_groups:
        if "step" in group and any(id(parameter) in parameters for parameter in group["params"]):
            group["step"] = 0


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor that can be read and written like any other, not one that packs its values itself."""
    return type(value) in (Tensor, nn.Parameter, DTensor)


def _is_joint(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer keeps one state for all parameters together, as L-BFGS does: vectors as long as all."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    total = sum(parameter.numel() for parameter in trained)
    [state] = optimizer.state.values() if len(optimizer.state) == 1 < len(trained) else [{}]
    return any(isinstance(value, Tensor) and value.numel() == total for value in state.values())


def _whole(value: Tensor) -> Tensor:
    """A tensor that may be sharded; a collective if it is."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()


def _local(value: Tensor) -> Tensor:
    return value.to_local().detach() if isinstance(value, DTensor) else value.detach()


def _write(target: Tensor, value: Tensor) -> int:
    """Copies a whole value, the same on all ranks, to a tensor that may be sharded; returns this rank's elements."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None).to_local()
    part = _local(target)
    part.copy_(value)
    return part.numel()


def _shards(parameter: Tensor) -> int:
    """The number of parts that a parameter is cut into."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    cuts = [
        mesh.size(dim) for dim, placement in enumerate(parameter.placements) if not isinstance(placement, Replicate)
    ]
    if len(cuts) > 1:
        raise ValueError(
            f"a parameter is sharded as {parameter.placements}: adapters with tensor parallelism are not supported; "
            "use fully_shard() alone, with one mesh dimension that shards"
        )
    return cuts[0] if cuts else 1
