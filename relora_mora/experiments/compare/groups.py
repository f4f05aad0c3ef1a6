"""Groups runs that differ only in their seeds, and labels groups by the settings in which they differ."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from relora_mora.config.checks.combinations import OPERATIONAL, unused_settings
from relora_mora.config.data import RecordsConfig, TextSource
from relora_mora.config.registry import METHODS, optimizer_named
from relora_mora.config.removed import OLD_DEFAULTS
from relora_mora.experiments.compare.runs import CompareError, Run, Series

SEEDS = ("train.seed", "data.seed")
# settings that do not affect a run's numbers, or that follow from other settings
_IGNORED_SECTIONS = ("checkpoint", "log")
_IGNORED = {
    *SEEDS,
    *OPERATIONAL,
    "eval.at_start",
    "eval.every_steps",
    "eval.generate",
    "eval.micro_batch_size",
    "train.epochs",
    "train.tokens",
}
_IN_TITLE = ("method.name", "method.operators")
# kept records of release 0.2 name what later releases no longer have
_SLTRAIN = "sltrain"  # LoRA with a sparse matrix
_OLD_OPTIMIZERS = {
    "apollo": "APOLLO",
    "apollo_mini": "APOLLO-Mini",
    "fira": "Fira",
    "galore": "GaLore",
    "lora_muon": "LoRA-Muon",
    "normuon": "NorMuon",
    "polar_muon": "Muon with Polar Express",
    "sumo": "SUMO",
}


@dataclass(frozen=True)
class Group:
    """Runs that share all settings except the seeds: one row of a table, one line of a figure.

    ``method`` is the method's name in papers. ``differs`` lists the settings in which the groups of a comparison
    differ, and whether a run began at another run's checkpoint or changed settings at a resume.
    """

    method: str
    differs: str
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        return f"{self.method}, {self.differs}" if self.differs else self.method

    def losses(self, name: str) -> pd.DataFrame:
        """Losses on a held-out set at the steps that all runs have: [steps, runs]"""
        series = [pd.Series(run.evaluations(name), dtype=float) for run in self.runs]
        return pd.DataFrame(dict(enumerate(series))).dropna().sort_index()

    @property
    def is_finished(self) -> bool:
        return all(run.is_finished for run in self.runs)

    @property
    def state(self) -> str:
        """The progress of the unfinished runs in words; empty if all runs have finished."""
        unfinished = [run for run in self.runs if not run.is_finished]
        if not unfinished:
            return ""
        if any(run.has_diverged for run in unfinished):
            return "its last loss is not finite"
        state = "running" if any(run.is_running for run in unfinished) else "unfinished"
        step = min(run.last_step for run in unfinished)
        return f"{state}, step {step:,} of {unfinished[0].steps:,}"


def common_steps(series: Iterable[Series]) -> list[int]:
    """The steps at which all of the series have a value, in order."""
    return sorted(set.intersection(*map(set, series)))


def group_runs(runs: Iterable[Run], unnamed: Sequence[str] = (), best: Sequence[str] = ()) -> list[Group]:
    """Groups the runs, in the order in which they are given.

    Besides settings, the number of parameters, the precision, and the digests of weights, text and tokenizer count.
    A run with the same settings and the same seed as another is not another seed: it gets a group of its own, whose
    label says why. Labels leave out the settings in ``unnamed``, such as ``optim.lr``. From groups that differ only in
    the settings ``best``, the one with the most seeds is kept; among equals, the one with the lowest last validation
    loss (of its worst seed), where finished groups come first.

    Raises :class:`CompareError` if no run has a setting that ``unnamed`` or ``best`` names.
    """
    gathered: dict[str, list[Run]] = {}
    for run in runs:
        key = _as_text(_compared_settings(run))
        repeat = 0
        while any(
            _seed(run) == _seed(other) or _differing_notes(run, other) for other in gathered.get(f"{repeat}{key}", ())
        ):
            repeat += 1
        gathered.setdefault(f"{repeat}{key}", []).append(run)
    for option, names in (("unnamed", unnamed), ("best", best)):
        for name in names:
            if not any(name in group[0].settings for group in gathered.values()):
                raise CompareError(f"--{option}: no run has a setting {name}; docs/settings.md lists all settings")
    members = _best(list(gathered.values()), best) if best else list(gathered.values())
    compared = [_compared_settings(runs[0]) for runs in members]
    names = [name for name in _differing(compared) if name not in unnamed]
    full_paths = {name for name in names if _look_alike(name, compared)}
    groups: list[Group] = []
    for settings, of_group in zip(compared, members, strict=True):
        differs = dict.fromkeys([_differences(settings, names, full_paths), *map(_history, of_group)])
        groups.append(Group(_method_title(settings), ", ".join(filter(None, differs)), tuple(of_group)))
    alike = Counter(group.label for group in groups)
    for index, group in enumerate(groups):
        if alike[group.label] > 1:
            own_name = _own_name(group.runs[0], groups[:index], [*unnamed, *best])
            groups[index] = replace(group, differs=", ".join(filter(None, (group.differs, own_name))))
    return groups


def _own_name(run: Run, before: Iterable[Group], ignored: Sequence[str]) -> str:
    """The name of a run's folder, and why the run is not another seed of a group before it, apart from ``ignored``."""
    others = (other for group in before for other in group.runs)
    settings = _compared_settings(run, ignored)
    alike = [other for other in others if _compared_settings(other, ignored) == settings]
    differing = ", ".join(sorted({name for other in alike for name in _differing_notes(run, other, ignored)}))
    if differing:
        return f"{run.folder.name} (other {differing})"
    is_same = any(
        _seed(other) == _seed(run) and _compared_settings(other) == _compared_settings(run) for other in alike
    )
    return f"{run.folder.name} (the same seed)" if is_same else run.folder.name


def _history(run: Run) -> str:
    """The step at which the run began if not 0, and the changes at its resumes, in words; empty for nearly all runs."""
    changes = [
        f"{' and '.join(dict.fromkeys(text.partition(':')[0] for text in changed))} changed at step {step:,}"
        for step, changed in run.changes
    ]
    began = [f"started from a checkpoint of step {run.first_step:,}"] if run.first_step else []
    return ", ".join(began + changes)


def _differing_notes(run: Run, other: Run, ignored: Sequence[str] = ()) -> list[str]:
    """The settings, without ``ignored``, for which both runs have notes that differ."""
    left = _notes(run)
    right = _notes(other)
    names = (left.keys() & right.keys()).difference(ignored, (name.partition(".")[0] for name in ignored))
    return [name for name in names if left[name] != right[name]]


def _notes(run: Run) -> dict[str, Any]:
    """What the run found for settings that are names or left open, by setting or section; kept records have less."""
    noted: dict[str, Any] = {"model": run.parameters.get("total"), "train.precision": run.bf16, **run.began_with}
    noted["data.validation"] = run.scored or None
    if run.starts:
        noted |= {"settings before a resume": run.changes, "first step": run.first_step}
    return {name: value for name, value in noted.items() if value is not None}


def _best(members: Sequence[list[Run]], settings: Sequence[str]) -> list[list[Run]]:
    """The best of the groups that differ only in ``settings``, in the order of ``members``."""
    chosen: list[list[Run]] = []
    for runs in sorted(members, key=lambda runs: -len(_notes(runs[0]))):  # a run without notes matches any other
        for index, others in enumerate(chosen):
            alike = _compared_settings(runs[0], settings) == _compared_settings(others[0], settings)
            if alike and not _differing_notes(runs[0], others[0], settings):
                chosen[index] = min(others, runs, key=_rank)
                break
        else:
            chosen.append(runs)
    return sorted(chosen, key=members.index)


def _rank(runs: Sequence[Run]) -> tuple[int, bool, float]:
    """Sorts better groups first. A run whose last loss is not finite has not finished."""
    last = [list(run.series("eval/loss").values())[-1:] for run in runs]
    worst = max((loss for losses in last for loss in losses), default=math.inf)
    return -len(runs), not all(run.is_finished for run in runs), worst


def group_of(groups: Sequence[Group], name: str) -> Group:
    """The group of the run whose folder has this path or name; raises CompareError unless exactly one run matches."""
    matches = [(group, run) for group in groups for run in group.runs if run.is_named(name)]
    if len(matches) != 1:
        folders = ", ".join(str(run.folder) for _, run in matches)
        fault = f"matches {folders}" if matches else "matches none of the runs, or --best left it out"
        raise CompareError(f"{name}: {fault}; give the path of one run's folder")
    return matches[0][0]


def _method_title(settings: Mapping[str, Any]) -> str:
    """The method's title with its cycle of operators if that is longer than one, such as ``ReMoRA (1, 2)``."""
    name = settings["method.name"]
    title = METHODS[name].title if name in METHODS else "SLTrain" if name == _SLTRAIN else name
    operators = settings.get("method.operators", ())
    return f"{title} ({_shown(operators)})" if len(operators) > 1 else title


def _compared_settings(run: Run, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """The settings that the run uses, without ``ignored``, seeds, and settings that do not affect numbers."""
    settings = run.settings
    kept = {
        name: value
        for name, value in used_settings(settings).items()
        if name not in _IGNORED and name.partition(".")[0] not in _IGNORED_SECTIONS
    }
    if settings.get("train.epochs") is not None:  # the number of steps depends on the order, so on the seed
        kept["train.epochs"] = settings["train.epochs"]
        del kept["train.steps"]
        if settings["optim.warmup_fraction"] is not None:
            del kept["optim.warmup_steps"]
    return {name: value for name, value in kept.items() if name not in ignored}


def used_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that have an effect; only the first of the operators if they never alternate."""
    name = "lora" if settings["method.name"] == _SLTRAIN else settings["method.name"]
    method = METHODS.get(name)
    unused = {*unused_settings({**settings, "method.name": name})}
    unused |= {name for name, default in OLD_DEFAULTS.items() if settings.get(name) == default}
    used = {name: value for name, value in settings.items() if name not in unused}
    if method is not None and not method.merges and "method.operators" in used:
        used["method.operators"] = used["method.operators"][:1]
    return used


def _seed(run: Run) -> tuple[Any, ...]:
    return tuple(run.settings.get(name) for name in SEEDS)


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings with several values; runs without a setting do not count, except for those of 0.2."""
    names = dict.fromkeys(name for each in settings for name in each if name not in _IN_TITLE)
    values = {
        name: {
            _as_text(each.get(name, OLD_DEFAULTS.get(name)))
            for each in settings
            if name in each or name in OLD_DEFAULTS
        }
        for name in names
    }
    operators = {
        json.dumps(each["method.operators"]) for each in settings if len(each.get("method.operators", ())) == 1
    }
    return [name for name in names if len(values[name]) > 1] + ["method.operators"] * (len(operators) > 1)


def _as_text(value: Any) -> str:
    """JSON in which held-out sets are sorted by name."""
    return json.dumps(value, sort_keys=True, default=str)


def _look_alike(name: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether different values of a setting look the same when paths are shortened."""
    values = {_as_text(each[name]): _shown(each[name]) for each in settings if name in each}
    return len(set(values.values())) < len(values)


def _differences(settings: Mapping[str, Any], names: Sequence[str], full_paths: Set[str]) -> str:
    """Such as ``rank 32, lr 0.001``; matrix optimizers only by their names, settings in ``full_paths`` in full."""
    key_counts = Counter(name.partition(".")[2] for name in names)
    shown = []
    for name in names:
        section, _, key = name.partition(".")
        value = settings.get(name)
        if value in (None, {}) or (name == "method.operators" and len(settings[name]) > 1):
            continue
        if name == "optim.matrices":
            optimizer = optimizer_named(value)
            shown.append(_OLD_OPTIMIZERS.get(value, value) if optimizer is None else optimizer.title)
            continue
        title = section if key == "name" else key if key_counts[key] == 1 else f"{section} {key}"
        title = title.replace("_", " ")
        text = _shown(value, full_path=name in full_paths)
        shown.append(f"{title} {text.removeprefix(title.rpartition(' ')[2] + ' ')}")  # not "merge every every 10"
    return ", ".join(shown)


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
