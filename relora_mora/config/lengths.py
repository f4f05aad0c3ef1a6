"""The length of a run and of its warmup: each can be given in several ways, and becomes a number of steps."""

import math
from collections.abc import Mapping, Set
from typing import Any, TypeVar

from pydantic import BaseModel

from relora_mora.config.optim import OptimConfig
from relora_mora.config.schema import Config, MethodConfig

Section = TypeVar("Section", bound=BaseModel)

# settings that give the same length in different ways, by section; the others are converted to the first
ALTERNATIVES = {"train": ("steps", "tokens", "epochs"), "optim": ("warmup_steps", "warmup_fraction")}


def without_nulls(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Drops ``train.steps: null``, which makes room for tokens or epochs, and likewise for the warmup."""
    for section, (steps, *_) in ALTERNATIVES.items():
        values = tree.get(section)
        if isinstance(values, dict) and values.get(steps, 0) is None:
            tree = {**tree, section: {key: value for key, value in values.items() if key != steps}}
    return tree


def without_replaced(tree: Mapping[str, Any], overridden: Set[str]) -> dict[str, Any]:
    """Drops a file's length, or warmup, if the command line (``overridden``) gives it in another way.

    A null on the command line removes only its own setting.
    """
    result = dict(tree)
    for section, names in ALTERNATIVES.items():
        values = tree.get(section)
        if not isinstance(values, dict):
            continue
        here = {name for name in names if f"{section}.{name}" in overridden}
        if any(values.get(name) is not None for name in here):
            result[section] = {key: value for key, value in values.items() if key not in names or key in here}
    return result


def with_steps(config: Config) -> Config:
    """Sets the steps that follow from ``train.tokens`` and ``optim.warmup_fraction``, and keeps these two.

    ``train.epochs`` is left alone, because its steps are unknown until the text has been counted.
    """
    if config.train.tokens is not None:
        steps = -(-config.train.tokens // config.tokens_per_step)
        config = config.model_copy(update={"train": _derived(config.train, steps=steps)})
    if config.optim.warmup_fraction is not None and config.train.epochs is None:
        warmup = round(config.optim.warmup_fraction * config.train.steps)
        config = config.model_copy(update={"optim": _derived(config.optim, warmup_steps=warmup)})
    return config


def settled(config: Config) -> Config:
    """Drops tokens and fraction, which steps have replaced."""
    fraction = config.optim.warmup_fraction if config.train.epochs is not None else None
    train = _derived(config.train, tokens=None)
    return config.model_copy(update={"train": train, "optim": _derived(config.optim, warmup_fraction=fraction)})


def with_counted_epochs(config: Config, tokens: float) -> Config:
    """Sets the steps of ``train.epochs``, given that all epochs together have ``tokens``, and those of the warmup."""
    steps = math.ceil(tokens / config.tokens_per_step)
    train = config.train.model_copy(update={"steps": steps, "epochs": None})
    return settled(with_steps(config.model_copy(update={"train": train})))


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


def _derived(section: Section, **values: Any) -> Section:
    """A copy with other values, which pydantic does not count as set by the user."""
    return section.model_construct(_fields_set=section.model_fields_set, **dict(section) | values)
