"""AdamW whose two moments have 8 bits per element: a quarter of AdamW's state.

A row of a matrix is divided into blocks (arXiv 2110.02861, section 2.1), and each block has a float32 scale for each
moment. The codes c in [-127, 127] and d in [1, 255] of an element are square roots of its moments, because a root loses
less of small values. With the scales s and t of its block::

    M = s c |c|         int8,  s = the block's largest |M| / 127^2
    V = (t d)^2         uint8, t = the block's largest sqrt(V) / 255

A step decodes the moments, updates them as Adam does, steps by their float32 values, and encodes them again.

**Rounding.** At step k of the matrix, the size of a code becomes floor(size + u), where u is the fractional part of
k (sqrt(5) - 1) / 2. The u of consecutive steps are spread evenly over [0, 1), so a moment that changes by less
than a code per step, such as V at a beta of 0.999, changes at the right rate. Codes that are rounded to the nearest
integer would not change at all, and codes that are rounded up could not decay. u needs neither memory nor a generator,
so a resume continues with the same bits.

**Bounded steps.** d is at least 1, even if V is zero: an element whose sqrt(V) were rounded to 0 would step by M / eps.
So rounding leaves at least half of sqrt(V), and the smallest M above zero is a 16,129th of the block's largest, whereas
the smallest sqrt(V) is a 255th. No step is longer than twice the longest that Adam can take, in a test with elements of
very different sizes. An element that is more than 255 times smaller than the largest of its block takes smaller steps
than with AdamW.

Blocks belong to the matrix and not to the part of it that a rank holds, so a checkpoint stores the codes themselves,
and a run can move to any number of ranks and any ZeRO stage. The released 8-bit optimizers (bitsandbytes, torchao) cut
each tensor that they are given into blocks. Under ZeRO that is a rank's partition, whose blocks do not fit another
number of ranks.
"""

import math

import torch
from torch import Tensor

from relora_mora.config.optim import OptimConfig
from relora_mora.optim.rules import COUNT, MatrixRule, MatrixState

LARGEST_BLOCK = 256
SMALLEST_BLOCK = 16  # if no smaller block divides a row, the row is one block
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
AT_ONCE = 2**18  # elements that are decoded together on a CPU
AT_ONCE_ON_GPU = 2**22
GOLDEN = (math.sqrt(5) - 1) / 2


class AdamW8bit(MatrixRule):
    """Its blocks belong to whole matrices, so it has no moments."""

    def __init__(self, optim: OptimConfig) -> None:
        self.betas = optim.betas
        self.eps = optim.eps

    def update(self, gradient: Tensor, state: MatrixState) -> Tensor:
        """Overwrites the gradient."""
        columns = gradient.shape[-1]
        block = _block(columns)
        rows = max(1, (AT_ONCE_ON_GPU if gradient.is_cuda else AT_ONCE) // columns)
        step = state[COUNT].add_(1).double()
        first, second = self.betas
        correction = 1 - first**step
        # the factor of the root, what is added to it, and the offset of rounding: tensors, which nobody waits for
        numbers = correction / torch.sqrt(1 - second**step), correction * self.eps, step * GOLDEN % 1
        kept = (state[key] for key in self.state_shapes(1, columns) if key != COUNT)
        blocks = (each.unflatten(1, (columns // block, -1)).split(rows) for each in (gradient, *kept))
        for part, codes, scales, root_codes, root_scales in zip(*blocks, strict=True):
            self._step(part, codes, scales, root_codes, root_scales, *numbers)
        return gradient

    def _step(
        self,
        gradient: Tensor,
        codes: Tensor,
        scales: Tensor,
        root_codes: Tensor,
        root_scales: Tensor,
        factor: Tensor,
        epsilon: Tensor,
        offset: Tensor,
    ) -> None:
        """Overwrites gradients [rows, blocks, elements] with updates; the scales are [rows, blocks, 1]."""
        first, second = self.betas
        average = codes.float()
        average.mul_(average.abs()).mul_(scales).lerp_(gradient, 1 - first)
        root = root_codes.float().mul_(root_scales * math.sqrt(second)).square_()
        root.addcmul_(gradient, gradient, value=1 - second).sqrt_()
        torch.mul(root, factor, out=gradient).add_(epsilon)
        torch.div(average, gradient, out=gradient)
        _rescale(root, root_scales, 255)
        root_codes.copy_(root.add_(offset).clamp_(1, 255))
        size = torch.abs(average, out=root)
        _rescale(size, scales, 127**2)
        codes.copy_(size.sqrt_().add_(offset).clamp_(max=127).copysign_(average))

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        scales = rows, columns // _block(columns)
        return {
            "exp_avg_codes": (rows, columns),
            "exp_avg_scales": scales,
            "exp_avg_sq_codes": (rows, columns),
            "exp_avg_sq_scales": scales,
            COUNT: (),
        }

    def workspace_bytes(self, rows: int, columns: int, *, on_gpu: bool) -> int:
        at_once = max(1, (AT_ONCE_ON_GPU if on_gpu else AT_ONCE) // columns)
        return 2 * 4 * min(rows, at_once) * columns


def _rescale(values: Tensor, scales: Tensor, largest: int) -> None:
    """Divides each block of values from 0 on by its scale, which makes its largest one ``largest``."""
    torch.amax(values, dim=-1, keepdim=True, out=scales)
    values.div_(scales.div_(largest).clamp_(min=SMALLEST_SCALE))


def _block(columns: int) -> int:
    """The size of a block in a row: a divisor of its length."""
    sizes = range(min(columns, LARGEST_BLOCK), SMALLEST_BLOCK - 1, -1)
    return next((size for size in sizes if columns % size == 0), columns)
