"""GaLore, Fira and APOLLO: Adam on a projection of a matrix's gradient, so that its moments are small.

Let G [s, l] be the gradient, transposed where the matrix has at least as many rows as columns, so that s <= l, and
r = min(``optim.projection_rank``, s). At step t of a matrix, counted from its last reset, with the betas b1 and b2,
all three do this, with element-wise products and quotients::

    P   = [s, r], renewed at t = 1 and whenever ``optim.projection_every`` steps have passed
    R   = P^T G                              [r, l]
    M  <- b1 M + (1 - b1) R
    V  <- b2 V + (1 - b2) R^2                a renewal of P keeps both moments
    N   = M / (sqrt(V) + eps)
    c   = sqrt(1 - b2^t) / (1 - b1^t)        Adam's correction of the bias, a factor of the whole step
    phi = |N column by column| / (|R column by column| + 1e-8)         [l], what Adam did to the norm of each column

and then, with a = ``optim.projection_scale``, a rate of 1 subtracts:

======  ==============================================================================================================
GaLore  c a P N, with P the first r left singular vectors of G (arXiv 2403.03507, algorithm 2)
Fira    c (a P N + limit((G - a P R) phi)), with the same P (arXiv 2410.01623)
APOLLO  c sqrt(a) limit(G phi), with P drawn from a normal distribution of variance 1 / r (arXiv 2412.05270)
======  ==============================================================================================================

limit() is Fira's norm-growth limiter: if a matrix's norm is more than 1.01 times (+ 1e-8) that of what limit() returned
in the step before, it is scaled down to 1.01 times that. Null for a means 0.25, and 1 for APOLLO; its paper's factor of
sqrt(s / r) is a = s / r.

The formulas are those of the released packages galore-torch 1.0, fira 1.0.2 and apollo-torch 1.0.3
(``scale_type="channel"``, ``scale_front=False``), also where the papers leave a choice: the bias is corrected after the
limiter, eps is added before it is, and Fira's a counts in the remainder too. Ours differ in this:

- A singular vector has no sign of its own, and the moments that a renewal keeps depend on it. Ours get the sign with
  which they have no negative product with the column of P that they replace. The packages take what the SVD returns,
  which is another for another library, or for the transposed matrix.
- APOLLO's numbers are drawn from (``train.seed``, the parameter's name, the number of the renewal), anew in each step,
  so that P is not kept. Another kind of device draws others. The packages draw from a parameter's place in the
  optimizer, and keep P.
- r is at most s for APOLLO too.
- P is never made from a gradient of zeros, such as that of a step without scored tokens, or of LoRA's A while B is
  zero. If P is due then, the matrix waits: its state stays as it is, its step is zero and is not counted, and P is made
  from the next gradient that is not zero. The packages take the vectors that the SVD of a zero matrix returns.
- limit() compares with the last norm above zero, and limits nothing before there is one. The packages let a matrix
  grow from 1e-8 after a gradient of zeros.
- Decay comes before the step, as in AdamW. All arithmetic is in float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from relora_mora.config.schema import OptimConfig
from relora_mora.optim.rules import COUNT, MatrixState
from relora_mora.system.seeds import derived_seed

NORM_GROWTH = 1.01
SMALL = 1e-8  # beside norms that are divided by


class _Projected(ABC):
    """What the three rules share; see :class:`relora_mora.optim.rules.MatrixRule`."""

    scale = 0.25
    keeps_projection = True
    keeps_norm = False
    products = 2  # of 2 r s l FLOPs
    held = 1  # matrices [r, l] beside the one that is subtracted

    def __init__(self, optim: OptimConfig) -> None:
        self.rank = optim.projection_rank
        self.every = optim.projection_every
        self.betas = optim.betas
        self.eps = optim.eps
        if optim.projection_scale is not None:
            self.scale = optim.projection_scale

    def update_moments(self, gradient: Tensor, moments: Mapping[str, Tensor]) -> None:  # noqa: B027 - there is nothing to add
        """Leaves the gradient as it is, which a projection needs whole."""

    def update(self, matrices: Tensor, states: Sequence[MatrixState]) -> Tensor:
        rows, columns = matrices.shape[-2:]
        for matrix, state in zip(matrices, states, strict=True):
            gradient = matrix if rows < columns else matrix.mT
            done = state.tensors[COUNT]
            if self._waits(gradient, int(done)):
                continue  # the step is zero, as the gradient is
            gradient.copy_(self._step(gradient, state, int(done)))
            done += 1
        return matrices

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        short, long = sorted((rows, columns))
        rank = min(self.rank, short)
        shapes: dict[str, tuple[int, ...]] = {"projected_avg": (rank, long), "projected_avg_sq": (rank, long)}
        if self.keeps_projection:
            shapes["projection"] = (short, rank)
        if self.keeps_norm:
            shapes["limited_norm"] = ()
        return {**shapes, COUNT: ()}

    def flops(self, rows: int, columns: int) -> float:
        """The products; the singular vectors of a renewal are not among them."""
        return self.products * 2.0 * rows * columns * min(self.rank, rows, columns)

    def workspace_bytes(self, rows: int, columns: int, *, on_gpu: bool) -> int:
        short, long = sorted((rows, columns))
        projected = min(self.rank, short) * long
        of_step = max(short * long + self.held * projected, 3 * projected)
        of_svd = short * long + short * short if self.keeps_projection else 0
        return 4 * max(of_step, of_svd)

    @abstractmethod
    def _step(self, gradient: Tensor, state: MatrixState, done: int) -> Tensor:
        """What a rate of 1 subtracts [s, l] for a gradient [s, l]; ``done`` steps have been made."""

    def _waits(self, gradient: Tensor, done: int) -> bool:
        """Whether P is due and the gradient [s, l] is zero, which has no directions.

        The count of steps then stays, so P is due again in the next step. The host asks a GPU for this only when P is
        due, and the decomposition has it wait anyway.
        """
        return self.keeps_projection and done % self.every == 0 and not gradient.any()

    def _singular(self, gradient: Tensor, state: MatrixState, done: int) -> Tensor:
        """P [s, r], renewed if that is due"""
        projection = state.tensors["projection"]
        if done % self.every == 0:
            left = torch.linalg.svd(gradient, full_matrices=False).U[:, : projection.shape[1]]
            along = (left * projection).sum(dim=0)
            largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))[0]  # its sign counts where P was zero
            against = torch.where(along == 0, largest, along) < 0
            projection.copy_(torch.where(against, -left, left))
        return projection

    def _adam(self, projected: Tensor, state: MatrixState) -> Tensor:
        """N [r, l] of R [r, l]; updates M and V"""
        average, squares = (state.tensors[key] for key in ("projected_avg", "projected_avg_sq"))
        first, second = self.betas
        average.lerp_(projected, 1 - first)
        squares.mul_(second).addcmul_(projected, projected, value=1 - second)
        return average / squares.sqrt().add_(self.eps)

    def _correction(self, done: int) -> float:
        """c of the next step"""
        first, second = self.betas
        return math.sqrt(1 - second ** (done + 1)) / (1 - first ** (done + 1))


class GaLore(_Projected):
    """Steps in the subspace alone."""

    def _step(self, gradient: Tensor, state: MatrixState, done: int) -> Tensor:
        projection = self._singular(gradient, state, done)
        adam = self._adam(projection.mT @ gradient, state)
        return (projection @ adam).mul_(self.scale * self._correction(done))


class Fira(_Projected):
    """GaLore's step, and what the subspace leaves of the gradient, scaled as Adam scales what is in it."""

    keeps_norm = True
    products = 3
    held = 2

    def _step(self, gradient: Tensor, state: MatrixState, done: int) -> Tensor:
        projection = self._singular(gradient, state, done)
        projected = projection.mT @ gradient
        adam = self._adam(projected, state)
        rest = torch.addmm(gradient, projection, projected, alpha=-self.scale)
        rest.mul_(_growth(adam, projected))
        _limit(rest, state.tensors["limited_norm"])
        return torch.addmm(rest, projection, adam, alpha=self.scale, out=rest).mul_(self._correction(done))


class Apollo(_Projected):
    """The gradient, each column scaled as Adam scales that of a random projection."""

    scale = 1.0
    keeps_projection = False
    keeps_norm = True
    products = 1

    def _step(self, gradient: Tensor, state: MatrixState, done: int) -> Tensor:
        projected = self._drawn(len(gradient), state.seed, done, gradient.device).mT @ gradient
        step = gradient * _growth(self._adam(projected, state), projected)
        _limit(step, state.tensors["limited_norm"])
        return step.mul_(math.sqrt(self.scale) * self._correction(done))

    def _drawn(self, short: int, seed: int, done: int, device: torch.device) -> Tensor:
        """P [s, r]"""
        rank = min(self.rank, short)
        generator = torch.Generator(device).manual_seed(derived_seed(seed, done // self.every))
        return torch.randn(short, rank, generator=generator, device=device).div_(math.sqrt(rank))


def _growth(adam: Tensor, projected: Tensor) -> Tensor:
    """phi [l] of N and R [r, l]"""
    return torch.linalg.vector_norm(adam, dim=0) / (torch.linalg.vector_norm(projected, dim=0) + SMALL)


def _limit(step: Tensor, last: Tensor) -> None:
    """limit() in place; ``last`` [] is the last norm above zero that it returned, and then that of this step."""
    norm = torch.linalg.vector_norm(step)
    excess = (norm / (last + SMALL)).clamp(min=NORM_GROWTH) / NORM_GROWTH
    divisor = torch.where(last > 0, excess, 1.0)
    step.div_(divisor)
    last.copy_(torch.where(norm > 0, norm / divisor, last))
