"""Runs that differ in nothing but their seeds belong together; a label says in what the others differ."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora_mora.config.checks.combinations import OPERATIONAL, unused_settings
from relora_mora.config.data import RecordsConfig, TextSource
from relora_mora.config.registry import MATRIX_OPTIMIZERS, METHODS
from relora_mora.experiments.compare.runs import CompareError, Run

SEEDS = ("train.seed", "data.seed")
# how a run is kept, watched and started, or what follows from it: nothing that its numbers depend on
_APART_SECTIONS = ("checkpoint", "log")
_APART = {
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


@dataclass(frozen=True)
class Group:
    """Runs that share all settings but the seeds: one row of a table, one line of a figure.

    ``method`` is what papers call the method, ``differs`` the settings in which the groups of a comparison differ, and
    what its runs did not do by their settings from their first step on.
    """

    method: str
    differs: str
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        return f"{self.method}, {self.differs}" if self.differs else self.method

    @property
    def is_finished(self) -> bool:
        return all(run.is_finished for run in self.runs)

    @property
    def state(self) -> str:
        """In words, where a run that has not ended stands; empty when all have."""
        waiting = [run for run in self.runs if not run.is_finished]
        if not waiting:
            return ""
        if any(run.has_diverged for run in waiting):
            return "its last loss is not finite"
        state = "running" if any(run.is_running for run in waiting) else "unfinished"
        step = min(run.last_step for run in waiting)
        return f"{state}, step {step:,} of {waiting[0].steps:,}"

    def common_steps(self, series: Sequence[Mapping[int, float]]) -> list[int]:
        """The steps at which all of these have a value, in order."""
        return sorted(set.intersection(*map(set, series)))


def group_runs(runs: Iterable[Run], unnamed: Sequence[str] = (), best: Sequence[str] = ()) -> list[Group]:
    """The runs in groups, in the order in which they are given.

    What was found where the settings point counts, too: numbers of parameters, whether it was bf16, and digests of
    weights, text and tokenizer. A run with settings and seed of another one is no further seed: it stands alone, and
    its label says why. ``unnamed`` are settings that groups differ in and are not named after, such as ``optim.lr``. Of
    groups that differ in the settings ``best`` alone there is one: that with most seeds, or else with the lowest last
    validation loss (of its worst seed) among those that have finished.

    Raises :class:`CompareError` where there is no such setting.
    """
    gathered: dict[str, list[Run]] = {}
    for run in runs:
        settings = json.dumps(compared_settings(run.settings), sort_keys=True, default=str)
        repeat = 0
        while any(not _goes_with(run, other) for other in gathered.get(f"{repeat}{settings}", ())):
            repeat += 1
        gathered.setdefault(f"{repeat}{settings}", []).append(run)
    for option, names in (("unnamed", unnamed), ("best", best)):
        for name in names:
            if not any(name in group[0].settings for group in gathered.values()):
                raise CompareError(f"--{option}: no run has a setting {name}; docs/settings.md lists them")
    members = _best(list(gathered.values()), best) if best else list(gathered.values())
    compared = [compared_settings(runs[0].settings) for runs in members]
    names = [name for name in _differing(compared) if name not in unnamed]
    whole = {name for name in names if _is_one_word(name, compared)}
    parts = [
        (method_title(each), ", ".join(filter(None, (_differences(each, names, whole), *_histories(runs)))))
        for each, runs in zip(compared, members, strict=True)
    ]
    alike = Counter(parts)
    groups: list[Group] = []
    for (method, differs), runs in zip(parts, members, strict=True):
        own_name = _own_name(runs[0], groups, [*unnamed, *best]) if alike[method, differs] > 1 else ""
        groups.append(Group(method, ", ".join(filter(None, (differs, own_name))), tuple(runs)))
    return groups


def _own_name(run: Run, before: Iterable[Group], apart: Sequence[str]) -> str:
    """The name of a run's folder, and why it is no further seed of those before it, settings ``apart`` aside."""
    others = (other for group in before for other in group.runs)
    alike = [other for other in others if _settings_but(apart, other) == _settings_but(apart, run)]
    noted = ", ".join(sorted({name for other in alike for name in _noted_otherwise(run, other, apart)}))
    if noted:
        return f"{run.folder.name} (other {noted})"
    is_same = any(_seed(other) == _seed(run) and _settings_but((), other) == _settings_but((), run) for other in alike)
    return f"{run.folder.name} (the same seed)" if is_same else run.folder.name


def _histories(runs: Iterable[Run]) -> list[str]:
    """Of seeds that are one row: what one of them noted, or none where none did."""
    return list(dict.fromkeys(filter(None, map(_history, runs))))


def _history(run: Run) -> str:
    """In words, where it began if not at its start, and what resumes changed; empty for nearly all runs."""
    changes = [
        f"{' and '.join(dict.fromkeys(text.partition(':')[0] for text in changed))} changed at step {step:,}"
        for step, changed in run.changes
    ]
    began = [f"begun at a checkpoint of step {run.first_step:,}"] if run.first_step else []
    return ", ".join(began + changes)


def _goes_with(run: Run, other: Run) -> bool:
    """Whether two runs with the same settings are one with two seeds."""
    return _seed(run) != _seed(other) and not _noted_otherwise(run, other)


def _noted_otherwise(run: Run, other: Run, apart: Sequence[str] = ()) -> list[str]:
    """The settings, but for those ``apart``, of which two runs noted different things, as far as both noted them."""
    left = _noted(run)
    right = _noted(other)
    names = (left.keys() & right.keys()).difference(apart, (name.partition(".")[0] for name in apart))
    return [name for name in names if left[name] != right[name]]


def _noted(run: Run) -> dict[str, Any]:
    """What settings name or leave open, by the setting, or its section; earlier versions noted less."""
    noted: dict[str, Any] = {"model": run.parameters.get("total"), "train.precision": run.bf16, **run.began_with}
    noted["data.validation"] = run.scored or None
    if run.starts:
        noted |= {"settings before a resume": run.changes, "first step": run.first_step}
    return {name: value for name, value in noted.items() if value is not None}


def _best(members: Sequence[list[Run]], settings: Sequence[str]) -> list[list[Run]]:
    chosen: list[list[Run]] = []
    for runs in sorted(members, key=lambda runs: -len(_noted(runs[0]))):  # what noted nothing goes with any
        for index, others in enumerate(chosen):
            if _differ_only_in(settings, runs[0], others[0]):
                chosen[index] = min(others, runs, key=_rank)
                break
        else:
            chosen.append(runs)
    return sorted(chosen, key=members.index)


def _differ_only_in(settings: Sequence[str], run: Run, other: Run) -> bool:
    return _settings_but(settings, run) == _settings_but(settings, other) and not _noted_otherwise(run, other, settings)


def _settings_but(names: Sequence[str], run: Run) -> dict[str, Any]:
    return {name: value for name, value in compared_settings(run.settings).items() if name not in names}


def _rank(runs: Sequence[Run]) -> tuple[int, bool, float]:
    """The lower, the better: runs with an end that is not finite have not finished."""
    return -len(runs), not all(run.is_finished for run in runs), _last_loss(runs)


def _last_loss(runs: Sequence[Run]) -> float:
    last = [list(run.series("eval/loss").values())[-1:] for run in runs]
    return max((loss for losses in last for loss in losses), default=math.inf)


def group_of(groups: Sequence[Group], name: str) -> Group:
    """The group that a run is in, by the path or the name of its folder; raises CompareError unless it is one run."""
    found = [(group, run) for group in groups for run in group.runs if run.is_named(name)]
    if len(found) != 1:
        folders = ", ".join(str(run.folder) for _, run in found)
        raise CompareError(
            f"{name}: is {folders or 'none of the runs, or --best left it out'}; give the path of one run's folder"
        )
    return found[0][0]


def method_title(settings: Mapping[str, Any]) -> str:
    """Full rank, LoRA, ReLoRA, MoRA, ReMoRA (1, 2): a cycle of operators is part of the name."""
    method = METHODS.get(settings["method.name"])
    title = settings["method.name"] if method is None else method.title
    operators = settings.get("method.operators", ())
    return f"{title} ({_shown(operators)})" if len(operators) > 1 else title


def compared_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that count: what method and optimizer use, without seeds and what says how a run is kept."""
    kept = {
        name: value
        for name, value in used_settings(settings).items()
        if name not in _APART and name.partition(".")[0] not in _APART_SECTIONS
    }
    if settings.get("train.epochs") is not None:  # how many steps these are depends on the order, so on the seed
        kept["train.epochs"] = settings["train.epochs"]
        del kept["train.steps"]
        if settings["optim.warmup_fraction"] is not None:
            del kept["optim.warmup_steps"]
    return kept


def used_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that make a difference beside the others; of operators that never alternate, the first."""
    method = METHODS.get(settings["method.name"])
    unused = unused_settings(settings)
    used = {name: value for name, value in settings.items() if name not in unused}
    if method is not None and not method.merges and "method.operators" in used:
        used["method.operators"] = used["method.operators"][:1]
    return used


def _seed(run: Run) -> tuple[Any, ...]:
    return tuple(run.settings.get(name) for name in SEEDS)


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings of which several values are in use; of a setting that one method has, that is one value."""
    names = dict.fromkeys(name for each in settings for name in each if name not in _IN_TITLE)
    values = {name: {_written(each[name]) for each in settings if name in each} for name in names}
    operators = {
        json.dumps(each["method.operators"]) for each in settings if len(each.get("method.operators", ())) == 1
    }
    return [name for name in names if len(values[name]) > 1] + ["method.operators"] * (len(operators) > 1)


def _written(value: Any) -> str:
    """The same for sets of held-out text in any order."""
    return json.dumps(value, sort_keys=True, default=str)


def _is_one_word(name: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a setting's different values look the same when paths are cut short."""
    values = {_written(each[name]): _shown(each[name]) for each in settings if name in each}
    return len(set(values.values())) < len(values)


def _differences(settings: Mapping[str, Any], names: Sequence[str], whole: Set[str]) -> str:
    """Rank 32, lr 0.001; the paths of the settings ``whole`` in full, optimizers by their names alone"""
    ends = Counter(name.partition(".")[2] for name in names)
    shown = []
    for name in names:
        section, _, key = name.partition(".")
        if settings.get(name) in (None, {}) or (name == "method.operators" and len(settings[name]) > 1):
            continue
        if name == "optim.matrices" and settings[name] in MATRIX_OPTIMIZERS:
            shown.append(MATRIX_OPTIMIZERS[settings[name]].title)
            continue
        title = section if key == "name" else key if ends[key] == 1 else f"{section} {key}"
        shown.append(f"{title.replace('_', ' ')} {_shown(settings[name], whole=name in whole)}")
    return ", ".join(shown)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Of a source of text, or of what its rows hold, what is not the default; else all."""
    for model, key in ((TextSource, "source"), (RecordsConfig, "kind")):
        if key in values:
            defaults = {name: field.get_default() for name, field in model.model_fields.items() if name != key}
            return {name: each for name, each in values.items() if name not in defaults or each != defaults[name]}
    return values


def _shown(value: Any, *, whole: bool = False) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "default"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(each, whole=whole) for each in value)
    if isinstance(value, dict):
        value = _given(value)
        return ", ".join(f"{key} {_shown(inner, whole=whole)}" for key, inner in value.items())
    return Path(value).stem if isinstance(value, str) and "/" in value and not whole else str(value)
