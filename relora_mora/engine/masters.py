"""Where DeepSpeed keeps the float32 masters of the trainable parameters, on each ZeRO stage.

They are in flat tensors, which also key the optimizer's state. Stage and precision decide which ones:

=========  ======================================================================================
stage      masters
=========  ======================================================================================
0, fp32    the parameters themselves
0, bf16    ``FP16_UnfusedOptimizer.fp32_groups[group][i]``, or for DeepSpeed's FusedAdam
           ``FP16_Optimizer.fp32_groups_flat[group]``
1, bf16    ``BF16_Optimizer.fp32_groups_flat_partition[group]`` (gradients accumulate in float32)
1, 2       ``DeepSpeedZeroOptimizer.single_partition_of_fp32_groups[group]``
3          ``DeepSpeedZeroOptimizer_Stage3.fp32_partitioned_groups_flat[subgroup]``
=========  ======================================================================================

:class:`Fragment` describes them the same way for all stages.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from relora_mora.engine import internals

OUTSIDE = "(outside the model)"
Piece = tuple[Tensor, int, int, Tensor, int]


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter that one rank owns, as a piece of a flat tensor.

    ``flat[offset : offset + numel]`` is ``parameter.view(-1)[start : start + numel]``.
    """

    name: str
    start: int
    numel: int
    flat: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """The piece of ``flat`` (the master, or a moment of the same layout) that belongs to this fragment."""
        return flat.view(-1).narrow(0, self.offset, self.numel)

    def of_whole(self, values: Tensor) -> Tensor:
        """The same piece of ``values``, which has the size of the whole parameter."""
        return values.view(-1).narrow(0, self.start, self.numel)


def owned_fragments(optimizer: Any, parameters: Mapping[str, nn.Parameter], rank: int) -> Iterator[Fragment]:
    """The fragments of a rank in the masters of DeepSpeed's ``optimizer``.

    Those of parameters that are not in ``parameters`` have the name ``OUTSIDE``.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    for parameter, start, numel, flat, offset in _pieces(optimizer, rank):
        yield Fragment(names.get(id(parameter), OUTSIDE), start, numel, flat, offset)


def _pieces(optimizer: Any, rank: int) -> Iterator[Piece]:
    """Each parameter with start, number of elements, flat tensor and offset, as in :class:`Fragment`."""
    if isinstance(optimizer, internals.DeepSpeedZeroOptimizer_Stage3):
        yield from _stage3_pieces(optimizer, rank)
    elif isinstance(optimizer, internals.DeepSpeedZeroOptimizer):
        flat_groups = zip(
            optimizer.round_robin_bit16_groups,  # in the order of the flat tensor: DeepSpeed may reorder parameters
            optimizer.single_partition_of_fp32_groups,
            optimizer.round_robin_bit16_offsets,
            strict=True,
        )
        for members, flat, offsets in flat_groups:
            yield from _flat_pieces(members, flat, offsets, rank)
    elif isinstance(optimizer, internals.BF16_Optimizer):
        for members, flat in zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True):
            yield from _flat_pieces(members, flat, _offsets(members), rank)
    elif isinstance(optimizer, internals.FP16_Optimizer):
        for members, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            yield from _flat_pieces(members, flat, _offsets(members), 0)  # every rank has all
    elif isinstance(optimizer, internals.FP16_UnfusedOptimizer):
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for p, master in zip(group, masters, strict=True):
                yield p, 0, master.numel(), master, 0
    else:
        for group in optimizer.param_groups:
            for p in group["params"]:
                yield p, 0, p.numel(), p, 0


def stage_of(optimizer: Any) -> int:
    """3, 1 if the masters are cut in flat partitions (also stage 2), or 0, for DeepSpeed's ``optimizer``."""
    if isinstance(optimizer, internals.DeepSpeedZeroOptimizer_Stage3):
        return 3
    return 1 if isinstance(optimizer, internals.DeepSpeedZeroOptimizer | internals.BF16_Optimizer) else 0


def _offsets(members: Sequence[Tensor]) -> list[int]:
    """Where each of these parameters begins if they are concatenated."""
    return list(itertools.accumulate((p.numel() for p in members), initial=0))[:-1]


def _flat_pieces(members: Sequence[Tensor], flat: Tensor, offsets: Iterable[int], rank: int) -> Iterator[Piece]:
    """Parameters are concatenated and cut into equal partitions, one per rank."""
    begin = rank * flat.numel()
    end = begin + flat.numel()
    for p, offset in zip(members, offsets, strict=True):
        left = max(begin, offset)
        right = min(end, offset + p.numel())
        if left < right:
            yield p, left - offset, right - left, flat, left - begin


def _stage3_pieces(optimizer: Any, rank: int) -> Iterator[Piece]:
    """Every parameter is cut into equal partitions, one per rank; a subgroup concatenates the partitions of a rank."""
    for flat, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        offset = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            start = rank * size
            owned = max(0, min(size, parameter.ds_shape.numel() - start))  # the last partitions may be padding
            if owned:
                yield parameter, start, owned, flat, offset
            offset += size


@torch.no_grad()
def update_parameters(optimizer: Any) -> None:
    """Updates the parameters of DeepSpeed's ``optimizer`` from its masters."""
    if isinstance(optimizer, internals.DeepSpeedZeroOptimizer_Stage3):
        for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[index].copy_(flat)
            optimizer._unflatten_partitioned_parameters(index)
        persistent = optimizer.persistent_parameters
        if persistent:  # small parameters stay gathered and would keep their old values
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
    elif isinstance(optimizer, internals.DeepSpeedZeroOptimizer | internals.BF16_Optimizer):
        optimizer.update_lp_params()
    elif isinstance(optimizer, internals.FP16_Optimizer):
        for values, masters in zip(optimizer.fp16_groups_flat, optimizer.fp32_groups_flat, strict=True):
            values.copy_(masters)  # the parameters are views of these
    elif isinstance(optimizer, internals.FP16_UnfusedOptimizer):
        for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.data.copy_(master)
