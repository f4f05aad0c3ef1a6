"""The cells of a study: a run each, named after what differs between them."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from relora_mora.config.schema import SETTINGS
from relora_mora.study.design import SEEDS, Choice, Study

LONGEST_NAME = 200  # file systems allow 255 bytes, and files of a cell have endings


@dataclass(frozen=True)
class Cell:
    """One run: its values of the grid, as JSON by the names of settings, and its seed."""

    name: str
    values: tuple[tuple[str, str], ...]
    seed: int

    def overrides(self, study: Study) -> dict[str, str]:
        """Settings over the base config, as a command line gives them; those of the grid win over the study's."""
        common = {name: json.dumps(value, ensure_ascii=False) for name, value in study.settings.items()}
        return common | dict(self.values) | dict.fromkeys(SEEDS, str(self.seed))


def first_round(study: Study) -> list[Cell]:
    """The grid with every seed or, where something is to be chosen, with the first."""
    seeds = study.seeds if study.choose is None else study.seeds[:1]
    return _cells(study, [values for entry in study.grid for values in _combinations(entry)], seeds)


def second_round(study: Study, results: Mapping[Cell, float]) -> list[Cell]:
    """What was chosen by ``results`` (the metric of each cell of the first round that ended well), with other seeds.

    Where two results are equal, the one that stands first in the grid is chosen.
    """
    return _cells(study, [cell.values for cell in chosen(study, results)], study.seeds[1:])


def chosen(study: Study, results: Mapping[Cell, float]) -> list[Cell]:
    """The best cell of each combination of the settings that are not chosen over."""
    choice = study.choose
    if choice is None:
        return []
    best: dict[tuple[tuple[str, str], ...], Cell] = {}
    for cell, result in results.items():
        rest = _without(cell.values, choice.over)
        if rest not in best or _better(choice, result, results[best[rest]]):
            best[rest] = cell
    return list(best.values())


def count(study: Study) -> int:
    """Cells of both rounds."""
    first = first_round(study)
    if study.choose is None:
        return len(first)
    over = study.choose.over
    return len(first) + len({_without(cell.values, over) for cell in first}) * (len(study.seeds) - 1)


def _better(choice: Choice, result: float, other: float) -> bool:
    return result < other if choice.lowest else result > other


def _without(values: tuple[tuple[str, str], ...], names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in values if name not in names))


def _combinations(entry: Mapping[str, Any]) -> list[tuple[tuple[str, str], ...]]:
    choices = [
        [(name, json.dumps(value, ensure_ascii=False)) for value in (given if isinstance(given, list) else [given])]
        for name, given in entry.items()
    ]
    return list(itertools.product(*choices))


def _cells(study: Study, combinations: Iterable[tuple[tuple[str, str], ...]], seeds: Iterable[int]) -> list[Cell]:
    given = list(itertools.product(combinations, list(seeds)))
    twice = [_name(study, *each) for each, times in Counter(given).items() if times > 1]
    if twice:
        raise ValueError(f"the grid names the same run twice: {', '.join(twice)}; leave one of them out")
    names = [_name(study, *each) for each in given]
    alike = {name for name, times in Counter(names).items() if times > 1}
    return [
        Cell(_with_digest(name, values) if name in alike or len(name) > LONGEST_NAME else name, values, seed)
        for name, (values, seed) in zip(names, given, strict=True)
    ]


def _with_digest(name: str, values: tuple[tuple[str, str], ...]) -> str:
    """The name cut short, and told from others by a digest of the values."""
    settings, _, seed = name.rpartition(",")
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]
    return f"{settings[: LONGEST_NAME - 40]},{digest},{seed}"


def _name(study: Study, values: tuple[tuple[str, str], ...], seed: int) -> str:
    """Such as ``name=mora,rank=8,lr=0.002,seed=0``; a folder can have this name."""
    # with all there are, so that no later entry of a grid changes the names of cells
    settings = {name for entry in study.grid for name in entry} | SETTINGS.keys()
    last = Counter(name.rpartition(".")[2] for name in settings)
    parts = []
    for name, value in values:
        short = name.rpartition(".")[2]
        label = short if last[short] == 1 else name
        parts.append(f"{label}={re.sub(r'[^A-Za-z0-9.+-]+', '_', value).strip('_')}")
    return ",".join([*parts, f"seed={seed}"])
