"""Registers the kernels as operators of torch, and defines the functions that call them.

An operator has a schema, a fake implementation that computes only shapes (for torch.compile), and one kernel per
device: a line of ``_KERNELS``. The devices are in :func:`kernels_here`. Groupings are passed as lists of integers,
because a schema cannot have a type for them.

This uses ``torch.library.define`` because the wrapper of ``torch.library.custom_op`` takes several times as long
(docs/performance.md).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from relora_mora.kernels import cpu, cuda, reference
from relora_mora.kernels.grouping import Grouping

LIBRARY = torch.library.Library("relora_mora", "DEF")
_ANY_LAYOUT = torch.Tag.flexible_layout  # tells the compiler not to copy inputs into another layout
LIBRARY.define("group_sums(Tensor[] xs, int[] grouping) -> Tensor", tags=_ANY_LAYOUT)
LIBRARY.define(
    "expand_add(Tensor weight, Tensor square, int[] inputs, int[] outputs, Tensor? after=None) -> Tensor",
    tags=_ANY_LAYOUT,
)
LIBRARY.define("rotary_add(Tensor weight, Tensor square, Tensor? after=None) -> Tensor", tags=_ANY_LAYOUT)
LIBRARY.define("cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor scale, int ignore, bool gradient) -> Tensor")


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
_enabled = True


def _fake_group_sums(xs: Sequence[Tensor], grouping: Sequence[int]) -> Tensor:
    return xs[0].new_empty(*xs[0].shape[:-1], len(xs) * Grouping.of_numbers(grouping).slots)


def _fake_add(weight: Tensor, *others: Any) -> Tensor:
    return weight.new_empty(weight.shape)


def _fake_cross_entropy_(logits: Tensor, labels: Tensor, scale: Tensor, ignore: int, gradient: bool) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _sum_by(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(xs: Sequence[Tensor], grouping: Sequence[int]) -> Tensor:
        assert all(x.shape == xs[0].shape for x in xs)  # kernels read only the first shape
        return function(xs, Grouping.of_numbers(grouping))

    return call


def _add_by(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda weight, square, inputs, outputs, after=None: function(
        weight, square, Grouping.of_numbers(inputs), Grouping.of_numbers(outputs)
    )


_cuda_group_sums = cuda.kernel("relora_mora.kernels.triton_groups:group_sums")
_cuda_expand_add = cuda.kernel("relora_mora.kernels.triton_groups:expand_add")
_cuda_cross_entropy_ = cuda.kernel("relora_mora.kernels.triton_loss:cross_entropy_")

# the implementations of each operator: fake, CPU, CUDA
_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "group_sums": (_fake_group_sums, _sum_by(cpu.group_sums), _sum_by(_cuda_group_sums)),
    "expand_add": (_fake_add, _add_by(cpu.expand_add), _add_by(_cuda_expand_add)),
    "rotary_add": (_fake_add, reference.rotary_add, reference.rotary_add),
    "cross_entropy_": (_fake_cross_entropy_, cpu.cross_entropy_, _cuda_cross_entropy_),
}

for _name, (_fake, _on_cpu, _on_cuda) in _KERNELS.items():
    torch.library.register_fake(f"relora_mora::{_name}", _fake)
    LIBRARY.impl(_name, _on_cpu, "CPU")
    LIBRARY.impl(_name, _on_cuda, "CUDA")

_group_sums = torch.ops.relora_mora.group_sums.default
_expand_add = torch.ops.relora_mora.expand_add.default
_rotary_add = torch.ops.relora_mora.rotary_add.default
_cross_entropy_ = torch.ops.relora_mora.cross_entropy_.default


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Inside this context, torch operations compute everything."""
    global _enabled
    before = _enabled
    _enabled = False
    try:
        yield
    finally:
        _enabled = before


def supports(*tensors: Tensor) -> bool:
    """Whether kernels can compute with these tensors: device and dtype fit, and autograd does not record them."""
    dtype = tensors[0].dtype
    if not _enabled or dtype not in _DEVICES.get(tensors[0].device.type, ()):
        return False
    records = torch.is_grad_enabled()
    return all(t.dtype == dtype and not (records and t.requires_grad) for t in tensors)


def group_sum(x: Tensor, grouping: Grouping) -> Tensor:
    """x [..., features] -> [..., slots], the sum of each slot's features; differentiable."""
    return _group_sums([x], grouping.numbers) if supports(x) else grouping.sum(x)


def group_sums(xs: Sequence[Tensor], grouping: Grouping) -> Tensor:
    """n tensors [..., features] of one shape -> [..., n * slots], their sums next to each other; differentiable."""
    return _group_sums(xs, grouping.numbers) if supports(*xs) else torch.cat([grouping.sum(x) for x in xs], -1)


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
