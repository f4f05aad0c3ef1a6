"""How an adapter layer stores its frozen weight W [out, in], and multiplies with it.

The weight is in the compute type or in 8 bits. Its truth is the float32 master in host memory (``engine/merging.py``):
the stored form is made from the master each time, so rounding errors do not add up over merges.

In 8 bits, a row of W is 8-bit values times one float32 scale, and both products can multiply 8-bit values::

    y = W x      x is quantized per token; the scale of an output feature multiplies the sum
    dx = W^T dy  that scale multiplies dy before dy is quantized per token, so the same stored W serves both products

This is SwitchBack (Wortsman et al. 2023, arXiv 2304.13013) without its third product: W has no gradient. Sums are
int32, or float32 for fp8. The gradients of an adapter use the x and dy that are not rounded.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from relora_mora.config.load import ConfigError
from relora_mora.config.schema import MethodConfig
from relora_mora.kernels.grouping import Grouping, contiguous
from relora_mora.kernels.ops import dense, multiply_rows, quantize_rows

KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
OLDEST = {"int8": (8, 0), "fp8": (8, 9)}  # compute capabilities of the GPUs whose matrix units multiply them
ALIGNED = 16  # rows and columns of a GPU's 8-bit matrices are multiples of this


@dataclass(frozen=True)
class Plain:
    """The weight is stored as it is, in the compute type."""

    multiplies = False

    def encode(self, weight: Tensor) -> Tensor:
        return weight

    def dense(self, stored: Tensor, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
        """The weight [out, in]; products cast it."""
        return stored

    def linear(self, x: Tensor, stored: Tensor) -> Tensor:
        return F.linear(x, stored.to(x.dtype))

    def linear_transposed(self, dy: Tensor, stored: Tensor) -> Tensor:
        return dy @ stored.to(dy.dtype)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


@dataclass(frozen=True)
class EightBits:
    """The weight is stored as one tensor of bytes [out * in + 4 * out]: 8-bit values, then float32 scales.

    ``kind`` is a key of ``KINDS``. With ``multiplies`` products multiply the 8-bit values, otherwise they multiply the
    weight in the dtype of x. On GPUs the stored matrix is padded with zeros to multiples of 16.
    """

    kind: str
    out_features: int
    in_features: int
    multiplies: bool
    on_gpu: bool

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns of the stored matrix."""
        if not self.on_gpu:
            return self.out_features, self.in_features
        return _aligned(self.out_features), _aligned(self.in_features)

    @property
    def _scales_start(self) -> int:
        rows, columns = self.padded
        return _aligned(rows * columns)

    def encode(self, weight: Tensor) -> Tensor:
        """weight [out, in] -> the stored tensor, on the same device"""
        values, scales = quantize_rows(weight, KINDS[self.kind], padded=self.padded[1])
        stored = self.empty(weight)
        stored[: values.numel()] = values.view(torch.uint8).view(-1)
        end = self._scales_start + 4 * self.out_features
        stored[self._scales_start : end] = scales.view(torch.uint8)
        return stored

    def empty(self, weight: Tensor) -> Tensor:
        """A stored tensor of zeros, on the device of a weight [out, in]"""
        return torch.zeros(self._scales_start + 4 * self.padded[0], dtype=torch.uint8, device=weight.device)

    def parts(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the stored tensor: values [padded out, padded in] and float32 scales [padded out]."""
        rows, columns = self.padded
        values = stored[: rows * columns].view(KINDS[self.kind])
        return values.view(rows, columns), stored[self._scales_start :].view(torch.float32)

    def dense(self, stored: Tensor, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
        """The weight [out, in] in ``dtype``; see ``ops.dense`` for ``after``."""
        values, scales = (part[: self.out_features] for part in self.parts(stored))
        return dense(values[:, : self.in_features], scales, dtype, after)

    def linear(self, x: Tensor, stored: Tensor, copies: tuple[Tensor, Grouping] | None = None) -> Tensor:
        """x [..., in] -> W x [..., out], plus ``copies``: values of slots, copied to the features of a grouping"""
        if not self.multiplies:
            return _with_copies(F.linear(x, self.dense(stored, x.dtype)), copies)
        values, scales = self.parts(stored)
        return _multiply(x, None, values.mT, scales, copies or (None, contiguous(self.out_features, self.out_features)))

    def linear_transposed(self, dy: Tensor, stored: Tensor, copies: tuple[Tensor, Grouping] | None = None) -> Tensor:
        """dy [..., out] -> W^T dy [..., in], plus ``copies`` as in :meth:`linear`"""
        if not self.multiplies:
            return _with_copies(dy @ self.dense(stored, dy.dtype, after=dy), copies)
        values, scales = self.parts(stored)
        before = scales[: self.out_features]
        return _multiply(dy, before, values, None, copies or (None, contiguous(self.in_features, self.in_features)))


def _multiply(
    x: Tensor, before: Tensor | None, matrix: Tensor, after: Tensor | None, copies: tuple[Tensor | None, Grouping]
) -> Tensor:
    """x [..., m] times before [m], in 8 bits, times matrix [>= m, n], times after [n] -> [..., features <= n]"""
    values, rows = quantize_rows(x.reshape(-1, x.shape[-1]), matrix.dtype, before, len(matrix))
    slots_of, grouping = copies
    slots_of = None if slots_of is None else slots_of.reshape(-1, slots_of.shape[-1])
    y = multiply_rows(values, rows, matrix, after, x.dtype, grouping, slots_of)
    return y.view(*x.shape[:-1], grouping.features)


def _with_copies(y: Tensor, copies: tuple[Tensor, Grouping] | None) -> Tensor:
    return y if copies is None else y + copies[1].copy(copies[0])


def with_products(
    method: MethodConfig, *, bf16: bool, capability: tuple[int, int] | None, vnni: bool
) -> tuple[MethodConfig, str | None]:
    """Replaces ``method.base_products: auto`` by what is faster on a machine; returns why, or None if it was given.

    ``capability`` is that of the GPU; None means a CPU, which has AVX512-VNNI if ``vnni``. Raises :class:`ConfigError`
    if a GPU cannot multiply as ``method.base`` says. A CPU computes fp8 in float32, with the same rounding.
    """
    kind = method.eight_bits
    if kind is None:
        return method, None
    reason = None
    fault = None if capability is None else _gpu_fault(kind, bf16=bf16, capability=capability)
    if method.base_products == "auto":
        if method.form in ("merged", "resident"):
            chosen, reason = method.form == "resident", f"method.form={method.form}"
        elif capability is not None:
            chosen = fault is None
            precision = "bf16" if bf16 else "float32"
            reason = f"a GPU of compute capability {'.'.join(map(str, capability))}, and a model in {precision}"
        elif kind == "fp8":
            chosen, reason = False, "CPUs compute fp8 in float32"
        else:
            chosen, reason = vnni, f"this CPU has {'' if vnni else 'no '}AVX512-VNNI"
        method = method.model_copy(update={"base_products": chosen})
    if method.base_products and fault is not None:
        raise ConfigError([f"method.base: {fault}"], "the settings")
    return method, reason


def _gpu_fault(kind: str, *, bf16: bool, capability: tuple[int, int]) -> str | None:
    """Why a GPU cannot multiply values of this kind, and what to do; None if it can."""
    remedy = "method.base_products=false" + (", or method.base=int8" if kind == "fp8" else "")
    if capability < OLDEST[kind]:
        needed, have = (".".join(map(str, version)) for version in (OLDEST[kind], capability))
        return f"{kind} products need compute capability {needed}, and this GPU has {have}; use {remedy}"
    if kind == "fp8" and not bf16:
        return f"the results of fp8 products are in bf16; use train.precision=bf16, or {remedy}"
    return None


Stored = Plain | EightBits
PLAIN = Plain()
