"""Muon: a matrix steps along its orthogonalized momentum.

Muon is by Keller Jordan, https://kellerjordan.github.io/posts/muon. With the gradient G [m, n], momentum mu, rate eta
and weight decay lambda, a step of W is::

    B <- mu B + (1 - mu) G
    U  = mu B + (1 - mu) G        with ``optim.nesterov``, else B
    W <- (1 - eta lambda) W - eta 0.2 sqrt(max(m, n)) NS(U)

NS brings the singular values of U to about one, so the step's elements have a root mean square of about 0.2, like
AdamW's. The factor and the decay come from Moonlight (arXiv 2502.16982, section 2.2).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from relora_mora.config.optim import OptimConfig
from relora_mora.optim.rules import MatrixRule, MatrixState

ITERATIONS = 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of x, x^3, x^5: steep at zero, and takes all of (0, 1] to about 1
SMALLEST_NORM = 1e-7  # a U below this norm is not scaled up to norm 1


class Muon(MatrixRule):
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

    def update(self, gradient: Tensor, state: MatrixState) -> Tensor:
        return self.update_stack(gradient.unsqueeze(0), [state])[0]

    def update_stack(self, gradients: Tensor, states: Sequence[MatrixState]) -> Tensor:
        return 0.2 * math.sqrt(max(gradients.shape[-2:])) * orthogonalize(gradients)

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """None: the momentum is element-wise."""
        return {}

    def flops(self, rows: int, columns: int) -> float:
        short, long = sorted((rows, columns))
        return ITERATIONS * (4.0 * short * short * long + 2.0 * short**3)

    def workspace_bytes(self, rows: int, columns: int, *, on_gpu: bool) -> int:
        short, long = sorted((rows, columns))
        return (2 if on_gpu else 4) * (2 * short * long + 2 * short * short)


def orthogonalize(matrices: Tensor) -> Tensor:
    """[k, m, n] -> approximately U V^T of each matrix U S V^T.

    The singular values are 0.7 to 1.2 instead of 1, if they were more than 0.002 of the norm.

    Each iteration is X <- a X + (b G + c G^2) X with G = X X^T. They are computed in float32, or in bf16 on GPUs, which
    is accurate enough. A zero matrix stays zero.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x = matrices / norms.clamp(min=SMALLEST_NORM)
    x = (x.mT if tall else x).to(torch.bfloat16 if x.is_cuda else torch.float32)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
