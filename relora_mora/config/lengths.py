"""The length of a run and of its warmup: each can be given in several ways, and becomes a number of steps."""

import math
from collections.abc import Mapping
from typing import Any

from relora_mora.config.optim import OptimConfig
from relora_mora.config.schema import Config, MethodConfig

# settings that give the same length in different ways, by section; the others are converted to the first
ALTERNATIVES = {"train": ("steps", "tokens", "epochs"), "optim": ("warmup_steps", "warmup_fraction")}


def over(section: str, lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """A section of settings in which ``upper`` takes precedence over ``lower``.

    If it gives a length in any way, no other way is left. A null removes only its own setting.
    """
    names = ALTERNATIVES.get(section, ())
    replaced = names if any(upper.get(name) is not None for name in names) else ()
    return {**{key: value for key, value in lower.items() if key not in replaced}, **upper}


def without_nulls(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Drops ``train.steps: null``, which makes room for tokens or epochs, and likewise for the warmup."""
    for section, (steps, *_) in ALTERNATIVES.items():
        values = tree.get(section)
        if isinstance(values, dict) and values.get(steps, 0) is None:
            tree = {**tree, section: {key: value for key, value in values.items() if key != steps}}
    return tree


def with_steps(config: Config) -> Config:
    """Sets the steps that follow from ``train.tokens`` and ``optim.warmup_fraction``, which become null.

    A run of ``train.epochs`` keeps them, because its steps are unknown until the text has been counted.
    """
    train, optim = config.train, config.optim
    if train.tokens is not None:
        steps = -(-train.tokens // config.tokens_per_step)
        train = train.model_copy(update={"steps": steps, "tokens": None})
    if optim.warmup_fraction is not None and train.epochs is None:
        warmup = round(optim.warmup_fraction * train.steps)
        optim = optim.model_copy(update={"warmup_steps": warmup, "warmup_fraction": None})
    return config.model_copy(update={"train": train, "optim": optim})


def with_counted_epochs(config: Config, tokens: float) -> Config:
    """Sets the steps of ``train.epochs``, given that all epochs together have ``tokens``, and those of the warmup."""
    steps = math.ceil(tokens / config.tokens_per_step)
    train = config.train.model_copy(update={"steps": steps, "epochs": None})
    return with_steps(config.model_copy(update={"train": train}))


def restart_warmup(method: MethodConfig, optim: OptimConfig) -> int:
    """The steps of the warmup after a merge: ``optim.restart_warmup_steps``, or all steps between two merges."""
    return min(optim.restart_warmup_steps, method.merge_every) if method.merges else 0


def tree_of(config: Config) -> dict[str, Any]:
    """The settings as plain values that read back to the same settings; each length keeps the form it was given in."""
    tree = config.model_dump()
    for section, (steps, *others) in ALTERNATIVES.items():
        if any(tree[section][name] is not None for name in others):
            del tree[section][steps]
    return tree
