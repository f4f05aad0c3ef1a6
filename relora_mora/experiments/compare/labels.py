"""How settings are named in labels: methods as in papers, then what differs, such as ``rank 32, lr 0.001``."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from relora_mora.config.data import RecordsConfig, TextSource
from relora_mora.config.registry import METHODS, optimizer_named
from relora_mora.config.removed import OLD_DEFAULTS
from relora_mora.experiments.compare.settings import SLTRAIN

# kept records of release 0.2 name what later releases no longer have
_OLD_OPTIMIZERS = {
    "apollo": "APOLLO",
    "apollo_mini": "APOLLO-Mini",
    "fira": "Fira",
    "galore": "GaLore",
    "lora_muon": "LoRA-Muon",
    "normuon": "NorMuon",
    "sumo": "SUMO",
}


def method_title(settings: Mapping[str, Any]) -> str:
    """The method's title with its cycle of operators if that is longer than one, such as ``ReMoRA (1, 2)``."""
    name = settings["method.name"]
    title = METHODS[name].title if name in METHODS else "SLTrain" if name == SLTRAIN else name
    operators = settings.get("method.operators", ())
    return f"{title} ({_shown(operators)})" if len(operators) > 1 else title


def differences(compared: Sequence[Mapping[str, Any]], unnamed: Sequence[str]) -> list[str]:
    """For each run, the settings without ``unnamed`` in which it differs from others, in words.

    Runs without a setting do not count, except for those of release 0.2.
    """
    texts = pd.DataFrame([{name: as_text(value) for name, value in each.items()} for each in compared])
    texts = texts.fillna({name: as_text(value) for name, value in OLD_DEFAULTS.items() if name in texts})
    names = [name for name in texts if texts[name].nunique() > 1 and name not in ("method.name", "method.operators")]
    operators = [each.get("method.operators", ()) for each in compared]
    if len({as_text(each) for each in operators if len(each) == 1}) > 1:  # others are in the method's title
        names.append("method.operators")
    names = [name for name in names if name not in unnamed]
    shown = {name: {as_text(each[name]): _shown(each[name]) for each in compared if name in each} for name in names}
    in_full = {name for name, values in shown.items() if len(set(values.values())) < len(values)}
    keys = Counter(name.partition(".")[2] for name in names)
    return [
        ", ".join(
            _named(name, settings[name], in_full=name in in_full, alone=keys[name.partition(".")[2]] == 1)
            for name in names
            if settings.get(name) not in (None, {}) and (name != "method.operators" or len(settings[name]) == 1)
        )
        for settings in compared
    ]


def as_text(value: Any) -> str:
    """JSON in which held-out sets are sorted by name."""
    return json.dumps(value, sort_keys=True, default=str)


def _named(name: str, value: Any, *, in_full: bool, alone: bool) -> str:
    """Such as ``rank 32``; matrix optimizers only by their names. ``alone``: no other section has such a key."""
    if name == "optim.matrices":
        optimizer = optimizer_named(value)
        return _OLD_OPTIMIZERS.get(value, value) if optimizer is None else optimizer.title
    section, _, key = name.partition(".")
    title = (section if key == "name" else key if alone else f"{section} {key}").replace("_", " ")
    text = _shown(value, full_path=in_full)
    return f"{title} {text.removeprefix(title.rpartition(' ')[2] + ' ')}"  # not "merge every every 10"


def _without_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The values without defaults if they describe a text source or its records; otherwise all values."""
    for model, key in ((TextSource, "source"), (RecordsConfig, "kind")):
        if key in values:
            defaults = {name: field.get_default() for name, field in model.model_fields.items() if name != key}
            return {name: each for name, each in values.items() if name not in defaults or each != defaults[name]}
    return values


def _shown(value: Any, *, full_path: bool = False) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "default"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(each, full_path=full_path) for each in value)
    if isinstance(value, dict):
        shown = {key: inner for key, inner in _without_defaults(value).items() if inner is not None}
        return ", ".join(f"{key} {_shown(inner, full_path=full_path)}" for key, inner in shown.items())
    return Path(value).stem if isinstance(value, str) and "/" in value and not full_path else str(value)
