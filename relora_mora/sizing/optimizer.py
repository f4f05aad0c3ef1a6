"""The optimizer's state and its work in a step, computed from shapes; nothing is allocated.

If matrices have their own rule (``optim.matrices``), T counts their parameters and N the ranks:

========  ============================================================================================================
state     4 bytes for each moment of an element: 8 with AdamW, 4 with Muon. GaLore, Fira and APOLLO with rank r keep
          8 r l for a matrix with sides s <= l; GaLore and Fira keep 4 r s more for the projection. At stages 1-3 a rank
          has 1 / N of it, as if matrices were shared evenly
products  the rule's FLOPs for each matrix, on one rank; at stage 0 on every rank. The singular vectors that GaLore and
          Fira compute once in ``optim.projection_every`` steps are left out
exchange  stage 3: 4 T / N bytes of a rank's pieces go to the owners of the matrices, and 4 T / N come back. Stages 1
          and 2 exchange only the matrices at the borders between ranks, which are not counted
scratch   the rule's workspace for the matrices that it updates at once, and their copies if there are several;
          stage 3: what is sent, what is received, and the whole matrices of a rank, 12 T / N
========  ============================================================================================================
"""

import math
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from relora_mora.config.schema import OptimConfig
from relora_mora.optim.groups import is_matrix, matrices_at_once, matrix_rule, parameter_moments
from relora_mora.sizing.setup import Setup

ADAM_BYTES = 28  # reads master, both moments, gradient; writes master, both moments
RULE_BYTES = 44  # per element outside the products: momentum, Nesterov, decay and step, each in its own pass


def state_bytes(model: PreTrainedModel, optim: OptimConfig) -> int:
    """Bytes of optimizer state over all ranks; counted once at stage 0, where each rank has all of it."""
    rule = matrix_rule(optim)
    of_elements = sum(4 * numel * len(parameter_moments(name, optim.matrices)) for name, numel in _trained(model))
    kept = [] if rule is None else [shape for sizes in _matrices(model) for shape in rule.state_shapes(*sizes).values()]
    return of_elements + 4 * sum(map(math.prod, kept))


def passes_bytes(model: PreTrainedModel, optim: OptimConfig) -> int:
    """Bytes that the element-wise passes of a step read and write over all ranks, except the weights for compute."""
    of_matrices = ADAM_BYTES if matrix_rule(optim) is None else RULE_BYTES
    return sum(numel * (of_matrices if is_matrix(name) else ADAM_BYTES) for name, numel in _trained(model))


def product_flops(model: PreTrainedModel, optim: OptimConfig) -> float:
    """FLOPs of a step for all matrices, each counted once; 0 with AdamW."""
    rule = matrix_rule(optim)
    return 0.0 if rule is None else sum(rule.flops(*shape) for shape in _matrices(model))


def exchanged_bytes(model: PreTrainedModel, setup: Setup) -> float:
    """Bytes that a rank gives to the exchanges of sharded matrices in a step."""
    if setup.weight_sharers == 1 or matrix_rule(setup.config.optim) is None:
        return 0
    return 8 * sum(shape.numel() for shape in _matrices(model)) / setup.world_size


def scratch_bytes(model: PreTrainedModel, setup: Setup) -> float:
    """Bytes of temporary memory while matrices are updated."""
    on_gpu = setup.on_gpu
    rule = matrix_rule(setup.config.optim)
    if rule is None:
        return 0
    shapes = list(_matrices(model))
    largest = 0
    for shape in set(shapes):
        count = min(shapes.count(shape), matrices_at_once(shape, on_gpu=on_gpu))
        copied = 4 * shape.numel() if count > 1 else 0
        largest = max(largest, count * (copied + rule.workspace_bytes(*shape, on_gpu=on_gpu)))
    return largest + 1.5 * exchanged_bytes(model, setup)


def _trained(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    return ((name, parameter.numel()) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _matrices(model: PreTrainedModel) -> Iterator[torch.Size]:
    named = model.named_parameters()
    return (parameter.shape for name, parameter in named if parameter.requires_grad and is_matrix(name))
