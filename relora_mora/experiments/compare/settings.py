"""The settings that affect a run's numbers, and how labels name them: methods as in papers, then what differs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from relora_mora.config.checks.combinations import unused_settings
from relora_mora.config.data import RecordsConfig, TextSource
from relora_mora.config.registry import METHODS, optimizer_named

SEEDS = ("train.seed", "data.seed")
# settings that do not affect a run's numbers, or that follow from other settings
_IGNORED_SECTIONS = ("checkpoint", "log")
_IGNORED = {
    *SEEDS,
    "data.max_bad_fraction",  # decides whether the run continues, not what it reads
    "data.prefetch_batches",
    "data.timeout_seconds",
    "data.workers",
    "eval.at_start",
    "eval.every_steps",
    "eval.generate",
    "eval.micro_batch_size",
    "train.allow_changes",
    "train.max_bad_steps",
    "train.max_rollbacks",
    "train.peer_timeout_seconds",
    "train.resume",
    "train.run_dir",
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
    name = settings["method.name"]
    unused = unused_settings(settings)
    used = {name: value for name, value in settings.items() if name not in unused}
    if name in METHODS and not METHODS[name].merges and "method.operators" in used:
        used["method.operators"] = used["method.operators"][:1]
    return used


def as_text(value: Any) -> str:
    """JSON in which held-out sets are sorted by name."""
    return json.dumps(value, sort_keys=True, default=str)


def texts_of(runs: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A row for each run, with the text of each value in the column of its name."""
    return pd.DataFrame([{name: as_text(value) for name, value in run.items()} for run in runs], dtype=object)


def method_title(settings: Mapping[str, Any]) -> str:
    """The method's title with its cycle of operators if that is longer than one, such as ``ReMoRA (1, 2)``."""
    name = settings["method.name"]
    title = METHODS[name].title if name in METHODS else name
    operators = settings.get("method.operators", ())
    return f"{title} ({_shown(operators)})" if len(operators) > 1 else title


def differences(compared: Sequence[Mapping[str, Any]], unnamed: Sequence[str]) -> list[str]:
    """For each run, the settings without ``unnamed`` in which it differs from others, in words.

    Runs without a setting do not count.
    """
    given = [_without_title(each) for each in compared]
    texts = texts_of(given)
    names = [name for name in texts if texts[name].nunique() > 1 and name not in unnamed]
    return [", ".join(_named(name, each[name]) for name in names if each.get(name) not in (None, {})) for each in given]


def _without_title(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not in the method's title; a single operator is the last one."""
    operators = settings.get("method.operators", ())
    others = {name: value for name, value in settings.items() if name not in ("method.name", "method.operators")}
    return others | ({"method.operators": operators} if len(operators) == 1 else {})


def _named(name: str, value: Any) -> str:
    """Such as ``rank 32``; matrix optimizers only by their names."""
    if name == "optim.matrices":
        optimizer = optimizer_named(value)
        return str(value) if optimizer is None else optimizer.title
    title = name.partition(".")[2].replace("_", " ")
    return f"{title} {_shown(value).removeprefix(title.rpartition(' ')[2] + ' ')}"  # not "merge every every 10"


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "default"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in _without_defaults(value).items())
    return Path(value).stem if isinstance(value, str) and "/" in value else str(value)


def _without_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The values that are not null and, of a text source or its records, not defaults."""
    model = TextSource if "source" in values else RecordsConfig if "kind" in values else None
    fields = {} if model is None else model.model_fields
    defaults = {name: field.get_default() for name, field in fields.items() if name not in ("source", "kind")}
    return {name: each for name, each in values.items() if each is not None and each != defaults.get(name)}
