"""A study: a grid of settings over a base config, read from a YAML file, and its cells, one run each."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from relora_mora.config.load import ConfigError, read_tree
from relora_mora.config.schema import SETTINGS, Config
from relora_mora.config.types import Positive, Seed, Strict, Text
from relora_mora.config.yaml_text import explain_yaml, parse_yaml

SEEDS = ("train.seed", "data.seed")  # what a seed of the study sets
OF_ANSWERS = ("exact_match", "character_accuracy")
METRICS = ("loss", "perplexity", "bits_per_byte", *OF_ANSWERS)  # to choose by
OWN = (*SEEDS, "train.run_dir")  # settings that a study gives


class Choice(Strict):
    """Which values of some settings are best, by a metric of the last evaluation: ``lowest`` or ``highest`` of it."""

    over: list[Text] = Field(min_length=1)
    lowest: Text | None = None
    highest: Text | None = None

    @model_validator(mode="after")
    def _one_metric(self) -> Choice:
        if (self.lowest is None) == (self.highest is None):
            raise ValueError("give `lowest` or `highest`, with a metric such as eval/loss")
        parts = self.metric.split("/")
        if parts[0] != "eval" or parts[-1] not in METRICS or len(parts) > 3:
            raise ValueError(f"{self.metric}: expected eval/NAME or eval/SET/NAME with a name of {', '.join(METRICS)}")
        return self

    @property
    def metric(self) -> str:
        metric = self.lowest or self.highest
        assert metric is not None
        return metric

    def faults(self, config: Config) -> list[str]:
        """Why a run with these settings will have no such metric, as far as settings tell."""
        _, *given, name = self.metric.split("/")
        data = config.data
        named = {key: sources for key, sources in data.validation_sets.items() if key}
        if given and given[0] not in named:
            return [f"choose: {self.metric}: data.validation names {', '.join(named) or 'no sets'}"]
        sources = named[given[0]] if given else data.sources("validation")
        records = [data.records_of(source) for source in sources]
        if name in OF_ANSWERS and not (config.eval.generate and any(map(data.has_whole_answers, records))):
            return [f"choose: {self.metric}: no such answers are generated; set eval.generate (docs/tasks.md)"]
        if name == "bits_per_byte" and not all(each is None or each.is_text for each in records):
            return [f"choose: {self.metric}: only plain text has that, not records; choose by a loss"]
        return []


class Study(Strict):
    """Each entry of ``grid`` maps settings to a value or to a list of them, and stands for all combinations.

    With ``choose`` the grid is run with the first seed, and with the others only what was chosen.
    """

    command: Literal["pretrain", "finetune"] = "pretrain"
    base: Text
    settings: dict[str, Any] = Field(default_factory=dict)
    grid: list[dict[str, Any]] = Field(min_length=1)
    seeds: list[Seed] = Field(default=[0], min_length=1)
    choose: Choice | None = None
    threads: Positive = 1  # of a run; the last bits of a result depend on it

    @functools.cached_property
    def base_tree(self) -> dict[str, Any]:
        """What the base config holds, read once: a study goes on with what it began with.

        Raises ConfigError.
        """
        return read_tree(self.base)

    @model_validator(mode="after")
    def _settings_that_fit(self) -> Study:
        names = [*self.settings, *(name for entry in self.grid for name in entry)]
        own = sorted({name for name in names if name in OWN})
        if own:
            raise ValueError(f"{', '.join(own)}: set by the study itself; seeds stand in `seeds`")
        dashed = sorted({name for name in names if "-" in name})
        if dashed:
            raise ValueError(f"{', '.join(dashed)}: no name with '-'; give the setting above it, as a mapping")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} has one twice")
        empty = sorted({name for entry in self.grid for name, given in entry.items() if given == []})
        if empty:
            raise ValueError(f"grid: {', '.join(empty)} has an empty list; give it values, or leave it out")
        flat = sorted({name for entry in self.grid for name, given in entry.items() if _lacks_brackets(name, given)})
        if flat:
            raise ValueError(
                f"grid: the value of {', '.join(flat)} is a list itself: such as [[1, 2]] for the value [1, 2]"
            )
        over = self.choose.over if self.choose else []
        missing = [name for name in over if not any(name in entry for entry in self.grid)]
        if missing:
            raise ValueError(f"choose.over: {', '.join(missing)} stands in no entry of the grid")
        return self


def _lacks_brackets(name: str, given: Any) -> bool:
    takes_lists = name in SETTINGS and get_origin(SETTINGS[name].annotation) in (list, tuple)
    return takes_lists and not (isinstance(given, list) and all(isinstance(value, list) for value in given))


def read_study(path: str | Path) -> Study:
    """Raises :class:`ConfigError` with every fault of the file; settings of its runs come later."""
    try:
        tree = parse_yaml(Path(path).read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ConfigError(["expected a mapping with `base` and `grid`; docs/studies.md has an example"], str(path))
        return Study.model_validate(tree)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"it is not YAML: {explain_yaml(error)}"], str(path)) from None
    except ValidationError as error:
        raise ConfigError([_say(item) for item in error.errors()], str(path)) from None


def _say(fault: ErrorDetails) -> str:
    location = fault["loc"]
    text = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        known = Choice.model_fields if location[0] == "choose" else Study.model_fields
        text = f"unknown; known here: {', '.join(known)}"
    elif location == ("grid",) and fault["type"] == "list_type":
        text = "expected a list of mappings, such as `- {optim.lr: [1e-3, 3e-3]}`"
    return f"{'.'.join(map(str, location))}: {text}" if location else text


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
