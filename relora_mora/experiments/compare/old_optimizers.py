"""The optimizers of release 0.2 in the records of studies: their names in papers, and the settings that they used."""

from collections.abc import Mapping
from typing import Any

from relora_mora.config.registry import MATRIX_OPTIMIZERS, MUON_SETTINGS

_PROJECTION = ("optim.projection_rank", "optim.projection_every", "optim.projection_scale")
_OLD = {
    "polar_muon": ("Muon with Polar Express", MUON_SETTINGS),
    "normuon": ("NorMuon", MUON_SETTINGS),
    "lora_muon": ("LoRA-Muon", MUON_SETTINGS),
    "galore": ("GaLore", _PROJECTION),
    "fira": ("Fira", _PROJECTION),
    "apollo": ("APOLLO", _PROJECTION),
    "apollo_mini": ("APOLLO-Mini", ("optim.projection_every",)),
    "sumo": ("SUMO", ("optim.momentum", *_PROJECTION)),
}
OLD_TITLES = {name: title for name, (title, _) in _OLD.items()}
_SETTINGS = {name: settings for name, (_, settings) in _OLD.items()}
_SETTINGS |= {name: optimizer.settings for name, optimizer in MATRIX_OPTIMIZERS.items()}


def unused_by_old(settings: Mapping[str, Any]) -> set[str]:
    """The settings of optimizers in 0.2 that had no effect, given all settings of a run."""
    names = settings["optim.matrices"], settings["optim.others"]
    unused = {"optim.cautious_decay"} if settings["optim.weight_decay"] == 0 or set(names) == {"adamw"} else set()
    if not set(names) <= set(_SETTINGS):
        return unused
    used = {setting for name in names for setting in _SETTINGS[name]}
    return unused | {*MUON_SETTINGS, *_PROJECTION} - used
