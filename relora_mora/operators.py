"""The parameter-free operators of MoRA. Forward, merge and gradient follow from one definition of each.

MoRA (arXiv 2405.12130, eq. 6-9) adds ``D(M C(x))`` to a linear layer: ``C`` compresses the input from ``in`` to ``R``
features, ``M`` [R, R] is trained, and ``D`` decompresses from ``R`` to ``out``. Both maps are linear, so the layer's
weight changes by ``delta = D M C`` [out, in]. Every type is written as the two linear maps and the transpose of ``D``.
Only type 6 has a second form, ``add_blocks`` in ``kernels/reference.py``, which adds its delta to a weight. Most types
are a pair of groupings (``kernels/grouping.py``), whose sums and copies have compiled kernels.

Shapes: ``in`` and ``out`` are the layer's features, ``R`` the size of the square matrix, ``P`` a width padded to whole
groups, ``B`` blocks of ``R`` features (type 6), ``...`` any leading dimensions.
"""

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from pkgutil import resolve_name

import torch
from torch import Tensor

from relora_mora.config.registry import OPERATORS
from relora_mora.kernels import grouping, reference
from relora_mora.kernels.grouping import Grouping
from relora_mora.kernels.ops import expand_add, group_sum, rotary_add

MORA_TYPES = tuple(OPERATORS)
ALIGNED = 16  # features; on a GPU, rows of matrix operands are padded to whole vectors of its matrix units


def square_size(in_features: int, out_features: int, rank: int) -> int:
    """``R = floor(sqrt((in + out) * rank))``: the largest square with at most LoRA's number of parameters.

    MoRA (arXiv 2405.12130, section 4) floors; the released code rounds and so can exceed the budget.
    """
    return math.isqrt((in_features + out_features) * rank)


def _tile(x: Tensor, width: int) -> Tensor:
    """x [..., n] -> [..., width]: x repeated, then cut to width."""
    n = x.shape[-1]
    if width <= n:
        return x[..., :width]
    times, rest = divmod(width, n)
    return torch.cat([x] * times + ([x[..., :rest]] if rest else []), -1)


def _fold(x: Tensor, width: int) -> Tensor:
    """x [..., n] -> [..., width]: the transpose of :func:`_tile`. Features beyond width are added to the first ones."""
    n = x.shape[-1]
    if n <= width:
        return torch.nn.functional.pad(x, (0, width - n))
    folded = x[..., :width].clone()
    for start in range(width, n, width):
        piece = x[..., start : start + width]
        folded[..., : piece.shape[-1]] += piece
    return folded


def transposed_product(reduced: Tensor, compressed: Tensor) -> Tensor:
    """reduced^T compressed [m, n], of reduced [..., m] and compressed [..., n]"""
    return reduced.reshape(-1, reduced.shape[-1]).T @ compressed.reshape(-1, compressed.shape[-1])


class Operator(ABC):
    """``C`` and ``D`` of one layer. ``compress`` applies C, ``decompress`` D and ``decompress_transposed`` D^T.

    For every x [..., in] and M [R, R]: ``decompress(compress(x) @ M.T) == x @ delta(M).T``.
    """

    blocks = 1  # how often M is applied to one token

    def __init__(self, mora_type: int, in_features: int, out_features: int, size: int) -> None:
        self.mora_type = mora_type
        self.in_features = in_features
        self.out_features = out_features
        self.square_size = size

    @abstractmethod
    def compress(self, x: Tensor) -> Tensor:
        """C: x [..., in] -> [..., R] (type 6: [..., B, R])"""

    @abstractmethod
    def decompress(self, y: Tensor) -> Tensor:
        """D: y [..., R] (type 6: [..., B, R]) -> [..., out]"""

    @abstractmethod
    def decompress_transposed(self, dy: Tensor) -> Tensor:
        """D^T: dy [..., out] -> [..., R] (type 6: [..., B, R])"""

    @abstractmethod
    def delta(self, M: Tensor) -> Tensor:
        """D M C: M [R, R] -> [out, in]; a merge adds it to the weight"""

    def core(self, M: Tensor) -> Tensor:
        """A matrix with the nonzero singular values of delta(M), smaller than delta(M) if the operator knows one."""
        return self.delta(M)

    def add_delta(self, weight: Tensor, M: Tensor, after: Tensor | None = None) -> Tensor:
        """weight + delta(M) [out, in], a new tensor; not differentiable. See ``ops.expand_add`` for ``after``."""
        return weight + self.delta(M)

    def compress_for_gradient(self, x: Tensor) -> Tensor:
        """C x in the form that :meth:`square_gradient` expects"""
        return self.compress(x)

    def factors(self, M: Tensor) -> tuple[Tensor, Tensor]:
        """A [blocks * R, in] = M C and B [out, blocks * R] = D, so ``B A = delta(M)``, in the form of a LoRA."""
        compressed = self.compress(torch.eye(self.in_features, dtype=M.dtype))
        A = (compressed @ M.T).flatten(1).T
        B = self.decompress(torch.eye(len(A), dtype=M.dtype).view(-1, *compressed.shape[1:])).T
        return A, B

    def square_gradient(self, compressed: Tensor, dy: Tensor) -> Tensor:
        """dM [R, R] = (D^T dy)^T (C x), from dy [..., out] and compressed = ``compress_for_gradient(x)``."""
        return transposed_product(self.decompress_transposed(dy), compressed)

    def gradients(self, compressed: Tensor, dy: Tensor, M: Tensor) -> tuple[Tensor]:
        """For :class:`relora_mora.adapters.layers.FrozenProduct`."""
        return (self.square_gradient(compressed, dy),)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(type {self.mora_type}, "
            f"{self.in_features} -> {self.square_size} -> {self.out_features})"
        )


class GroupingOperator(Operator):
    """C sums a grouping of the inputs, D copies to a grouping of the outputs.

    ``inputs`` and ``outputs`` are names of functions in ``kernels/grouping.py``.
    """

    def __init__(
        self, mora_type: int, in_features: int, out_features: int, size: int, inputs: str, outputs: str
    ) -> None:
        super().__init__(mora_type, in_features, out_features, size)
        self.inputs: Grouping = getattr(grouping, inputs)(in_features, size)
        self.outputs: Grouping = getattr(grouping, outputs)(out_features, size)
        self.padded_inputs = self.inputs.padded(ALIGNED)
        self.padded_outputs = self.outputs.padded(ALIGNED)

    def compress(self, x: Tensor) -> Tensor:
        return group_sum(x, self.inputs)

    def decompress(self, y: Tensor) -> Tensor:
        return self.outputs.copy(y)

    def decompress_transposed(self, dy: Tensor) -> Tensor:
        return group_sum(dy, self.outputs)

    def delta(self, M: Tensor) -> Tensor:
        return self.outputs.copy(self.inputs.copy(M).mT).mT

    def core(self, M: Tensor) -> Tensor:
        """S M T^T [<= R, <= R], for D = Q S and C^T = P T with orthonormal columns in Q and P"""
        return _triangular_factor(self.outputs, M) @ M @ _triangular_factor(self.inputs, M).mT

    def add_delta(self, weight: Tensor, M: Tensor, after: Tensor | None = None) -> Tensor:
        return expand_add(weight, M, self.inputs, self.outputs, after)

    def carry(self, moment: Tensor, before: "GroupingOperator") -> Tensor:
        """Estimates a moment [R, R] of M's gradient under this operator from that moment under ``before``.

        dM = D^T dW C^T sums elements of the weight's gradient. Each element is assumed to be an equal share of its sum
        (the mean of two shares if it is in two sums), and these shares are summed under this operator. This is linear,
        so it applies to first moments. It applies to second moments because variances of uncorrelated elements add up.
        """
        columns_carried = self.inputs.sum(before.inputs.share(moment))
        return self.outputs.sum(before.outputs.share(columns_carried.mT)).mT

    def compress_for_gradient(self, x: Tensor) -> Tensor:
        return group_sum(x, self.padded_inputs if x.is_cuda else self.inputs)

    def square_gradient(self, compressed: Tensor, dy: Tensor) -> Tensor:
        reduced = group_sum(dy, self.padded_outputs if dy.is_cuda else self.outputs)
        return transposed_product(reduced, compressed)[: self.square_size, : self.square_size].contiguous()


def _triangular_factor(groups: Grouping, like: Tensor) -> Tensor:
    """S [<= slots, slots] in the decomposition Q S of the copy matrix [features, slots]; Q has orthonormal columns."""
    if groups.once:  # the columns of the copy matrix do not overlap
        return torch.diag(groups.sum(like.new_ones(groups.features)).sqrt())
    return torch.linalg.qr(groups.copy(torch.eye(groups.slots, dtype=like.dtype, device=like.device)).mT)[1]


class RotaryOperator(Operator):
    """Type 6: the (wrapped) input is cut into blocks of R, block j is rotated by RoPE position j, M maps each block.

    The mapped blocks are concatenated, tiled if ``out`` is longer, and cut to ``out``. Inputs in blocks beyond ``out``
    do not contribute to y. As in the released code (kongds/MoRA), torch computes the angles in float32, and they are
    then cast to the dtype of x.
    """

    def __init__(self, mora_type: int, in_features: int, out_features: int, size: int) -> None:
        if size % 2:
            raise ValueError(
                f"mora_type 6 rotates pairs of features, so the square matrix needs an even size, got {size}; "
                "set method.square_multiple to an even number or give an even method.square_size"
            )
        super().__init__(mora_type, in_features, out_features, size)
        self.blocks = reference.blocks_of(in_features, out_features, size)

    def compress(self, x: Tensor) -> Tensor:
        blocks = _tile(x, self.blocks * self.square_size).unflatten(-1, (self.blocks, self.square_size))
        cos, sin = reference.angles(self.blocks, self.square_size, x.dtype, x.device)
        left, right = blocks.chunk(2, -1)
        return blocks * cos + torch.cat([-right, left], -1) * sin

    def decompress(self, y: Tensor) -> Tensor:
        return _tile(y.flatten(-2), self.out_features)

    def decompress_transposed(self, dy: Tensor) -> Tensor:
        return _fold(dy, self.blocks * self.square_size).unflatten(-1, (self.blocks, self.square_size))

    def delta(self, M: Tensor) -> Tensor:
        return reference.add_blocks(M.new_zeros(self.out_features, self.in_features), M)

    def add_delta(self, weight: Tensor, M: Tensor, after: Tensor | None = None) -> Tensor:
        return rotary_add(weight, M, after)


@lru_cache(maxsize=1024)
def make_operator(mora_type: int, in_features: int, out_features: int, square_size: int) -> Operator:
    """Returns the operator ``mora_type`` for one layer's shape; operators of equal arguments are one object.

    The numbers are the types of the released code (kongds/MoRA, peft ``lora/layer.py``).

    Raises ValueError for an unknown type, or an odd size with type 6.
    """
    if mora_type not in OPERATORS:
        raise ValueError(f"mora_type must be one of {', '.join(map(str, MORA_TYPES))}, got {mora_type}")
    record = OPERATORS[mora_type]
    operator: Operator = resolve_name(record.code)(mora_type, in_features, out_features, square_size, *record.groupings)
    return operator
