"""Defaults of fine-tuning: those of launch/finetune.py, below the settings of its file and command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relora_mora.config.lengths import ALTERNATIVES
from relora_mora.registry import METHODS, settings_of_others

# rank, operator 6, rate, warmup, batch and epochs are those of the release for mathematics (github.com/kongds/MoRA)
FINETUNING: dict[str, dict[str, Any]] = {
    "method": {
        "name": "mora",
        "rank": 8,
        "square_multiple": 2,  # operator 6 turns pairs
        "operators": [6, 1],
        "train_embeddings": False,
        "train_norms": False,
        "train_head": False,
    },
    "optim": {"lr": 3e-4, "warmup_fraction": 0.03},
    "train": {"epochs": 3, "batch_size": 128},
}


def with_defaults(tree: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A tree of settings with others below it.

    A default is left out where the tree says the same in another way (steps for epochs), or where the tree's method
    does not use it.
    """
    given = tree.get("method")
    method = METHODS.get(str(given.get("name"))) if isinstance(given, dict) else None
    unused = settings_of_others(METHODS, method)
    result = dict(tree)
    for section, values in defaults.items():
        own = tree.get(section) or {}
        if not isinstance(own, dict):
            continue  # a fault, which is told as such
        alternatives = ALTERNATIVES.get(section, ())
        said = any(own.get(key) is not None for key in alternatives)
        below = {
            key: value
            for key, value in values.items()
            if f"{section}.{key}" not in unused and not (said and key in alternatives)
        }
        result[section] = {**below, **own}
    return result
