"""Sums and copies along groupings, and cross-entropy over logits, in one pass over memory each.

Where a device has kernels of its own they are operators of torch (``torch.ops.relora_mora``), which torch.compile calls
from inside a compiled layer; CPUs have those of kernels.c, NVIDIA's GPUs those of triton_*.py. Everywhere else, and
while autograd records, the same is computed by torch operations. Results agree up to rounding: the kernels add up
bfloat16 in float32 and round once, torch rounds after every piece of a grouping (tests/kernels/test_kernels.py).
"""

from relora_mora.kernels.cpu import available
from relora_mora.kernels.grouping import Grouping, contiguous, interleaved, rotated, wrapped_interleaved
from relora_mora.kernels.ops import (
    cross_entropy_,
    describe,
    disabled,
    expand_add,
    group_sum,
    group_sums,
    rotary_add,
    supports,
)

__all__ = [
    "Grouping",
    "available",
    "contiguous",
    "cross_entropy_",
    "describe",
    "disabled",
    "expand_add",
    "group_sum",
    "group_sums",
    "interleaved",
    "rotary_add",
    "rotated",
    "supports",
    "wrapped_interleaved",
]
