"""Settings and values that release 0.2 had and this one has not.

A key of ``REMOVED`` is ``section.setting``, or ``section.setting=value`` with a text or number as value; of a list, an
element counts. The text says what to do instead.
"""

from collections.abc import Iterable, Mapping
from typing import Any

_OWN_RULE = "use muon, or a rule of your own as FILE.py:NAME"
_PROJECTION = "give examples/optimizers/galore.py or apollo.py in optim.matrices, and its settings in optim.rule"
_SPIKES = "remove it: steps that are not finite are skipped; lower optim.lr or optim.clip against spikes of the loss"
REMOVED = {
    "method.base=bf16": "use train.precision=bf16, or int8",
    "method.full_steps": "remove it: early merges do more than a start at full rank",
    "method.name=sltrain": "use remora, which was better, or lora",
    "method.operators=7": "use [1, 2], which was 3 % better",
    "method.sparse_density": "remove it: no method has a sparse matrix",
    "optim.lr_full": "remove it: method.full_steps is gone",
    "optim.matrices=apollo": "use examples/optimizers/apollo.py:Apollo, with its settings in optim.rule",
    "optim.matrices=apollo_mini": "use adamw8bit, which keeps a quarter of AdamW's state",
    "optim.matrices=fira": _OWN_RULE,
    "optim.matrices=galore": "use examples/optimizers/galore.py:GaLore, with its settings in optim.rule",
    "optim.matrices=lora_muon": "use muon, which was better on A and B",
    "optim.matrices=normuon": "use muon, which was as good",
    "optim.matrices=polar_muon": "use muon",
    "optim.matrices=sumo": _OWN_RULE,
    "optim.others=apollo_mini": "use adamw8bit, which keeps a quarter of AdamW's state",
    "optim.cautious_decay": "remove it; weight decay is of all elements",
    "optim.projection_every": _PROJECTION,
    "optim.projection_rank": _PROJECTION,
    "optim.projection_scale": _PROJECTION,
    "train.on_spike": _SPIKES,
    "train.spike_deviations": _SPIKES,
    "train.spike_window": _SPIKES,
}
# what the settings of a run of 0.2 have if it did not use them
OLD_DEFAULTS: dict[str, Any] = {
    "method.full_steps": 0,
    "method.sparse_density": 0.03,
    "optim.lr_full": None,
    "optim.cautious_decay": False,
    "optim.projection_every": 200,
    "optim.projection_rank": 128,
    "optim.projection_scale": None,
    "train.on_spike": "flag",
    "train.spike_deviations": 6.0,
    "train.spike_window": 128,
}


def removed_faults(tree: Mapping[str, Any]) -> dict[str, str]:
    """A message for each setting of a tree that is removed, or has a removed value, by its dotted name."""
    faults = {}
    for key, remedy in REMOVED.items():
        name, _, value = key.partition("=")
        section, _, setting = name.partition(".")
        settings = tree.get(section)
        if isinstance(settings, Mapping) and setting in settings:
            given = settings[setting]
            values = map(str, given) if isinstance(given, list) else [str(given)]
            if not value or value in values:
                faults[name] = f"only release 0.2 has {value or 'this setting'}; {remedy}"
    return faults


def without(tree: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The tree without the settings of these dotted names."""
    result = dict(tree)
    for section, _, key in (name.partition(".") for name in names):
        result[section] = {other: value for other, value in result[section].items() if other != key}
    return result


def without_old_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of a run of release 0.2 without the removed settings that it did not use."""
    given = ((name, *name.split(".")) for name in OLD_DEFAULTS)
    return without(
        tree, [name for name, section, key in given if tree.get(section, {}).get(key, ...) == OLD_DEFAULTS[name]]
    )
