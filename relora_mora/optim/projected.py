"""Adam on a projection of a matrix's gradient, so that its moments are small: GaLore, Fira, APOLLO and APOLLO-Mini.
SUMO orthogonalizes the momentum of a projection.

Let G [s, l] be the gradient, transposed if the matrix has at least as many rows as columns, so that s <= l. Let
r = min(``optim.projection_rank``, s), and let b1 and b2 be the betas. At step t of a matrix, counted from its last
reset, all of them except SUMO compute, with element-wise products and quotients::

    P   = [s, r], renewed at t = 1 and whenever ``optim.projection_every`` steps have passed
    R   = P^T G                              [r, l]
    M  <- b1 M + (1 - b1) R
    V  <- b2 V + (1 - b2) R^2                a renewal of P keeps both moments
    N   = M / (sqrt(V) + eps)
    c   = sqrt(1 - b2^t) / (1 - b1^t)        Adam's bias correction, a factor of the whole step
    phi = |N column by column| / (|R column by column| + 1e-8)         [l], Adam's factor on the norm of each column

With a = ``optim.projection_scale``, the update to subtract at a rate of 1 is:

===========  =========================================================================================================
GaLore       c a P N, with P the first r left singular vectors of G (arXiv 2403.03507, algorithm 2)
Fira         c (a P N + limit((G - a P R) phi)), with the same P (arXiv 2410.01623)
APOLLO       c sqrt(a) limit(G phi), with P drawn from a normal distribution of variance 1 / r (arXiv 2412.05270)
APOLLO-Mini  the same with r = 1, a = 128, and one number for the whole matrix, phi = |N| / (|R| + 1e-8) (section 4.2
             there)
===========  =========================================================================================================

limit() is Fira's norm-growth limiter: if a matrix's norm exceeds 1.01 times the norm (+ 1e-8) that limit() returned in
the previous step, the matrix is scaled down to 1.01 times that norm. The default of a (null) is 0.25, and 1 for APOLLO,
for which a = s / r gives the paper's factor of sqrt(s / r).

The formulas match the released packages galore-torch 1.0, fira 1.0.2 and apollo-torch 1.0.3 (with
``scale_front=False``; ``scale_type="channel"`` for APOLLO, ``"tensor"`` for APOLLO-Mini), also if the papers leave a
choice: the bias is corrected after the limiter, eps is added before that, and Fira's a applies to the remainder too.
Our code differs in these points:

- The sign of a singular vector is arbitrary, but the moments that survive a renewal depend on it. We choose the sign
  that gives a nonnegative product with the column of P that the vector replaces. The packages keep the sign that the
  SVD returns, which depends on the library and on whether the matrix is transposed.
- APOLLO draws P again in each step, from (``train.seed``, the parameter's name, the number of the renewal), so P is not
  stored. The draws depend on the kind of device. The packages draw by a parameter's position in the optimizer, and
  store P.
- r is at most s for APOLLO too. r and a of APOLLO-Mini are fixed; in the package they are settings.
- P is never computed from a zero gradient, as in a step without scored tokens, or for LoRA's A while B is zero. If P is
  due then, the matrix waits: its state does not change, its step is zero and is not counted, and P is computed from the
  next nonzero gradient. The packages use the vectors that the SVD of a zero matrix returns.
- limit() compares with the last norm above zero, and does not limit before there is one. In the packages, a matrix has
  to grow from 1e-8 again after a zero gradient.
- Decay comes before the step, as in AdamW. All arithmetic is in float32.

SUMO (arXiv 2505.24749, algorithm 1) has GaLore's P. With momentum mu = ``optim.momentum``, a step is::

    M  <- P^T P_old M                        [r, l], only if P was renewed: the momentum in the new subspace
    M  <- mu M + (1 - mu) P^T G
    O   = U V^T, of the singular value decomposition M = U S V^T
    a sqrt(max(m, n)) P limit(O)             the update; a is 0.2 by default

At r = s, this is Muon without Nesterov's momentum, and with exact singular values of 1. It differs from the paper:

- The paper's P multiplies the longer side, so its M is [r, s]. Both have the same amount of state.
- M is a mean of gradients instead of their sum. O does not depend on that.
- Singular values of M that are zero up to rounding stay zero, since their singular vectors are arbitrary. So O may have
  a norm below sqrt(r), and limit() allows it to grow by a factor of 1.1 per step, as in the paper.
- The paper names the factor sqrt(max(m, n)), but not a, which is Moonlight's, as for Muon.
- The paper also steps by the remainder G - P P^T G as it is. Its size follows the gradient's size, and not that of the
  rest of the step: with clipped gradients it is next to nothing. We leave it out.
- P is computed by a full SVD and not by a random one. Zero gradients are treated as above.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from relora_mora.config.optim import OptimConfig
from relora_mora.optim.rules import COUNT, MatrixState
from relora_mora.system.seeds import derived_seed

NORM_GROWTH = 1.01
SMALL = 1e-8  # added to a norm in a denominator


class _Projected(ABC):
    """The common part of these rules; see :class:`relora_mora.optim.rules.MatrixRule`."""

    scale = 0.25
    moments: tuple[str, ...] = ("projected_avg", "projected_avg_sq")  # [r, l]
    keeps_projection = True
    keeps_norm = False
    products = 2  # matrix products, each of 2 r s l FLOPs
    new_update = True  # the update [s, l] is not computed in the gradient's place
    projected_buffers = 1  # [r, l] matrices that exist in addition to the update

    def __init__(self, optim: OptimConfig) -> None:
        self.rank = optim.projection_rank
        self.every = optim.projection_every
        self.betas = optim.betas
        self.eps = optim.eps
        if optim.projection_scale is not None:
            self.scale = optim.projection_scale

    def update_moments(self, gradient: Tensor, moments: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Does nothing: the projection needs the whole gradient."""

    def update(self, matrices: Tensor, states: Sequence[MatrixState]) -> Tensor:
        rows, columns = matrices.shape[-2:]
        for matrix, state in zip(matrices, states, strict=True):
            gradient = matrix if rows < columns else matrix.mT
            count = state.tensors[COUNT]
            done = int(count)
            # A zero gradient has no singular vectors. The step is then zero too and is not counted, so P is due again.
            # The host waits for a GPU here only if P is due, and then the SVD makes it wait anyway.
            if self.keeps_projection and done % self.every == 0 and not gradient.any():
                continue
            gradient.copy_(self._step(gradient, state, done))
            count += 1
        return matrices

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        short, long = sorted((rows, columns))
        rank = min(self.rank, short)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(self.moments, (rank, long))
        if self.keeps_projection:
            shapes["projection"] = (short, rank)
        if self.keeps_norm:
            shapes["limited_norm"] = ()
        return {**shapes, COUNT: ()}

    def flops(self, rows: int, columns: int) -> float:
        """FLOPs of the products, without the SVD of a renewal."""
        return self.products * 2.0 * rows * columns * min(self.rank, rows, columns)

    def workspace_bytes(self, rows: int, columns: int, *, on_gpu: bool) -> int:
        short, long = sorted((rows, columns))
        projected = min(self.rank, short) * long
        step_elements = max(self.new_update * short * long + self.projected_buffers * projected, 3 * projected)
        svd_elements = short * long + short * short if self.keeps_projection else 0
        return 4 * max(step_elements, svd_elements)

    @abstractmethod
    def _step(self, gradient: Tensor, state: MatrixState, done: int) -> Tensor:
        """The update [s, l] at a rate of 1 for a gradient [s, l], which it may overwrite, after ``done`` steps."""

    def _singular(self, gradient: Tensor, state: MatrixState, done: int) -> Tensor:
        """P [s, r], renewed if it is due"""
        projection = state.tensors["projection"]
        if done % self.every == 0:
            left = torch.linalg.svd(gradient, full_matrices=False).U[:, : projection.shape[1]]
            along = (left * projection).sum(dim=0)
            largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))[0]  # decides the sign if P was zero
            flipped = torch.where(along == 0, largest, along) < 0
            projection.copy_(torch.where(flipped, -left, left))
        return projection

    def _adam(self, projected: Tensor, state: MatrixState) -> Tensor:
        """R [r, l] -> N [r, l]; updates M and V"""
        average, squares = (state.tensors[key] for key in ("projected_avg", "projected_avg_sq"))
        first, second = self.betas
        average.lerp_(projected, 1 - first)
        squares.mul_(second).addcmul_(projected, projected, value=1 - second)
        return average / squares.sqrt().add_(self.eps)

    def _correction(self, done: int) -> float:
        """c in the step after ``done`` steps"""
        first, second = self.betas
        return math.sqrt(1 - second ** (done + 1)) / (1 - first ** (done + 1))


class GaLore(_Projected):
    """Adam's step inside the subspace, and nothing outside it."""

    def _step(self, gradient: Tensor, state: MatrixState, done: int) -> Tensor:
        projection = self._singular(gradient, state, done)
        adam = self._adam(projection.mT @ gradient, state)
        return (projection @ adam).mul_(self.scale * self._correction(done))


class Fira(_Projected):
    """GaLore's step plus the gradient's remainder outside the subspace, scaled as Adam scales the part inside."""

    keeps_norm = True
    products = 3
    projected_buffers = 2

    def _step(self, gradient: Tensor, state: MatrixState, done: int) -> Tensor:
        projection = self._singular(gradient, state, done)
        projected = projection.mT @ gradient
        adam = self._adam(projected, state)
        rest = torch.addmm(gradient, projection, projected, alpha=-self.scale)
        rest.mul_(_growth(adam, projected))
        _limit(rest, state.tensors["limited_norm"])
        return torch.addmm(rest, projection, adam, alpha=self.scale, out=rest).mul_(self._correction(done))


class Apollo(_Projected):
    """The gradient, with each column scaled as Adam scales that column of a random projection."""

    scale = 1.0
    keeps_projection = False
    keeps_norm = True
    products = 1
    new_update = False
    normed: int | None = 0  # the dimension that phi takes norms over; None for both

    def _step(self, gradient: Tensor, state: MatrixState, done: int) -> Tensor:
        projected = self._drawn(len(gradient), state.seed, done, gradient.device).mT @ gradient
        step = gradient.mul_(_growth(self._adam(projected, state), projected, self.normed))
        _limit(step, state.tensors["limited_norm"])
        return step.mul_(math.sqrt(self.scale) * self._correction(done))

    def _drawn(self, short: int, seed: int, done: int, device: torch.device) -> Tensor:
        """P [s, r]"""
        rank = min(self.rank, short)
        generator = torch.Generator(device).manual_seed(derived_seed(seed, done // self.every))
        return torch.randn(short, rank, generator=generator, device=device).div_(math.sqrt(rank))


class ApolloMini(Apollo):
    """The gradient, scaled as Adam scales a random projection of rank 1."""

    normed = None

    def __init__(self, optim: OptimConfig) -> None:
        super().__init__(optim)
        self.rank = 1
        self.scale = 128.0


class Sumo(_Projected):
    """Muon inside the subspace, with an exact orthogonalization, and nothing outside it."""

    scale = 0.2
    moments = ("projected_avg",)
    keeps_norm = True
    growth = 1.1

    def __init__(self, optim: OptimConfig) -> None:
        super().__init__(optim)
        self.momentum = optim.momentum

    def flops(self, rows: int, columns: int) -> float:
        """FLOPs of the products, without the SVDs: one of [r, l] in every step, and that of a renewal."""
        rank = min(self.rank, rows, columns)
        return super().flops(rows, columns) + 2.0 * rank * rank * max(rows, columns)

    def _step(self, gradient: Tensor, state: MatrixState, done: int) -> Tensor:
        momentum, projection = (state.tensors[key] for key in ("projected_avg", "projection"))
        renewed = done > 0 and done % self.every == 0
        before = projection.clone() if renewed else None
        self._singular(gradient, state, done)
        if before is not None:
            momentum.copy_(projection.mT @ before @ momentum)
        momentum.lerp_(projection.mT @ gradient, 1 - self.momentum)
        orthogonal = _orthogonal(momentum)
        _limit(orthogonal, state.tensors["limited_norm"], self.growth)
        return (projection @ orthogonal).mul_(self.scale * math.sqrt(gradient.shape[1]))


def _orthogonal(matrix: Tensor) -> Tensor:
    """U S V^T -> U V^T, without the vectors of singular values that are zero up to rounding"""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    left *= values > values[0] * max(matrix.shape) * torch.finfo(values.dtype).eps
    return left @ right


def _growth(adam: Tensor, projected: Tensor, normed: int | None = 0) -> Tensor:
    """N and R [r, l] -> phi, [l] or []"""
    return torch.linalg.vector_norm(adam, dim=normed) / (torch.linalg.vector_norm(projected, dim=normed) + SMALL)


def _limit(step: Tensor, last: Tensor, growth: float = NORM_GROWTH) -> None:
    """limit() in place. ``last`` [] holds the last norm above zero that it returned, and is updated."""
    norm = torch.linalg.vector_norm(step)
    excess = (norm / (last + SMALL)).clamp(min=growth) / growth
    divisor = torch.where(last > 0, excess, 1.0)
    step.div_(divisor)
    last.copy_(torch.where(norm > 0, norm / divisor, last))
