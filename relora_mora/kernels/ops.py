"""Registers the kernels as operators of torch, and defines the functions that call them.

An operator has a schema, a fake implementation that computes only shapes (for torch.compile), and one kernel per
device. The devices are in :func:`kernels_here`. Groupings are passed as lists of integers, because a schema cannot have
a type for them.

This uses ``torch.library.define`` because the wrapper of ``torch.library.custom_op`` takes several times as long.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from relora_mora.kernels import cpu, cuda, reference
from relora_mora.kernels.grouping import Grouping

LIBRARY = torch.library.Library("relora_mora", "DEF")
FEWEST_ROWS = 32  # that a GPU multiplies in 8 bits


def kernels_here() -> dict[str, tuple[torch.dtype, ...]]:
    """The dtypes that kernels support, by the type of device."""
    devices = {}
    if cpu.available():
        devices["cpu"] = cpu.DTYPES
    if cuda.obstacle() is None:
        devices["cuda"] = cuda.DTYPES
    return devices


def describe(device: str = "cpu") -> str:
    """What computes the operators on a device of this type, with the reason if it is not our kernels."""
    return cuda.describe() if device == "cuda" else cpu.describe()


_DEVICES = kernels_here()
enabled = True  # if not, torch operations compute everything


def _operator(
    schema: str,
    fake: Callable[..., Any],
    on_cpu: Callable[..., Any],
    on_cuda: Callable[..., Any],
    *,
    tags: Any = torch.Tag.flexible_layout,  # tells the compiler not to copy inputs into another layout
) -> Any:
    """Registers an operator of torch, and returns it. A kernel gets groupings in place of the schema's integers."""
    name = schema.partition("(")[0]
    groupings = [place for place, argument in enumerate(schema.split(", ")) if "int[] " in argument]

    def decoded(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            arguments = list(given)
            for place in groupings:
                arguments[place] = Grouping.of_numbers(arguments[place])
            return kernel(*arguments)

        return call if groupings else kernel

    LIBRARY.define(schema, tags=tags)
    torch.library.register_fake(f"relora_mora::{name}", decoded(fake))
    LIBRARY.impl(name, decoded(on_cpu), "CPU")
    LIBRARY.impl(name, decoded(on_cuda), "CUDA")
    return getattr(torch.ops.relora_mora, name).default


def _without_after(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda weight, square, inputs, outputs, after=None: kernel(weight, square, inputs, outputs)


def _quantize_on_cpu(x: Tensor, kind: torch.dtype, columns: Tensor | None, padded: int) -> tuple[Tensor, Tensor]:
    if kind is not torch.int8:
        return reference.quantize_rows(x, kind, columns, padded)
    return cpu.quantize_rows(x, columns, padded)


_group_sum = _operator(
    "group_sum(Tensor x, int[] grouping) -> Tensor",
    lambda x, grouping: x.new_empty(*x.shape[:-1], grouping.slots),
    cpu.group_sum,
    cuda.kernel("relora_mora.kernels.triton_groups:group_sum"),
)
_expand_add = _operator(
    "expand_add(Tensor weight, Tensor square, int[] inputs, int[] outputs, Tensor? after=None) -> Tensor",
    lambda weight, *_: weight.new_empty(weight.shape),
    _without_after(cpu.expand_add),
    _without_after(cuda.kernel("relora_mora.kernels.triton_groups:expand_add")),
)
_rotary_add = _operator(
    "rotary_add(Tensor weight, Tensor square, Tensor? after=None) -> Tensor",
    lambda weight, *_: weight.new_empty(weight.shape),
    reference.rotary_add,
    reference.rotary_add,
)
_dense = _operator(
    "dense(Tensor values, Tensor scales, ScalarType dtype, Tensor? after) -> Tensor",
    lambda values, scales, dtype, after: values.new_empty(values.shape, dtype=dtype),
    reference.dense,
    reference.dense,
)
_quantize_rows = _operator(
    "quantize_rows(Tensor x, ScalarType kind, Tensor? columns, int padded) -> (Tensor, Tensor)",
    lambda x, kind, columns, padded: (
        x.new_empty(len(x), padded, dtype=kind),
        x.new_empty(len(x), dtype=torch.float32),
    ),
    _quantize_on_cpu,
    cuda.kernel("relora_mora.kernels.triton_eight:quantize_rows"),
)
_scale_rows = _operator(
    "scale_rows(Tensor sums, Tensor rows, Tensor? columns, Tensor? slots_of, int[] grouping, ScalarType dtype)"
    " -> Tensor",
    lambda sums, rows, columns, slots_of, grouping, dtype: sums.new_empty(len(sums), grouping.features, dtype=dtype),
    cpu.scale_rows,
    cuda.kernel("relora_mora.kernels.triton_eight:scale_rows"),
)
_cross_entropy_ = _operator(
    "cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor scale, int ignore, bool gradient) -> Tensor",
    lambda logits, *_: logits.new_empty(logits.shape[0], dtype=torch.float32),
    cpu.cross_entropy_,
    cuda.kernel("relora_mora.kernels.triton_loss:cross_entropy_"),
    tags=(),
)


def supports(*tensors: Tensor) -> bool:
    """Whether kernels can compute with these tensors: device and dtype fit, and autograd does not record them.

    They have no derivatives of their own, so in forward mode (``torch.func.jvp``) and in a ``torch.jit.trace`` torch
    operations compute everything.
    """
    dtype = tensors[0].dtype
    if not enabled or dtype not in _DEVICES.get(tensors[0].device.type, ()):
        return False
    if forward_ad._current_level >= 0 or torch.jit.is_tracing():
        return False
    records = torch.is_grad_enabled()
    return all(t.dtype == dtype and not (records and t.requires_grad) for t in tensors)


def group_sum(x: Tensor, grouping: Grouping) -> Tensor:
    """x [..., features] -> [..., slots], the sum of each slot's features; differentiable."""
    return _group_sum(x, grouping.numbers) if supports(x) else grouping.sum(x)


def expand_add(
    weight: Tensor, square: Tensor, inputs: Grouping, outputs: Grouping, after: Tensor | None = None
) -> Tensor:
    """weight [out, in] + D square C: square [R, R], C = ``inputs.sum``, D = ``outputs.copy``; not differentiable.

    ``after`` is not read. If it is a gradient, a compiler has to compute this sum in backward, and cannot keep the
    equal one of forward until then.
    """
    if outputs.once and supports(weight, square):
        return _expand_add(weight, square, inputs.numbers, outputs.numbers, after)
    return reference.expand_add(weight, square, inputs, outputs)


def rotary_add(weight: Tensor, square: Tensor, after: Tensor | None = None) -> Tensor:
    """weight [out, in] + D square C of the rotary operator; not differentiable. See :func:`expand_add` for ``after``.

    It is an operator so that a compiler does not generate loads of ``square``, which would assume the alignment of one
    layer's square for all layers.
    """
    return _rotary_add(weight, square, after)


def dense(values: Tensor, scales: Tensor, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
    """values [n, m] times float32 scales [n], in ``dtype``; not differentiable.

    It is an operator so that a compiler computes it again in backward; see :func:`expand_add` for ``after``.
    """
    result: Tensor = _dense(values, scales, dtype, after)
    return result


def quantize_rows(
    x: Tensor, kind: torch.dtype, columns: Tensor | None = None, padded: int | None = None
) -> tuple[Tensor, Tensor]:
    """x [n, m] -> 8-bit values [n, ``padded`` (default m)] and float32 scales [n]: ``x columns = values * scales``.

    ``columns`` [m] are float32 factors of x. The largest element of a row becomes the largest value of ``kind`` (int8:
    127, float8_e4m3fn: 448), and the others are rounded to the nearest value, ties to even. The columns beyond m are
    zero. The scale of a row with a number that is not finite is not finite either; its values are arbitrary then.
    """
    padded = x.shape[1] if padded is None else padded
    if supports(x) and not _compiler_fuses(x):
        values, scales = _quantize_rows(x, kind, columns, padded)
        return values, scales
    return reference.quantize_rows(x, kind, columns, padded)


def multiply_rows(
    values: Tensor,
    rows: Tensor,
    matrix: Tensor,
    columns: Tensor | None,
    dtype: torch.dtype,
    grouping: Grouping,
    slots_of: Tensor | None = None,
) -> Tensor:
    """values [n, k] and rows [n] of :func:`quantize_rows`, matrix [k, p] of the same kind -> [n, m] in ``dtype``.

    The result is ``values matrix * rows * columns``, without columns beyond m, plus the copies of slots_of [n, slots],
    if any. ``grouping`` has m features; columns [p] (None: 1) are float32. Sums are exact for int8, and float32 for
    float8_e4m3fn. On a GPU all sizes but n must be multiples of 16.
    """
    n = len(values)
    if values.is_cuda and n < FEWEST_ROWS:
        values = F.pad(values, (0, 0, 0, FEWEST_ROWS - n))
    if values.dtype is torch.int8:
        return scale_rows(torch._int_mm(values, matrix)[:n], rows, columns, dtype, grouping, slots_of)
    if not values.is_cuda:
        return scale_rows(values.float() @ matrix.float(), rows, columns, dtype, grouping, slots_of)
    scales = rows if n == len(values) else F.pad(rows, (0, len(values) - n))
    columns = rows.new_ones(matrix.shape[1]) if columns is None else columns
    by_column = matrix if matrix.stride(0) == 1 else matrix.mT.contiguous().mT  # the layout that matrix units read
    product = torch._scaled_mm(values, by_column, scales.unsqueeze(1), columns.unsqueeze(0), out_dtype=torch.bfloat16)
    y = product[:n, : grouping.features].to(dtype)
    return y if slots_of is None else y + grouping.copy(slots_of)


def scale_rows(
    sums: Tensor,
    rows: Tensor,
    columns: Tensor | None,
    dtype: torch.dtype,
    grouping: Grouping,
    slots_of: Tensor | None = None,
) -> Tensor:
    """sums [n, p] -> ``sums * rows * columns`` [n, m]; see :func:`multiply_rows`."""
    supported = sums.dtype is torch.int32 and supports(rows) and dtype in _DEVICES[sums.device.type]
    if supported and not _compiler_fuses(sums):
        result: Tensor = _scale_rows(sums, rows, columns, slots_of, grouping.numbers, dtype)
        return result
    return reference.scale_rows(sums, rows, columns, dtype, grouping, slots_of)


def _compiler_fuses(x: Tensor) -> bool:
    """Whether a compiler can compute torch operations on x together with their neighbors, which a kernel cannot."""
    return x.is_cuda and torch.compiler.is_compiling()


def cross_entropy_(
    logits: Tensor, labels: Tensor, *, ignore: int, scale: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum of negative log-likelihoods of labels [N] under logits [N, V], a float32 scalar, and its gradient [N, V].

    With ``gradient``, the second result is the gradient of ``scale`` times the sum, in the dtype of the logits, and the
    logits may be overwritten; otherwise it is None. ``scale`` is a float32 scalar on their device. Labels equal to
    ``ignore`` (a negative number) are not scored. All arithmetic is in float32. If :func:`supports` is true, the logits
    are not copied. A label outside the vocabulary raises IndexError in the CPU kernel. In the GPU kernel it makes the
    sum NaN, because checking it would wait for the device.
    """
    assert scale.device == logits.device, "a kernel cannot read scale on another device"
    if supports(logits):
        losses = _cross_entropy_(logits, labels, scale, ignore, gradient)
        d_logits = logits if gradient else None
    else:
        losses, d_logits = reference.cross_entropy(logits, labels, ignore=ignore, scale=scale, gradient=gradient)
    return losses.sum(), d_logits
