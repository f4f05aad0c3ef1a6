"""Settings and values that release 0.2 had and this one has not.

A key of ``REMOVED`` is ``section.setting``, or ``section.setting=value`` with a text or number as value; of a list, an
element counts. In ``data`` it is also a setting of each source. The text says what to do instead.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_OWN_RULE = "use muon, or a rule of your own as FILE.py:NAME"
_PROJECTION = "give examples/optimizers/galore.py or apollo.py in optim.matrices, and its settings in optim.rule"
_SPIKES = "remove it: steps that are not finite are skipped; lower optim.lr or optim.clip against spikes of the loss"
_EPOCHS = "give the source a lower weight, or other weights from a step on in data.stages"
REMOVED = {
    "data.at_max_epochs": _EPOCHS,
    "data.max_epochs": _EPOCHS,
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
    "data.at_max_epochs": "stop",
    "data.max_epochs": None,
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


def without_removed(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree without settings that are removed, and a message for each of them by its dotted name."""
    faults: dict[str, str] = {}

    def kept(place: tuple[str, ...], given: Any) -> bool:
        key = _key(place)
        for value in ("", *(f"={each}" for each in (given if isinstance(given, list) else [given]))):
            if remedy := REMOVED.get(f"{key}{value}"):
                faults[".".join(place)] = f"only release 0.2 has {value[1:] or 'this setting'}; {remedy}"
                return False
        return True

    return _filtered((), tree, kept), faults


def without_old_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of a run of release 0.2 without the removed settings that it did not use."""
    result: dict[str, Any] = _filtered((), tree, lambda place, given: OLD_DEFAULTS.get(_key(place), ...) != given)
    return result


def _key(place: Sequence[str]) -> str:
    """``data.max_epochs`` for ``data.train.0.max_epochs``."""
    return f"data.{place[-1]}" if place[0] == "data" else ".".join(place)


def _filtered(place: tuple[str, ...], given: Any, kept: Callable[[tuple[str, ...], Any], bool]) -> Any:
    """A copy of settings with what is ``kept``, a function of the place and the value."""
    if isinstance(given, list):
        return [_filtered((*place, str(number)), each, kept) for number, each in enumerate(given)]
    if not isinstance(given, Mapping):
        return given
    inner = {key: (*place, str(key)) for key, each in given.items()}
    return {key: _filtered(inner[key], each, kept) for key, each in given.items() if kept(inner[key], each)}
