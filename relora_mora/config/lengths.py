"""The length of a run and of its warmup: each is given in one of several ways, and is a number of steps in the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any, TypeVar

from pydantic import BaseModel

from relora_mora.config.schema import Config

Section = TypeVar("Section", bound=BaseModel)

# settings that say the same in different ways, by their section; the first is what the others become
ALTERNATIVES = {"train": ("steps", "tokens", "epochs"), "optim": ("warmup_steps", "warmup_fraction")}


def without_nulls(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """``train.steps: null`` takes back the steps of a file, in favour of tokens or epochs; warmup likewise."""
    for section, (steps, *_) in ALTERNATIVES.items():
        given = tree.get(section)
        if isinstance(given, dict) and given.get(steps, 0) is None:
            tree = {**tree, section: {key: value for key, value in given.items() if key != steps}}
    return tree


def without_replaced(tree: Mapping[str, Any], overridden: Set[str]) -> dict[str, Any]:
    """Without a file's length, and warmup, where the command line (``overridden``) has the same in another way.

    A null there takes nothing back but itself.
    """
    result = dict(tree)
    for section, names in ALTERNATIVES.items():
        given = tree.get(section)
        if not isinstance(given, dict):
            continue
        here = {name for name in names if f"{section}.{name}" in overridden}
        if any(given.get(name) is not None for name in here):
            result[section] = {key: value for key, value in given.items() if key not in names or key in here}
    return result


def with_steps(config: Config) -> Config:
    """With the steps that ``train.tokens`` and ``optim.warmup_fraction`` are, which stay beside them.

    Without ``train.epochs``, of which nothing is known before the text has been counted.
    """
    if config.train.tokens is not None:
        steps = -(-config.train.tokens // config.tokens_per_step)
        config = config.model_copy(update={"train": _derived(config.train, steps=steps)})
    if config.optim.warmup_fraction is not None and config.train.epochs is None:
        warmup = round(config.optim.warmup_fraction * config.train.steps)
        config = config.model_copy(update={"optim": _derived(config.optim, warmup_steps=warmup)})
    return config


def settled(config: Config) -> Config:
    """Without tokens and fraction, whose place steps have taken."""
    fraction = config.optim.warmup_fraction if config.train.epochs is not None else None
    train = _derived(config.train, tokens=None)
    return config.model_copy(update={"train": train, "optim": _derived(config.optim, warmup_fraction=fraction)})


def with_counted_epochs(config: Config, tokens: float) -> Config:
    """With the steps that ``train.epochs`` are, which have so many tokens in all, and with those of its warmup."""
    steps = math.ceil(tokens / config.tokens_per_step)
    train = config.train.model_copy(update={"steps": steps, "epochs": None})
    return settled(with_steps(config.model_copy(update={"train": train})))


def tree_of(config: Config) -> dict[str, Any]:
    """The settings as plain values that are read back to the same settings: each length in the way it was given."""
    tree = config.model_dump()
    for section, (steps, *others) in ALTERNATIVES.items():
        if any(tree[section][name] is not None for name in others):
            del tree[section][steps]
    return tree


def _derived(section: Section, **values: Any) -> Section:
    """A copy with other values, which do not count among what was given."""
    return section.model_construct(_fields_set=section.model_fields_set, **dict(section) | values)
