"""A merge: deltas go into the base, adapters start over, their optimizer state is reset, operators switch.

A bf16 weight loses every delta below about 1/256 of its value. So each frozen weight has a float32 copy, its master, in
the host memory of one rank, its owner. A merge adds the delta to the master and sends all ranks the rounded result: all
hold the same bits, and after many merges the base is the sum to float32 rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relora_mora.adapters.layers import AdapterLinear, adapter_layers, effective_rank, layer_generator
from relora_mora.adapters.mora import MoRALinear
from relora_mora.config.schema import MethodConfig
from relora_mora.distributed.collectives import gather_from_ranks
from relora_mora.engine.engine import ZeroEngine
from relora_mora.operators import Draw, GroupingOperator, Operator
from relora_mora.system.hardware import uses_cuda

MEASURED_STEPS = 100  # in each of which the effective rank is measured once: singular values take longer than the merge


class MergeError(RuntimeError):
    """A merge that was refused, or went wrong; the message says whether the base was written."""

    same_on_all_ranks = True


@dataclass(frozen=True)
class MergeRecord:
    """What one merge did. The dictionaries have a value for each kind of projection, such as ``q_proj``."""

    layers: int
    zeroed: int  # adapter elements whose master is zero or freshly drawn
    delta_norm: dict[str, float]  # Frobenius norm over all layers
    effective_rank: dict[str, float]  # of the layer in the middle of the model, or empty; see methods/layers.py
    operator_before: int | None
    operator_after: int | None
    seconds: float


class FrozenMasters:
    """float32 copies of the frozen weights, each on its owner: weight i belongs to rank i mod world size.

    They are in host memory, which is pinned where there is a GPU. That computes the sums of a merge, for a host takes
    longer to add than to copy both ways.
    """

    def __init__(self, names: Iterable[str], rank: int, world_size: int) -> None:
        self.owner = {name: index % world_size for index, name in enumerate(names)}
        self.rank = rank
        self.weights: dict[str, Tensor] = {}

    @property
    def owned(self) -> list[str]:
        return [name for name, owner in self.owner.items() if owner == self.rank]

    def take(self, value_of: Callable[[str], Tensor]) -> None:
        """Copies the weights that this rank owns; ``value_of`` gives each by its name."""
        for name in self.owned:
            self.put(name, value_of(name))

    def put(self, name: str, value: Tensor) -> None:
        """Copies one weight, which this rank owns."""
        master = torch.empty(value.shape, dtype=torch.float32, pin_memory=uses_cuda())
        self.weights[name] = master.copy_(value.detach())

    def add(self, name: str, delta: Tensor) -> Tensor:
        """Adds to one weight; returns the sum, on the device of ``delta``.

        A GPU is not waited for: the master has its value once what was asked of the device so far is done.
        """
        master = self.weights[name]
        total = master.to(delta.device, non_blocking=True).add_(delta)  # in place where that is the same device
        if total is not master:
            master.copy_(total, non_blocking=True)
        return total

    def push(self, engine: ZeroEngine) -> None:
        """Sets every rank's frozen weights from the owners' copies; a collective."""
        for name, owner in self.owner.items():
            engine.write_weight(name, self.weights.get(name), owner)


class Merger:
    """Merges and resets of one run. ``base`` has all frozen weights; ``seed`` that of what is drawn at a reset."""

    def __init__(self, engine: ZeroEngine, base: FrozenMasters, method: MethodConfig, *, seed: int) -> None:
        self.engine = engine
        self.base = base
        self.method = method
        self.seed = seed
        self.draw = Draw(seed)  # of the operator in use
        self.layers: dict[str, AdapterLinear] = dict(adapter_layers(engine.lm))
        self.parameters = {
            name: [f"{name}.{key}" for key in layer.adapter_names] for name, layer in self.layers.items()
        }
        self.elements = sum(engine.shapes[name].numel() for names in self.parameters.values() for name in names)
        self.by_kind: dict[str, list[str]] = {}
        for name in self.layers:
            self.by_kind.setdefault(name.rpartition(".")[2], []).append(name)
        self.measured = {names[len(names) // 2] for names in self.by_kind.values()}

    def set_operator(self, mora_type: int | None, draw: Draw) -> None:
        self.engine.drop_merged()
        self.draw = draw
        if mora_type is not None:
            for layer in self.layers.values():
                if isinstance(layer, MoRALinear):
                    layer.set_operator(mora_type, draw)

    def _operators(self) -> dict[str, Operator]:
        return {name: layer.operator for name, layer in self.layers.items() if isinstance(layer, MoRALinear)}

    def operator(self) -> int | None:
        """The operator in use, None for methods without; all layers agree."""
        used = {operator.mora_type for operator in self._operators().values()}
        assert len(used) <= 1, f"layers disagree about the operator: {sorted(used)}"
        return used.pop() if used else None

    @torch.no_grad()
    def merge(self, step: int, merges_done: int, next_operator: int | None) -> MergeRecord:
        """One merge at the end of ``step``; a collective. ``merges_done`` counts this one.

        Raises :class:`MergeError` on all ranks. Before anything is written: when an adapter is not finite, or the ranks
        do not hold the layers and elements that the settings ask for. After the merge, which is then saved nowhere:
        when a product of finite adapters was not finite, or not all elements of the adapters were reset.
        """
        begin = time.perf_counter()
        before = self.operator()
        self._check_adapters(step)
        squares, ranks = self._merge_layers(self.measured if self._is_measured(step, merges_done) else set())
        spoiled = [name for name, square in squares.items() if not math.isfinite(square)]
        if spoiled:
            raise MergeError(
                f"step {step}: the delta of {', '.join(spoiled[:3])} is too large for float32; "
                "the merge is spoiled and was saved nowhere, go back to an earlier checkpoint"
            )
        zeroed = self._reset_masters(merges_done)
        used = self._operators()
        self.set_operator(next_operator, Draw(self.seed, merges_done))
        self._reset_state(merges_done, used)
        self.engine.refresh()
        if zeroed != self.elements:
            raise MergeError(
                f"step {step}: merged, and reset {zeroed} of {self.elements} adapter elements; "
                "this run cannot be trusted from here, go back to an earlier checkpoint"
            )
        return MergeRecord(
            layers=len(squares),
            zeroed=zeroed,
            delta_norm={kind: sum(squares[name] for name in names) ** 0.5 for kind, names in self.by_kind.items()},
            effective_rank={name.rpartition(".")[2]: rank for name, rank in ranks.items()},
            operator_before=before,
            operator_after=self.operator(),
            seconds=time.perf_counter() - begin,
        )

    def _is_measured(self, step: int, merges_done: int) -> bool:
        """Whether the effective rank is: at the first merge, and at the first one in each hundred steps."""
        before = step - self.method.merge_every
        return merges_done == 1 or step // MEASURED_STEPS > before // MEASURED_STEPS

    def _check_adapters(self, step: int) -> None:
        names = {name for parameters in self.parameters.values() for name in parameters}
        lm: Any = self.engine.lm
        layers = len(self.method.target_modules) * lm.config.num_hidden_layers
        fragments = [fragment for fragment in self.engine.fragments if fragment.name in names]
        held = self._over_ranks(sum(fragment.numel for fragment in fragments))
        if len(self.layers) != layers or held != self.elements:
            raise MergeError(
                f"step {step}: there are {len(self.layers)} layers to merge, expected {layers}, "
                f"and the ranks hold {held} adapter elements, expected {self.elements}; "
                "nothing was merged, go back to an earlier checkpoint"
            )
        finite = (
            torch.stack([part.of(part.flat).isfinite().all() for part in fragments]).cpu().tolist() if fragments else []
        )
        own = {part.name for part, good in zip(fragments, finite, strict=True) if not good}
        if self.engine.sum_over_ranks(len(own)):
            bad = sorted(set().union(*gather_from_ranks(own)))
            raise MergeError(
                f"step {step}: the delta to merge is not finite ({', '.join(bad[:3])}); "
                "nothing was merged, go back to an earlier checkpoint"
            )

    def _merge_layers(self, measured: Set[str]) -> tuple[dict[str, float], dict[str, float]]:
        """Adds every delta to its base; returns each layer's squared norm of the delta, and some effective ranks.

        In groups of as many layers as there are ranks, so that all owners build their deltas at the same time. What is
        ``measured`` comes after that, when no rank waits for another's weights; the host reads it once.
        """
        engine = self.engine
        names = list(self.layers)
        found = torch.zeros(2, len(names), dtype=torch.float32, device=engine.device)  # squares, effective ranks
        to_measure: list[tuple[int, list[Tensor]]] = []
        for start in range(0, len(names), engine.world_size):
            group = range(start, min(start + engine.world_size, len(names)))
            mine: list[tuple[int, list[Tensor]]] = []
            sums: dict[str, Tensor] = {}
            for index in group:
                owner = self.base.owner[f"{names[index]}.weight"]
                values = [engine.gather(parameter, to=owner) for parameter in self.parameters[names[index]]]
                if owner == engine.rank:
                    mine.append((index, values))
            for index, values in mine:
                delta = self.layers[names[index]].delta_of(*values)
                found[0, index] = delta.square().sum()
                sums[f"{names[index]}.weight"] = self.base.add(f"{names[index]}.weight", delta)
            to_measure += [(index, values) for index, values in mine if names[index] in measured]
            for index in group:
                weight = f"{names[index]}.weight"
                engine.write_weight(weight, sums.get(weight), self.base.owner[weight])
        for index, values in to_measure:
            found[1, index] = effective_rank(self.layers[names[index]].singular_values(*values))
        squares, ranks = engine.all_reduce(found).tolist()
        of_measured = {name: value for name, value in zip(names, ranks, strict=True) if name in measured}
        return dict(zip(names, squares, strict=True)), of_measured

    def _reset_masters(self, merges_done: int) -> int:
        """Gives every adapter the values of a fresh one; returns the elements written, over all ranks."""
        written = 0
        for layer_name, layer in self.layers.items():
            generator = layer_generator(self.seed, layer_name, merges_done)
            for key, parameter in zip(layer.adapter_names, self.parameters[layer_name], strict=True):
                written += self.engine.scatter(parameter, layer.fresh(key, generator))
        return self._over_ranks(written)

    def _over_ranks(self, elements: int) -> int:
        """Elements over all ranks; at stage 0 every rank has them all."""
        return elements if self.engine.stage == 0 else int(self.engine.sum_over_ranks(elements))

    def _reset_state(self, merges_done: int, used: Mapping[str, Operator]) -> None:
        """Resets the adapters' optimizer state as ``method.reset`` says (ReLoRA, arXiv 2307.05695, section 3).

        ``used`` has the operators from before the merge, which ``carry`` moves the state of to the new ones.
        """
        if self.method.reset == "full":
            self.engine.clear_state("adapters")
        elif self.method.reset == "carry":
            for layer_name, before in used.items():
                self._carry(layer_name, before)
        elif self.method.reset != "none":
            for layer_name, parameters in self.parameters.items():
                for parameter in parameters:
                    generator = layer_generator(self.seed, f"{layer_name}/{parameter}/exp_avg", merges_done)
                    self._prune(parameter, generator)

    def _carry(self, layer_name: str, before: Operator) -> None:
        """Moves the moments of a layer's square to the operator in use; the same numbers on all ranks."""
        layer = self.layers[layer_name]
        assert isinstance(layer, MoRALinear)
        after = layer.operator
        assert isinstance(before, GroupingOperator)
        assert isinstance(after, GroupingOperator)
        [parameter] = self.parameters[layer_name]
        for key in self.engine.moments[parameter]:
            moment = self.engine.gather(parameter, key)
            self.engine.scatter(parameter, after.carry(moment, before), key)

    def _prune(self, parameter: str, generator: torch.Generator) -> None:
        """Sets ``reset_ratio`` of a parameter's moments to zero: where the first is smallest, or at random elements.

        All moments at the same elements: one with exp_avg and no exp_avg_sq would be moved by exp_avg / eps.
        """
        moments = {key: self.engine.gather(parameter, key).reshape(-1) for key in self.engine.moments[parameter]}
        first = next(iter(moments.values()))
        drop = round(self.method.reset_ratio * first.numel())
        if self.method.reset == "magnitude":
            chosen = first.abs().topk(drop, largest=False).indices
        else:
            chosen = torch.randperm(first.numel(), generator=generator)[:drop].to(self.engine.device)
        for key, moment in moments.items():
            moment[chosen] = 0.0
            self.engine.scatter(parameter, moment, key)
