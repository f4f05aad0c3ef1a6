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

:class:`Fragment` describes them the same way for all stages. These classes are not documented and may move in any
release, which is why the version of DeepSpeed is bounded.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

OUTSIDE = "(outside the model)"


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter that one rank owns, as a piece of a flat tensor.

    ``flat[offset : offset + numel]`` is ``parameter.view(-1)[start : start + numel]``. The ``flat`` of another rank's
    fragment is the one of this rank that is used in the same way.
    """

    rank: int
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


def stage_of(optimizer: Any) -> int:
    """3, 1 if the masters are cut in flat partitions (also stage 2), or 0, for DeepSpeed's ``optimizer``."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return 3
    return 1 if isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer) else 0


def owned_fragments(optimizer: Any, parameters: Mapping[str, nn.Parameter], rank: int) -> Iterator[Fragment]:
    """The fragments of a rank in the masters of DeepSpeed's ``optimizer``.

    Those of parameters that are not in ``parameters`` have the name ``OUTSIDE``.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    if stage_of(optimizer) == 3:
        # every parameter is cut into equal partitions, one per rank; a subgroup concatenates the partitions of a rank
        for flat, members in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            offset = 0
            for p in members:
                size = p.partition_numel()
                owned = min(size, p.ds_shape.numel() - rank * size)  # the last partitions may be padding
                if owned > 0:
                    yield Fragment(rank, names.get(id(p), OUTSIDE), rank * size, owned, flat, offset)
                offset += size
        return
    for members, flat, offsets in _flat_groups(optimizer):
        # below, the concatenated parameters are cut into equal partitions, one per rank; at stage 0 there is only one
        begin = rank * flat.numel() if stage_of(optimizer) else 0
        for p, offset in zip(members, offsets, strict=True):
            left = max(begin, offset)
            right = min(begin + flat.numel(), offset + p.numel())
            if left < right:
                yield Fragment(rank, names.get(id(p), OUTSIDE), left - offset, right - left, flat, left - begin)


def _flat_groups(optimizer: Any) -> Iterator[tuple[Sequence[Tensor], Tensor, Sequence[int]]]:
    """Parameters that are concatenated, this rank's flat master of them, and where each of them begins."""
    groups: Iterable[tuple[Sequence[Tensor], Tensor]]
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        yield from zip(
            optimizer.round_robin_bit16_groups,  # in the order of the flat tensor: DeepSpeed may reorder parameters
            optimizer.single_partition_of_fp32_groups,
            optimizer.round_robin_bit16_offsets,
            strict=True,
        )
        return
    if isinstance(optimizer, BF16_Optimizer):
        groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True)
    elif isinstance(optimizer, FP16_Optimizer):
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        parameters = itertools.chain(*optimizer.fp16_groups)
        masters = itertools.chain(*optimizer.fp32_groups)
        groups = (([p], master) for p, master in zip(parameters, masters, strict=True))
    else:
        groups = (([p], p) for group in optimizer.param_groups for p in group["params"])
    for members, flat in groups:
        yield members, flat, list(itertools.accumulate((p.numel() for p in members), initial=0))[:-1]


@torch.no_grad()
def update_parameters(optimizer: Any) -> None:
    """Updates the parameters of DeepSpeed's ``optimizer`` from its masters."""
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
    elif isinstance(optimizer, FP16_Optimizer):
        for values, masters in zip(optimizer.fp16_groups_flat, optimizer.fp32_groups_flat, strict=True):
            values.copy_(masters)  # the parameters are views of these
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for [parameter], master, _ in _flat_groups(optimizer):
            parameter.data.copy_(master)
