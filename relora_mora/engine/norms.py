"""The norms of the gradients, which the host reads before a step.

Each of DeepSpeed's optimizers reads norms back from the device, once or for each parameter, to look for non-finite
numbers and to clip. Here they are computed in the same way as DeepSpeed does, so that the engine can read them
together with the loss. Then DeepSpeed gets them as numbers on the host, and its results are the same to the bit.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from relora_mora.engine import internals


@torch.no_grad()
def gradient_norms(optimizer: Any) -> Tensor:
    """[n] on the device: the norms over all ranks that a step of DeepSpeed's ``optimizer`` begins with.

    At stage 0 in bf16 they are squared. If gradients are not finite, at least one norm is not finite or is -1.
    """
    if isinstance(optimizer, internals.DeepSpeedZeroOptimizer_Stage3):
        return torch.stack(optimizer._get_norm_groups())
    if isinstance(optimizer, internals.DeepSpeedZeroOptimizer):
        groups = range(len(optimizer.bit16_groups))
        parts = [(optimizer.averaged_gradients[i], optimizer.params_in_partition[i]) for i in groups]
        return torch.stack([optimizer.get_grad_norm_direct(*part) for part in parts])
    if isinstance(optimizer, internals.BF16_Optimizer):
        gradients, _ = optimizer.get_grads_for_norm()
        return internals.bf16_optimizer.get_global_norm_of_tensors(input_tensors=gradients).view(1)
    assert isinstance(optimizer, internals.FP16_UnfusedOptimizer)
    members = [[p.grad for p in group if p.grad is not None] for group in optimizer.fp16_groups]
    return torch.stack([sum(gradient.float().norm() ** 2.0 for gradient in group) for group in members])


@contextlib.contextmanager
def step_with_norms(optimizer: Any, norms: Tensor) -> Iterator[None]:
    """Inside, a step of ``optimizer`` uses these norms [n], finite and on the host, and computes none."""
    if isinstance(optimizer, internals.DeepSpeedZeroOptimizer_Stage3):
        patches = [replaced(optimizer, "_get_norm_groups", lambda: list(norms))]
    elif isinstance(optimizer, internals.DeepSpeedZeroOptimizer):
        patches = [replaced(optimizer, "scaled_global_norm", lambda: torch.linalg.vector_norm(norms))]
    elif isinstance(optimizer, internals.BF16_Optimizer):
        patches = [replaced(internals.bf16_optimizer, "get_global_norm_of_tensors", lambda *_, **__: norms[0])]
    else:
        roots = iter([square**0.5 for square in norms.tolist()])
        patches = [
            replaced(optimizer.overflow_checker, "check", lambda: False),
            replaced(internals.unfused_optimizer, "get_weight_norm", lambda *_, **__: next(roots)),
        ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, ``function`` replaces ``owner.name``: a function of a module or a method of an object."""
    own = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)
