"""Muon, Muon with Polar Express, and NorMuon: a matrix steps along its orthogonalized momentum.

Muon is by Keller Jordan, https://kellerjordan.github.io/posts/muon. With the gradient G [m, n], momentum mu, rate eta
and weight decay lambda, a step of W is::

    B <- mu B + (1 - mu) G
    U  = mu B + (1 - mu) G        with ``optim.nesterov``, else B
    W <- (1 - eta lambda) W - eta 0.2 sqrt(max(m, n)) NS(U)

NS brings the singular values of U to about one, so the step's elements have a root mean square of about 0.2, like
AdamW's. The factor and the decay come from Moonlight (arXiv 2502.16982, section 2.2).

**Polar Express** (arXiv 2505.16932) replaces NS. Each of its iterations has coefficients of its own: the odd polynomial
of degree 5 whose largest distance from 1 is smallest, on the interval that the iterations before it leave of [0.001, 1]
(``tests/optim/test_muon.py`` computes them). Two changes are for bf16: an interval begins at 1/50 of its end or above,
and U and all polynomials but the last are scaled down by 1.02, so that rounding does not leave the interval. These are
the constants of modded-nanogpt; the paper has 0.024 and 1.01. That code also adds 1e-6 to the norm of U. We do not, so
the result does not depend on the size of U.

**NorMuon** (arXiv 2510.05491) balances the rows of a matrix, which are the output neurons of a weight. With beta2 =
``optim.betas[1]``, eps = ``optim.eps`` and the rows o_i of O = NS(U) [m, n]::

    v_i <- beta2 v_i + (1 - beta2) mean(o_i^2)
    p_i  = o_i / (sqrt(v_i) + eps)
    W   <- (1 - eta lambda) W - eta 0.2 sqrt(max(m, n)) (|O| / |P|) P

The norm of O is kept, as in the authors' code. Their paper takes the norm that O would have if all its singular values
were exactly 1. Their code has a fixed eps of 1e-10, and beta2 = 0.95 by default. A factor of all v_i cancels, so v
needs no bias correction. A zero O makes no step, and v only decays.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from relora_mora.config.optim import OptimConfig
from relora_mora.optim.rules import MatrixState

ITERATIONS = 5
Polynomials = tuple[tuple[float, float, float], ...]  # coefficients of x, x^3, x^5 for each iteration
NEWTON_SCHULZ: Polynomials = ((3.4445, -4.7750, 2.0315),) * ITERATIONS  # steep at zero; takes all of (0, 1] to about 1
POLAR_EXPRESS: Polynomials = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SAFETY = 1.02  # of Polar Express
SMALLEST_NORM = 1e-7  # a U below this norm is not scaled up to norm 1


class Muon:
    """Muon's :class:`relora_mora.optim.rules.MatrixRule`."""

    def __init__(self, optim: OptimConfig) -> None:
        self.momentum = optim.momentum
        self.nesterov = optim.nesterov

    def update_moments(self, gradient: Tensor, moments: Mapping[str, Tensor]) -> None:
        momentum = moments["momentum"]
        momentum.lerp_(gradient, 1 - self.momentum)
        if self.nesterov:
            gradient.lerp_(momentum, self.momentum)
        else:
            gradient.copy_(momentum)

    def update(self, matrices: Tensor, states: Sequence[MatrixState] = ()) -> Tensor:
        return _scale(matrices) * orthogonalize(matrices)

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {}

    @staticmethod
    def flops(rows: int, columns: int) -> float:
        short, long = sorted((rows, columns))
        return ITERATIONS * (4.0 * short * short * long + 2.0 * short**3)

    @staticmethod
    def workspace_bytes(rows: int, columns: int, *, on_gpu: bool) -> int:
        short, long = sorted((rows, columns))
        return (2 if on_gpu else 4) * (2 * short * long + 2 * short * short)


class PolarMuon(Muon):
    """Muon with Polar Express in place of Newton-Schulz."""

    def update(self, matrices: Tensor, states: Sequence[MatrixState] = ()) -> Tensor:
        return _scale(matrices) * orthogonalize(matrices, POLAR_EXPRESS, SAFETY)


class NorMuon(Muon):
    """Muon whose rows are divided by the root mean square of that row in previous steps. The norm of a step is kept."""

    def __init__(self, optim: OptimConfig) -> None:
        super().__init__(optim)
        self.decay = optim.betas[1]
        self.eps = optim.eps

    def update(self, matrices: Tensor, states: Sequence[MatrixState] = ()) -> Tensor:
        orthogonal = orthogonalize(matrices)
        norms = torch.linalg.vector_norm(orthogonal, dim=-1, dtype=torch.float32)  # [k, m]
        kept = [state.tensors["row_avg_sq"] for state in states]
        squares = torch.stack(kept).lerp_(norms.square() / matrices.shape[-1], 1 - self.decay)
        for row_squares, changed in zip(kept, squares, strict=True):
            row_squares.copy_(changed)
        factors = 1 / (squares.sqrt() + self.eps)
        before, after = (torch.linalg.vector_norm(each, dim=-1, keepdim=True) for each in (norms, norms * factors))
        factors *= _scale(matrices) * before / after.clamp(min=SMALLEST_NORM)
        return orthogonal.mul_(factors.unsqueeze(-1))

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {"row_avg_sq": (rows,)}


def _scale(matrices: Tensor) -> float:
    return 0.2 * math.sqrt(max(matrices.shape[-2:]))


def orthogonalize(matrices: Tensor, polynomials: Polynomials = NEWTON_SCHULZ, safety: float = 1.0) -> Tensor:
    """[k, m, n] -> approximately U V^T of each matrix U S V^T.

    The singular values are 0.7 to 1.2 instead of 1 with Newton-Schulz, and 0.85 to 1.15 with Polar Express, if they
    were more than 0.002 of the norm.

    Each iteration of fifth order, X <- a X + (b G + c G^2) X with G = X X^T, takes one of the ``polynomials``. They are
    computed in float32, or in bf16 on GPUs, which is accurate enough. A zero matrix stays zero.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x = matrices / (safety * norms.clamp(min=SMALLEST_NORM))
    x = (x.mT if tall else x).to(torch.bfloat16 if x.is_cuda else torch.float32)
    for a, b, c in polynomials:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
