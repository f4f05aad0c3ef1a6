"""What the kernels compute, in torch operations: the fallback of every device, and what tests compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from relora_mora.kernels.grouping import Grouping, Piece


def expand_add(weight: Tensor, square: Tensor, inputs: Grouping, outputs: Grouping) -> Tensor:
    """weight [out, in] + D square C, an addition for each piece of outputs and inputs; not differentiable."""
    if torch.compiler.is_compiling():
        # one kernel once it is compiled, and nothing that writes into views
        return weight + outputs.copy(inputs.copy(square).mT).mT
    result = torch.empty_like(weight)
    with torch.no_grad():
        for down in outputs.pieces:
            end = 0
            for across in inputs.pieces:
                source = weight if across.feature >= end else result  # a feature's second slot adds to the first
                end = max(end, across.columns.stop)
                _add_piece(source, square[down.places, across.places], result, down, across)
    return result


def _add_piece(source: Tensor, square: Tensor, result: Tensor, down: Piece, across: Piece) -> None:
    def cut(matrix: Tensor) -> Tensor:
        """[slots, repeats | repeats, slots] of outputs, then of inputs"""
        columns, _ = across.by_slot(matrix, 1)
        return down.by_slot(columns, 0)[0]

    square = square.unsqueeze(1 if down.neighbours else 0).unsqueeze(3 if across.neighbours else 2)
    torch.add(cut(source), square, out=cut(result))


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore: int, scale: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses [N] and their gradient as of :func:`relora_mora.kernels.cross_entropy_`; copies the logits to float32."""
    wide = logits.float()
    log_sum = wide.logsumexp(-1, keepdim=True)
    keep = (labels != ignore).unsqueeze(-1)
    index = labels.clamp(min=0).unsqueeze(-1)
    losses = ((log_sum - wide.gather(-1, index)) * keep).squeeze(-1)
    if not gradient:
        return losses, None
    probabilities = wide.sub_(log_sum).exp_()
    probabilities.scatter_add_(-1, index, torch.full_like(log_sum, -1.0))
    return losses, probabilities.mul_(keep * scale).to(logits.dtype)
