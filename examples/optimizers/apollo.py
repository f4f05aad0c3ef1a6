"""APOLLO (arXiv 2412.05270): the gradient, with each column scaled as Adam scales that column of a random projection.

relora-mora pretrain tiny_remora --optim.matrices=examples/optimizers/apollo.py:Apollo --optim.rule='{rank: 16}' \
  --method.reset=full

Let G [s, l] be the gradient, transposed if the matrix has at least as many rows as columns, so that s <= l, and let
r = min(rank, s). At step t of a matrix, counted from its last reset, with element-wise products and quotients:

    P  = [s, r], drawn from a normal distribution of variance 1 / r, again whenever ``every`` steps have passed
    R  = P^T G                              [r, l]
    M <- b1 M + (1 - b1) R
    V <- b2 V + (1 - b2) R^2                a new P keeps both moments
    N  = M / (sqrt(V) + eps)
    phi = |N column by column| / (|R column by column| + 1e-8)       [l]
    sqrt(scale) sqrt(1 - b2^t) / (1 - b1^t) limit(G phi)             is the update

limit() is Fira's norm-growth limiter: if the norm of a matrix exceeds 1.01 times the norm (+ 1e-8) that limit()
returned in the previous step, the matrix is scaled down to 1.01 times that norm. A zero gradient does not change it.

The authors use rates around 0.01, and scale = s / r gives the paper's factor of sqrt(s / r). The formulas are those of
apollo-torch 1.0.3 (scale_front=False, scale_type="channel"), except that P is drawn again in each step, from the run's
seed, the matrix's name and the number of the renewal, so it takes no memory.
"""

import math

import torch
from torch import Tensor

from relora_mora.optim.rules import MatrixRule, MatrixState

NORM_GROWTH = 1.01
SMALL = 1e-8  # added to a norm in a denominator


class Apollo(MatrixRule):
    def __init__(
        self,
        rank: int = 128,
        every: int = 200,
        scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        if rank < 2 or every < 1:
            raise ValueError(
                f"rank is at least 2 and every at least 1, got {rank} and {every}: at rank 1 the norm of a column of R "
                "is that of one number, often close to zero, and some columns would step a thousand times too far"
            )
        self.rank = rank
        self.every = every
        self.scale = scale
        self.betas = betas
        self.eps = eps

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        short, long = sorted((rows, columns))
        rank = min(self.rank, short)
        return {"average": (rank, long), "squares": (rank, long), "limited_norm": (), "updates": ()}

    def update(self, gradient: Tensor, state: MatrixState) -> Tensor:
        rows, columns = gradient.shape
        return self._step(gradient, state) if rows < columns else self._step(gradient.mT, state).mT

    def _step(self, gradient: Tensor, state: MatrixState) -> Tensor:
        """G [s, l] -> the update [s, l], in the gradient's place"""
        done = int(state["updates"])
        state["updates"] += 1
        first, second = self.betas
        projected = self._projection(len(gradient), state, done // self.every, gradient.device).mT @ gradient
        average = state["average"].lerp_(projected, 1 - first)
        squares = state["squares"].mul_(second).addcmul_(projected, projected, value=1 - second)
        adam = average / squares.sqrt().add_(self.eps)
        norm = torch.linalg.vector_norm
        step = gradient.mul_(norm(adam, dim=0) / (norm(projected, dim=0) + SMALL))
        _limit(step, state["limited_norm"])
        correction = math.sqrt(1 - second ** (done + 1)) / (1 - first ** (done + 1))
        return step.mul_(math.sqrt(self.scale) * correction)

    def _projection(self, short: int, state: MatrixState, renewal: int, device: torch.device) -> Tensor:
        """P [s, r]"""
        rank = min(self.rank, short)
        generator = state.generator(renewal, device)
        return torch.randn(short, rank, generator=generator, device=device).div_(math.sqrt(rank))


def _limit(step: Tensor, last: Tensor) -> None:
    """limit() in place. ``last`` [] holds the last norm above zero that it returned, and is updated."""
    norm = torch.linalg.vector_norm(step)
    divisor = torch.where(last > 0, (norm / (last + SMALL)).clamp(min=NORM_GROWTH) / NORM_GROWTH, 1.0)
    step.div_(divisor)
    last.copy_(torch.where(norm > 0, norm / divisor, last))
