"""A merge: deltas go into the base, adapters start over, their optimizer state is reset, operators switch.

A bf16 weight loses every delta below about 1/256 of its value. So each frozen weight has a float32 copy, its master, in
the host memory of one rank, its owner. A merge adds the delta to the master and sends the rounded result to all ranks.
All ranks hold the same bits, and after many merges the base is still the sum up to float32 rounding.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relora_mora.adapters.layers import HOST, AdapterLinear, adapter_layers, effective_rank, layer_generator
from relora_mora.adapters.mora import MoRALinear, operator_in_use, set_operators
from relora_mora.config.schema import MethodConfig
from relora_mora.engine.protocol import Engine
from relora_mora.operators import GroupingOperator, Operator
from relora_mora.system.hardware import uses_cuda
from relora_mora.system.logs import counted

MEASURED_STEPS = 100  # how often the effective rank is measured: singular values take longer than the merge


class MergeError(RuntimeError):
    """A merge was refused or went wrong. The message says whether the base was written."""

    same_on_all_ranks = True


def _error(step: int, problem: str) -> MergeError:
    return MergeError(f"step {step}: {problem}, go back to an earlier checkpoint")


@dataclass(frozen=True, repr=False)
class MergeRecord:
    """The results of one merge. The dictionaries have a value for each kind of projection, such as ``q_proj``."""

    layers: int
    zeroed: int
    """Adapter elements whose master is zero or freshly drawn."""
    delta_norm: dict[str, float]
    """Frobenius norm over all layers."""
    effective_rank: dict[str, float]
    """That of the middle layer, or empty if not measured; see adapters/layers.py."""
    operator_before: int | None
    operator_after: int | None
    seconds: float

    def __repr__(self) -> str:
        return f"MergeRecord({', '.join(f'{name}={_short(value)}' for name, value in vars(self).items())})"

    def summary(self) -> str:
        """For the log, such as ``14 layers in 0.05 s, operator 1 -> 2``."""
        switch = "" if self.operator_after is None else f", operator {self.operator_before} -> {self.operator_after}"
        return f"{counted(self.layers, 'layer')} in {self.seconds:.2f} s{switch}"


def _short(value: Any) -> str:
    """With four digits of each float."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_short(each)}' for key, each in value.items())}}}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class FrozenMasters:
    """float32 copies of the frozen weights, each on its owner: weight i belongs to rank i mod world size.

    They are in host memory, which is pinned if there is a GPU. The GPU adds the deltas of a merge, because the host
    takes longer to add than to copy both ways.
    """

    def __init__(self, names: Iterable[str], rank: int, world_size: int) -> None:
        self.owner = {name: index % world_size for index, name in enumerate(names)}
        self.rank = rank
        self.world_size = world_size
        self.weights: dict[str, Tensor] = {}

    @property
    def owned(self) -> list[str]:
        return [name for name, owner in self.owner.items() if owner == self.rank]

    def take(self, value_of: Callable[[str], Tensor]) -> None:
        """Copies the weights that this rank owns; ``value_of`` returns a weight by name."""
        for name in self.owned:
            self.put(name, value_of(name))

    def put(self, name: str, value: Tensor) -> None:
        """Copies one weight that this rank owns."""
        master = torch.empty(value.shape, pin_memory=uses_cuda(), **HOST)
        self.weights[name] = master.copy_(value.detach())

    def add(self, name: str, delta: Tensor, engine: Engine) -> Tensor:
        """Adds to one weight of the engine's model; returns the sum, on the device of ``delta``.

        The host does not wait for a GPU: the master has its value after the work that is queued on the device.
        """
        master = self.weights[name]
        total = master.to(delta.device, non_blocking=True).add_(delta)  # in place if that is the same device
        if total is not master:
            master.copy_(total, non_blocking=True)
        return total

    def push(self, engine: Engine) -> None:
        """Sets every rank's frozen weights from the owners' copies; a collective."""
        for name, owner in self.owner.items():
            engine.write_weight(name, self.weights.get(name), owner)


class Merger:
    """Makes the merges of a run. ``base`` has all frozen weights; a reset draws its random numbers from ``seed``."""

    def __init__(self, engine: Engine, base: FrozenMasters, method: MethodConfig, *, seed: int) -> None:
        self.engine = engine
        self.base = base
        self.method = method
        self.seed = seed
        self.merges_done = 0
        self.layers: dict[str, AdapterLinear] = dict(adapter_layers(engine.lm))
        self.parameters = {
            name: [f"{name}.{key}" for key in layer.adapter_names] for name, layer in self.layers.items()
        }
        self.elements = sum(engine.shapes[name].numel() for names in self.parameters.values() for name in names)
        self.by_kind: dict[str, list[str]] = {}
        for name in self.layers:
            self.by_kind.setdefault(name.rpartition(".")[2], []).append(name)

    @torch.no_grad()
    def merge(self, step: int, merges_done: int, next_operator: int | None) -> MergeRecord:
        """One merge at the end of ``step``; a collective. ``merges_done`` counts this one.

        Raises :class:`MergeError` on all ranks. It does so before anything is written if an adapter is not finite, or
        if the ranks do not hold all elements of the adapters. It does so after the merge, which
        nothing saves then, if a product of finite adapters is not finite, or if some adapter elements were not reset.
        """
        begin = time.perf_counter()
        before = operator_in_use(self.engine.lm)
        self._check_adapters(step)
        interval = step // MEASURED_STEPS
        is_measured = merges_done == 1 or interval > (step - self.method.merge_every) // MEASURED_STEPS
        ranks = self._effective_ranks() if is_measured else {}
        norms = self.engine.all_reduce(torch.stack([self._merge_layer(name) for name in self.layers]))
        squares = dict(zip(self.layers, norms.tolist(), strict=True))
        overflowed = [name for name, square in squares.items() if not math.isfinite(square)]
        if overflowed:
            too_large = f"the delta of {', '.join(overflowed[:3])} is too large for float32"
            raise _error(step, f"{too_large}; nothing of this merge was saved")
        zeroed = self._reset_masters(merges_done)
        used = {name: layer.operator for name, layer in self.layers.items() if isinstance(layer, MoRALinear)}
        set_operators(self.engine.lm, next_operator)
        self.merges_done = merges_done
        self._reset_state(merges_done, used)
        self.engine.refresh()
        if zeroed != self.elements:
            reset = f"the merge reset only {zeroed} of {self.elements} adapter elements"
            raise _error(step, f"{reset}; nothing of it was saved")
        return MergeRecord(
            layers=len(squares),
            zeroed=zeroed,
            delta_norm={kind: sum(squares[name] for name in names) ** 0.5 for kind, names in self.by_kind.items()},
            effective_rank=ranks,
            operator_before=before,
            operator_after=next_operator,
            seconds=time.perf_counter() - begin,
        )

    def _check_adapters(self, step: int) -> None:
        names = [name for parameters in self.parameters.values() for name in parameters]
        held = self.engine.elements_held(names)
        if held != self.elements:
            problem = f"the ranks hold {held} adapter elements, expected {self.elements}"
            raise _error(step, f"{problem}; nothing was merged")
        if broken := self.engine.not_finite(names):
            raise _error(step, f"the delta to merge is not finite ({', '.join(broken[:3])}); nothing was merged")

    def _merge_layer(self, name: str) -> Tensor:
        """Adds the delta of a layer to its base, and returns its squared norm [] on the owner, or zero elsewhere."""
        weight = f"{name}.weight"
        owner = self.base.owner[weight]
        square, merged = torch.zeros((), device=self.engine.device), None
        values = [self.engine.gather(parameter, to=owner) for parameter in self.parameters[name]]
        if owner == self.engine.rank:
            delta = self.layers[name].delta_of(*values)
            square, merged = delta.square().sum(), self.base.add(weight, delta, self.engine)
        self.engine.write_weight(weight, merged, owner)
        return square

    def _effective_ranks(self) -> dict[str, float]:
        """The effective rank of one layer's delta for each kind of projection."""
        measured = {kind: names[len(names) // 2] for kind, names in self.by_kind.items()}
        ranks = torch.zeros(len(measured), device=self.engine.device)
        for index, name in enumerate(measured.values()):
            owner = self.base.owner[f"{name}.weight"]
            values = [self.engine.gather(parameter, to=owner) for parameter in self.parameters[name]]
            if owner == self.engine.rank:
                ranks[index] = effective_rank(self.layers[name].singular_values(*values))
        return dict(zip(measured, self.engine.all_reduce(ranks).tolist(), strict=True))

    def _reset_masters(self, merges_done: int) -> int:
        """Sets every adapter to the values of a fresh one; returns how many elements all ranks wrote."""
        written = 0
        for layer_name, layer in self.layers.items():
            generator = layer_generator(self.seed, layer_name, merges_done)
            for key, parameter in zip(layer.adapter_names, self.parameters[layer_name], strict=True):
                written += self.engine.scatter(parameter, layer.fresh(key, generator))
        total = self.engine.all_reduce(torch.tensor(written, dtype=torch.float64, device=self.engine.device))
        return int(total) // self.engine.copies

    def _reset_state(self, merges_done: int, used: Mapping[str, Operator]) -> None:
        """Resets the adapters' optimizer state as ``method.reset`` says (ReLoRA, arXiv 2307.05695, section 3).

        ``used`` has the operators that were in use before the merge: ``carry`` moves their state to the new operators.
        """
        if self.method.reset == "full":
            self.engine.clear_state({name for names in self.parameters.values() for name in names})
        elif self.method.reset == "carry":
            for layer_name, before in used.items():
                self._carry(layer_name, before)
        elif self.method.reset != "none":
            for layer_name, parameters in self.parameters.items():
                for parameter in parameters:
                    generator = layer_generator(self.seed, f"{layer_name}/{parameter}/exp_avg", merges_done)
                    self._prune(parameter, generator)

    def _carry(self, layer_name: str, before: Operator) -> None:
        """Moves the moments of a layer's M to the operator in use; all ranks compute the same numbers."""
        layer = self.layers[layer_name]
        assert isinstance(layer, MoRALinear)
        after = layer.operator
        assert isinstance(before, GroupingOperator)
        assert isinstance(after, GroupingOperator)
        [parameter] = self.parameters[layer_name]
        for key in self.engine.moments_of(parameter):
            moment = self.engine.gather(parameter, key)
            self.engine.scatter(parameter, after.carry(moment, before), key)

    def _prune(self, parameter: str, generator: torch.Generator) -> None:
        """Zeroes the share ``reset_ratio`` of a parameter's moments: where the first is smallest, or at random.

        All moments are zeroed at the same elements: with exp_avg but no exp_avg_sq, Adam would step by exp_avg / eps.
        """
        moments = {key: self.engine.gather(parameter, key).reshape(-1) for key in self.engine.moments_of(parameter)}
        if not moments:
            return
        first = next(iter(moments.values()))
        drop = round(self.method.reset_ratio * first.numel())
        if self.method.reset == "magnitude":
            chosen = first.abs().topk(drop, largest=False).indices
        else:
            chosen = torch.randperm(first.numel(), generator=generator, device="cpu")[:drop].to(self.engine.device)
        for key, moment in moments.items():
            moment[chosen] = 0.0
            self.engine.scatter(parameter, moment, key)
