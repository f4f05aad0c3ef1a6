"""Which linears of a model get an adapter, and why some cannot."""

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from relora_mora.adapters.inject import multiplies
from relora_mora.adapters.layers import adapter_layers
from relora_mora.system.logs import counted

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a name
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def target_linears(model: nn.Module, targets: str | Sequence[str] | None) -> list[str]:
    """The names of the linears that get an adapter, in the order of the model.

    ``targets`` is a regular expression that the whole name must match, or names (or last parts of names, such as
    ``q_proj``). None means every ``nn.Linear`` but the output head. Raises ValueError if a target matches nothing, or
    matches something that cannot have an adapter.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if targets is None:
        head = output_head(model)
        linears = [name for name, module in modules.items() if isinstance(module, nn.Linear) and module is not head]
        matches = {"any nn.Linear": linears}
    elif isinstance(targets, str):
        matches = {targets: [name for name in modules if re.fullmatch(targets, name)]}
    else:
        matches = {target: [name for name in modules if f".{name}".endswith(f".{target}")] for target in targets}
    unmatched = [target for target, names in matches.items() if not names]
    if unmatched or not matches:
        known = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)})
        raise ValueError(
            f"targets: the model has no module that matches {', '.join(unmatched) or targets}; it has linears named "
            f"{', '.join(known) or '(none)'}"
        )
    first_names = {module: name for name, module in model.named_modules()}
    matched = set().union(*matches.values())
    chosen = list(dict.fromkeys(first_names[modules[name]] for name in modules if name in matched))
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    for name in chosen:
        module = modules[name]
        fault = _fault(module, uses) if name else "it is the whole model; put it into an nn.Sequential"
        if fault:
            raise ValueError(f"targets: {name or 'model'} ({type(module).__name__}) cannot have an adapter: {fault}")
    return chosen


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that computes the logits of a language model, if it can be recognized.

    This is what transformers calls the output embeddings, or a linear that shares its weight with an embedding, or the
    last of the outermost linears with as many outputs as the first embedding has rows, outside of numbered blocks.
    """
    named = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if named is not None or not embeddings:
        return named
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    weights = {id(embedding.weight) for embedding in embeddings}
    heads = [name for name, linear in linears.items() if id(linear.weight) in weights]
    heads = heads or [
        name
        for name, linear in linears.items()
        if linear.out_features == embeddings[0].num_embeddings and not _NUMBER.search(name.rpartition(".")[0])
    ]
    return linears[min(reversed(heads), key=lambda name: name.count("."))] if heads else None


def describe_targets(model: nn.Module) -> tuple[str, bool]:
    """Which linears of a model have an adapter, in words; whether its output head may be among them."""
    head = output_head(model)
    adapted = [name for name, _ in adapter_layers(model)]
    left = [
        f"{name} (output head)" if module is head else name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    text = f"{counted(len(adapted), 'linear layer')} adapted: {_short(adapted)}"
    if left:
        return f"{text}; not adapted: {_short(left)}", False
    if head is not None:
        return text, False
    text += "; no output head was recognized: if the model has one, leave it out with targets="
    return text, any(isinstance(module, nn.Embedding) for module in model.modules())


def _short(names: Sequence[str]) -> str:
    """``blocks.*.q, lm`` for ``blocks.0.q``, ``blocks.1.q``, ``lm``."""
    return ", ".join(dict.fromkeys(_NUMBER.sub("*", name) for name in names))


def _fault(module: nn.Module, uses: Counter[int]) -> str | None:
    """Why a module cannot have an adapter. ``uses``: how many modules have each parameter, by its id."""
    if not isinstance(module, nn.Linear):
        return "it is not an nn.Linear"
    weight = module._parameters.get("weight")
    if isinstance(weight, DTensor):
        return "its weight is a DTensor; call attach() before fully_shard(); tensor parallelism is not supported"
    if "forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS):
        return "its hooks, or a forward of its own, would be lost; remove them first"
    if weight is not None and weight.is_meta:
        return "its weight is on the meta device; load the weights first"
    if weight is None or not multiplies(module):
        return "it does not compute as a plain nn.Linear does, as if it were quantized; load the model without"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {weight.dtype}; float32, bfloat16 and float16 are supported"
    if uses[id(weight)] > 1:
        return "its weight is shared with another module, and a merge would change both; leave it out of targets"
    return None
