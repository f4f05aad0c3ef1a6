"""LoRA-Muon: the product of LoRA's two matrices steps as Muon would step a whole matrix.

By Cesista et al. (arXiv 2606.12921). LoRA adds s B A to W [out, in], with A [r, in] and B [out, r]. With the momenta
U_A and U_B of their gradients (Muon's, also with Nesterov's), S_A = A A^T, S_B = B^T B, and half of Muon's factor,
c = 0.1 sqrt(max(out, in)), a step at the rate eta is::

    A <- A - eta (c / s) S_B^(-1/2) NS(S_B^(-1/2) U_A)
    B <- B - eta (c / s) NS(U_B S_A^(-1/2)) S_A^(-1/2)

NS brings singular values to about one, so the two parts of the change of W, s B dA and s dB A, each have a spectral
norm of about eta c: together that of Muon's step of W, and rates have the same meaning. The step of the product does
not depend on how its size is shared between A and B. Weight decay acts on the product, see
:class:`relora_mora.optim.rules.PairRule`.

**Any root will do.** NS commutes with rotations, so a step needs only some matrix F with F F^T = S^(-1): NS(U F) F^T is
the same for all of them. F = L^(-T), with the Cholesky factor S = L L^T, takes r^3 / 3 multiplications instead of an
iteration or eigenvectors, is exact, and a GPU computes it without making the host wait.

**B starts at zero**, and starts there again after every merge. A's gradient is zero then, but S_B has no inverse, and a
step later B is as small as that first step, which A would have to change completely to make B dA as long. The paper's
runs begin with two factors that are not zero, and its iteration adds 1e-5 to a Gram matrix scaled to norm 1, which
remains a small number if B is small. Here, A's step uses s^2 S_B + (eta c)^2 S_A^(-1) instead of s^2 S_B: the direction
of a singular value sigma of s B A makes a step of sigma / sqrt(sigma^2 + (eta c)^2) of the full length. So a product
that is longer than its steps is not affected, A changes by no more than its own size, the term of second order, s dB
dA, is no longer than eta c, and the step still depends on the product only. If ``method.reset`` keeps A's momentum, the
first step after a merge is bounded in the same way.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from relora_mora.config.optim import OptimConfig
from relora_mora.optim.muon import Muon, orthogonalize

DAMPING = 1e-5  # is added to a Gram matrix, relative to its mean eigenvalue: float32 products have such errors
SMALLEST_TRACE = 1e-30


class LoRAMuon:
    """LoRA-Muon's :class:`relora_mora.optim.rules.PairRule`."""

    def __init__(self, optim: OptimConfig) -> None:
        self.muon = Muon(optim)

    def update_moments(self, gradient: Tensor, moments: Mapping[str, Tensor]) -> None:
        self.muon.update_moments(gradient, moments)

    def update_pairs(
        self, steps: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], scale: float, rate: float
    ) -> tuple[Tensor, Tensor]:
        (step_A, step_B), (A, B) = steps, values
        half = 0.1 * math.sqrt(max(A.shape[-1], B.shape[-2]))
        root_A = _inverse_root((A @ A.mT).double())
        inverse_A = root_A.mT @ root_A
        root_B = _inverse_root(scale**2 * (B.mT @ B) + (rate * half) ** 2 * inverse_A)
        root_A, root_B = root_A.to(A.dtype), root_B.to(A.dtype)
        update_A = root_B.mT @ orthogonalize(root_B @ step_A).to(A.dtype)
        update_B = orthogonalize(step_B @ root_A.mT).to(A.dtype) @ root_A
        return update_A.mul_(half), update_B.mul_(half / scale)

    @staticmethod
    def state_shapes(rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {}

    @staticmethod
    def flops(lora_rank: int, in_features: int, out_features: int) -> float:
        """Matrix products only; the triangular factors are less."""
        products = 6.0 * lora_rank**2 * (in_features + out_features) + 2.0 * lora_rank**3
        return products + Muon.flops(lora_rank, in_features) + Muon.flops(out_features, lora_rank)

    @staticmethod
    def workspace_bytes(lora_rank: int, in_features: int, out_features: int, *, on_gpu: bool) -> int:
        of_A, of_B = 4 * lora_rank * in_features, 4 * lora_rank * out_features
        during_A = Muon.workspace_bytes(lora_rank, in_features, on_gpu=on_gpu)
        during_B = of_B + Muon.workspace_bytes(out_features, lora_rank, on_gpu=on_gpu)
        return 16 * lora_rank**2 + of_A + max(during_A, during_B)


def _inverse_root(gram: Tensor) -> Tensor:
    """[k, r, r], symmetric -> a lower triangular F [k, r, r] with F^T F = gram^(-1); ``gram`` is changed."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += DAMPING * diagonal.mean(-1, keepdim=True).clamp(min=SMALLEST_TRACE)
    factor = torch.linalg.cholesky_ex(gram).L  # cholesky would read back on the host whether it worked
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(factor, unit.expand_as(gram), upper=False)
