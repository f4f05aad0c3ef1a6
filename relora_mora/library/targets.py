"""Which linears of a model get an adapter, and why some cannot."""

import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

# modules that multiply with the weights of their linears themselves: an adapter there would be ignored
READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def target_linears(model: nn.Module, targets: str | Sequence[str] | None) -> list[str]:
    """The names of the linears that get an adapter, in the order of the model.

    ``targets`` is a regular expression that the whole name must match, or names (or last parts of names, such as
    ``q_proj``). None means every ``nn.Linear`` but the output head of a transformers model. Raises ValueError if a
    target matches nothing, or matches something that cannot have an adapter.
    """
    modules = dict(model.named_modules())
    if targets is None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = [
            name
            for name, module in modules.items()
            if isinstance(module, nn.Linear) and module is not head and not _is_read_directly(modules, name)
        ]
        unmatched = [] if chosen else ["any nn.Linear"]
    elif isinstance(targets, str):
        chosen = [name for name in modules if re.fullmatch(targets, name)]
        unmatched = [] if chosen else [targets]
    else:
        ends = tuple(f".{target}" for target in targets)
        chosen = [name for name in modules if f".{name}".endswith(ends)]
        unmatched = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in chosen)]
    if unmatched or not chosen:
        linears = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)})
        raise ValueError(
            f"targets: the model has no module that matches {', '.join(unmatched) or targets}; it has linears named "
            f"{', '.join(linears) or '(none)'}"
        )
    shared = _shared_weights(model)
    for name in chosen:
        fault = _fault(modules, name, shared)
        if fault:
            raise ValueError(f"targets: {name} ({type(modules[name]).__name__}) cannot have an adapter: {fault}")
    return chosen


def _fault(modules: dict[str, nn.Module], name: str, shared: set[int]) -> str | None:
    module = modules[name]
    if not isinstance(module, nn.Linear):
        return "it is not an nn.Linear"
    if not name:
        return "it is the whole model; put it into a module, such as nn.Sequential"
    if _is_read_directly(modules, name):
        return "the module around it reads its weight without calling it"
    weight = module.weight
    if isinstance(weight, DTensor):
        return "its weight is a DTensor; call attach() before fully_shard(); tensor parallelism is not supported"
    if type(module) is not nn.Linear:
        return (
            "only a plain nn.Linear is supported, not a quantized, parametrized or parallel one; load the model without"
        )
    if "forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS):
        return "its hooks, or a forward of its own, would be lost; remove them first"
    if weight.is_meta:
        return "its weight is on the meta device; load the weights first"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {weight.dtype}; float32, bfloat16 and float16 are supported"
    if id(weight) in shared:
        return "its weight is shared with another module, and a merge would change both; leave it out of targets"
    return None


def _is_read_directly(modules: dict[str, nn.Module], name: str) -> bool:
    return isinstance(modules[name.rpartition(".")[0]], READ_WEIGHTS) if name else False


def _shared_weights(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
