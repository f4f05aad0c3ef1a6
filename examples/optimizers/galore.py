"""GaLore (arXiv 2403.03507, algorithm 2): Adam on a projection of the gradient, so that its moments are small.

relora-mora pretrain tiny_remora --optim.matrices=examples/optimizers/galore.py:GaLore --optim.rule='{rank: 16}' \
  --method.reset=full

Let G [s, l] be the gradient, transposed if the matrix has at least as many rows as columns, so that s <= l, and let
r = min(rank, s). At step t of a matrix, counted from its last reset, with element-wise products and quotients:

    P  = the first r left singular vectors of G [s, r], renewed at t = 1 and whenever ``every`` steps have passed
    R  = P^T G                              [r, l]
    M <- b1 M + (1 - b1) R
    V <- b2 V + (1 - b2) R^2                a renewal of P keeps both moments
    N  = M / (sqrt(V) + eps)
    scale sqrt(1 - b2^t) / (1 - b1^t) P N   is the update

The authors use rates around 0.01. The formulas are those of galore-torch 1.0, except for two points:

- The sign of a singular vector is arbitrary, but the moments that survive a renewal depend on it. Here it is the sign
  that gives a nonnegative product with the column of P that the vector replaces.
- P is never computed from a zero gradient, as in a step without scored tokens, or for LoRA's A while B is zero. If P is
  due then, the matrix waits: its step is zero and is not counted.
"""

import math

import torch
from torch import Tensor

from relora_mora.optim.rules import MatrixRule, MatrixState


class GaLore(MatrixRule):
    is_slow = True  # a renewal takes the singular vectors of all matrices in one step

    def __init__(
        self,
        rank: int = 128,
        every: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        if rank < 1 or every < 1:
            raise ValueError(f"rank and every are at least 1, got {rank} and {every}")
        self.rank = rank
        self.every = every
        self.scale = scale
        self.betas = betas
        self.eps = eps

    def state_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        short, long = sorted((rows, columns))
        rank = min(self.rank, short)
        return {"average": (rank, long), "squares": (rank, long), "projection": (short, rank), "updates": ()}

    def update(self, gradient: Tensor, state: MatrixState) -> Tensor:
        rows, columns = gradient.shape
        return self._step(gradient, state) if rows < columns else self._step(gradient.mT, state).mT

    def _step(self, gradient: Tensor, state: MatrixState) -> Tensor:
        """G [s, l] -> the update [s, l]"""
        done = int(state["updates"])
        if done % self.every == 0:
            if not gradient.any():
                return gradient
            self._renew(state["projection"], gradient)
        state["updates"] += 1
        first, second = self.betas
        projected = state["projection"].mT @ gradient
        average = state["average"].lerp_(projected, 1 - first)
        squares = state["squares"].mul_(second).addcmul_(projected, projected, value=1 - second)
        adam = average / squares.sqrt().add_(self.eps)
        correction = math.sqrt(1 - second ** (done + 1)) / (1 - first ** (done + 1))
        return (state["projection"] @ adam).mul_(self.scale * correction)

    @staticmethod
    def _renew(projection: Tensor, gradient: Tensor) -> None:
        left = torch.linalg.svd(gradient, full_matrices=False).U[:, : projection.shape[1]]
        along = (left * projection).sum(dim=0)
        largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))[0]  # decides the sign if P was zero
        flipped = torch.where(along == 0, largest, along) < 0
        projection.copy_(torch.where(flipped, -left, left))
