"""A study is a grid of settings over a base config, read from a YAML file. Each of its cells is one run."""

import functools
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from relora_mora.config.explain import explain
from relora_mora.config.load import ConfigError, read_tree
from relora_mora.config.schema import SETTINGS
from relora_mora.config.types import Positive, Seed, Strict, Text
from relora_mora.experiments.compare.settings import SEEDS

OWN = {*SEEDS, "train.run_dir"}  # settings that the study itself sets


class Choice(Strict):
    """Chooses the values of the settings ``over`` by the ``lowest`` or ``highest`` metric of the last evaluation."""

    over: list[Text] = Field(min_length=1)
    lowest: Text | None = None
    highest: Text | None = None

    @property
    def metric(self) -> str:
        return self.lowest or self.highest or ""


class Study(Strict):
    """Each entry of ``grid`` maps settings to a value or a list of values, and expands to all combinations.

    With ``choose`` the whole grid runs with the first seed, and only the chosen cells run with the other seeds.
    """

    command: Literal["pretrain", "finetune"] = "pretrain"
    base: Text
    settings: dict[str, Any] = Field(default_factory=dict)
    grid: list[dict[str, Any]] = Field(min_length=1)
    seeds: list[Seed] = Field(default=[0], min_length=1)
    choose: Choice | None = None
    threads: Positive = 1  # per run; the last bits of a result depend on it

    @functools.cached_property
    def base_tree(self) -> dict[str, Any]:
        """The base config, read only once so that later edits of the file do not reach a study that is running.

        Raises ConfigError.
        """
        return read_tree(self.base)


def read_study(path: str | Path) -> Study:
    """Reads a study's file. Raises :class:`ConfigError` with all its faults; the runs' settings are checked later."""
    tree = read_tree(path)
    if "train" in tree:
        raise ConfigError(["train: these are the settings of a run; start it with relora-mora pretrain"], str(path))
    try:
        study = Study.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, Study), str(path)) from None
    choose = study.choose
    named = {name for entry in study.grid for name in entry}
    found = {
        "set by the study itself; list seeds in `seeds`, and give its folder as --out": {*study.settings, *named} & OWN,
        "has an empty list; give it values, or leave it out": {
            name for entry in study.grid for name, values in entry.items() if values == []
        },
        "chosen over, but no entry of the grid has it": set(choose.over if choose else ()) - named,
    }
    faults = [f"{', '.join(sorted(names))}: {fault}" for fault, names in found.items() if names]
    if choose is not None and (choose.lowest is None) == (choose.highest is None):
        faults.append("choose: give `lowest` or `highest`, with a metric such as eval/loss")
    if faults:
        raise ConfigError(faults, str(path))
    return study


Values = tuple[tuple[str, str], ...]  # (setting, JSON) pairs
LONGEST_NAME = 200  # file systems allow 255 bytes, and a cell's files add suffixes


@dataclass(frozen=True)
class Cell:
    """One run: its values from the grid, and its seed."""

    name: str
    values: Values
    seed: int

    def overrides(self, study: Study) -> dict[str, str]:
        """Settings over the base config, as on a command line; the grid's win over the study's ``settings``."""
        common = {name: json.dumps(value, ensure_ascii=False) for name, value in study.settings.items()}
        return common | dict(self.values) | dict.fromkeys(SEEDS, str(self.seed))


def first_round(study: Study) -> list[Cell]:
    """The grid with every seed, or only with the first seed if the study has ``choose``."""
    seeds = study.seeds if study.choose is None else study.seeds[:1]
    return _cells(study, [values for entry in study.grid for values in _combinations(entry)], seeds)


def second_round(study: Study, results: Mapping[Cell, float]) -> list[Cell]:
    """The other seeds of the best cell for each combination of the settings outside ``choose.over``.

    ``results`` has the metric of each cell of the first round that finished, in the order of the grid. If two results
    are equal, the cell that comes first is chosen.
    """
    if study.choose is None:
        return []
    best: dict[frozenset[tuple[str, str]], Cell] = {}
    for cell in sorted(results, key=results.__getitem__, reverse=study.choose.highest is not None):
        others = frozenset(each for each in cell.values if each[0] not in study.choose.over)
        best.setdefault(others, cell)
    return _cells(study, [cell.values for cell in results if cell in best.values()], study.seeds[1:])


def count(study: Study) -> int:
    """The number of runs, if none fails."""
    first = first_round(study)
    return len(first) + len(second_round(study, dict.fromkeys(first, 0.0)))


def _combinations(entry: Mapping[str, Any]) -> list[Values]:
    choices = [
        [(name, json.dumps(value, ensure_ascii=False)) for value in (values if isinstance(values, list) else [values])]
        for name, values in entry.items()
    ]
    return list(itertools.product(*choices))


def _cells(study: Study, combinations: Iterable[Values], seeds: Iterable[int]) -> list[Cell]:
    """A cell for each combination and seed, with a name that a folder can have, such as ``rank=8,lr=0.002,seed=0``."""
    # counts all settings that exist, so that another entry in the grid does not change the names of earlier cells
    settings = {name for entry in study.grid for name in entry} | SETTINGS.keys()
    last = Counter(name.rpartition(".")[2] for name in settings)

    def described(name: str, value: str) -> str:
        key = name.rpartition(".")[2]
        return f"{key if last[key] == 1 else name}={re.sub(r'[^A-Za-z0-9.+-]+', '_', value).strip('_')}"

    runs = list(itertools.product(combinations, list(seeds)))
    names = [",".join([*itertools.starmap(described, values), f"seed={seed}"]) for values, seed in runs]
    times = Counter(names)
    cells = []
    for name, (values, seed) in zip(names, runs, strict=True):
        if times[name] > 1 or len(name) > LONGEST_NAME:
            digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]
            name = f"{name.rpartition(',')[0][: LONGEST_NAME - 40]},{digest},seed={seed}"
        cells.append(Cell(name, values, seed))
    return cells
