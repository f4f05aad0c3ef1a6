"""The settings of a run that affect its numbers."""

from collections.abc import Mapping
from typing import Any

from relora_mora.config.checks.combinations import OPERATIONAL, unused_settings
from relora_mora.config.registry import METHODS
from relora_mora.config.removed import OLD_DEFAULTS

SEEDS = ("train.seed", "data.seed")
SLTRAIN = "sltrain"  # in kept records of release 0.2: LoRA with a sparse matrix
# settings that do not affect a run's numbers, or that follow from other settings
_IGNORED_SECTIONS = ("checkpoint", "log")
_IGNORED = {
    *SEEDS,
    *OPERATIONAL,
    "eval.at_start",
    "eval.every_steps",
    "eval.generate",
    "eval.micro_batch_size",
    "train.tokens",
}


def compared_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the run uses, without seeds, and settings that do not affect numbers."""
    if settings.get("train.epochs") is None:
        ignored = {*_IGNORED, "train.epochs"}
    else:  # the number of steps depends on the order, so on the seed
        ignored = {*_IGNORED, "train.steps"}
        if settings["optim.warmup_fraction"] is not None:
            ignored.add("optim.warmup_steps")
    return {
        name: value
        for name, value in used_settings(settings).items()
        if name not in ignored and name.partition(".")[0] not in _IGNORED_SECTIONS
    }


def used_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that have an effect; only the first of the operators if they never alternate."""
    name = "lora" if settings["method.name"] == SLTRAIN else settings["method.name"]
    method = METHODS.get(name)
    unused = {*unused_settings({**settings, "method.name": name})}
    unused |= {name for name, default in OLD_DEFAULTS.items() if settings.get(name) == default}
    used = {name: value for name, value in settings.items() if name not in unused}
    if method is not None and not method.merges and "method.operators" in used:
        used["method.operators"] = used["method.operators"][:1]
    return used
