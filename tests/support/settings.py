"""The settings that docs/support.md combines, and which combinations the checks refuse.

A combination has one value of each dimension. ``python -m tests.support.settings`` tries the whole product (minutes).
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from relora_mora.config.checks.combinations import faults
from relora_mora.config.load import validate
from relora_mora.config.registry import MATRIX_OPTIMIZERS, METHODS, OPERATORS, OTHERS, settings_of_others
from relora_mora.config.schema import Config, MethodConfig
from tests.tools.grids import STAGES

Combination = dict[str, str]  # a value of each dimension, or of some
Place = tuple[str, str]  # a dimension and a value of it


def _choices(setting: str) -> tuple[str, ...]:
    return get_args(MethodConfig.model_fields[setting].annotation)


def _cycle(operator: int) -> tuple[str, dict[str, Any]]:
    cycle = [operator] if OPERATORS[operator].drawn else [operator, 2 if operator == 1 else 1]
    even = {"method.square_multiple": 2} if OPERATORS[operator].even_size else {}
    return ", ".join(map(str, cycle)), {"method.operators": cycle, **even}


_RECORDS = {"data.records": {"kind": "question"}}
_MODEL = {"model.init_from": "a-model"}
# dimension: its values, each with the settings that it stands for
DIMENSIONS: dict[str, dict[str, dict[str, Any]]] = {
    "method": {name: {"method.name": name} for name in METHODS},
    "ZeRO stage": {str(stage): {"train.zero_stage": stage} for stage in STAGES},
    "precision": {name: {"train.precision": name} for name in ("bf16", "fp32")},
    "optimizer": {name: {"optim.matrices": name} for name in MATRIX_OPTIMIZERS},
    "embeddings": {name: {"optim.others": name} for name in OTHERS},
    "base": {
        "null": {},
        "int8": {"method.base": "int8", "method.base_products": True},
        "fp8": {"method.base": "fp8", "method.base_products": True},
        "int8, only stored": {"method.base": "int8", "method.base_products": False},
    },
    "form": {name: {"method.form": name} for name in _choices("form")},
    "dropout": {"0": {}, "0.1": {"method.dropout": 0.1}},
    "reset": {name: {"method.reset": name} for name in _choices("reset")},
    "operators": {
        **dict(map(_cycle, OPERATORS)),
        "1, 2, 3, 4": {"method.operators": [1, 2, 3, 4]},
        "1 only": {"method.operators": [1]},
    },
    "compile": {"no": {"model.compile": False}, "yes": {"model.compile": True}},
    "checkpointing": {"no": {}, "yes": {"model.activation_checkpointing": True}},
    "attention": {name: {"model.attention": name} for name in ("sdpa", "eager", "flash_attention_2")},
    "data": {
        "text": {},
        "text, masked": {"data.document_mask": True},
        "records, whole": _RECORDS,
        "records, one each": {**_RECORDS, "data.packing": "none"},
        "records, stream": {**_RECORDS, "data.packing": "stream"},
    },
    "start": {
        "random": {},
        "a model": _MODEL,
        "a model and its adapter": {**_MODEL, "model.adapter": "an-adapter"},
        "full rank": {"method.full_steps": 50},
    },
}
USUAL: Combination = {name: next(iter(values)) for name, values in DIMENSIONS.items()}
USUAL |= {"method": "remora", "ZeRO stage": "2"}


def _tree(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = value
    return tree


@functools.cache
def _base() -> Config:
    always = {
        "model.config": "model.json",
        "tokenizer.path": "tokenizer",
        "data.train": "train",
        "data.validation": "validation",
        "train.run_dir": "run",
    }
    return validate(_tree(always), "the base of docs/support.md", world_size=1)


@functools.cache
def _section(name: str, chosen: frozenset[Place]) -> Any:
    """A section of the settings with these values, whose types pydantic checks."""
    given = _tree({key: v for place in sorted(chosen) for key, v in DIMENSIONS[place[0]][place[1]].items()})[name]
    section = getattr(_base(), name)
    return type(section).model_validate(section.model_dump(exclude_unset=True) | given)


def config_of(combination: Combination) -> Config:
    """The settings of a combination; a dimension that is not named has its usual value."""
    chosen: dict[str, set[Place]] = {}
    for place in (USUAL | combination).items():
        for setting in DIMENSIONS[place[0]][place[1]]:
            chosen.setdefault(setting.partition(".")[0], set()).add(place)
    return _base().model_copy(update={name: _section(name, frozenset(places)) for name, places in chosen.items()})


@functools.cache
def ignores(method: str, dimension: str) -> bool:
    """Whether a method uses none of a dimension's settings. They are reported as unused then, never refused."""
    settings = {setting for values in DIMENSIONS[dimension].values() for setting in values}
    return settings <= settings_of_others(METHODS, METHODS[method])


def is_plain(combination: Combination) -> bool:
    """Whether everything that the method ignores has its usual value."""
    method = combination.get("method", USUAL["method"])
    return all(value == USUAL[name] or not ignores(method, name) for name, value in combination.items())


def refusal(combination: Combination) -> str | None:
    """The message with which the checks refuse a combination."""
    return next(map(str, faults(config_of(combination), world_size=1)), None)


@functools.cache
def refused_pairs() -> dict[tuple[Place, Place], str]:
    """The pairs of values that no combination can have, with the message.

    A pair of the method and another value comes first. Two other values are a pair if they are refused together, but
    not each by itself, by every method that uses both.
    """
    pairs: dict[tuple[Place, Place], str] = {}
    for method in DIMENSIONS["method"]:
        for place in _places(set(DIMENSIONS) - {"method"}):
            combination = {"method": method, **dict([place])}
            message = refusal(combination) if is_plain(combination) else None
            if message is not None:
                pairs[("method", method), place] = message
    for a, b in itertools.combinations(_places(set(DIMENSIONS) - {"method"}), 2):
        both = [{"method": method, **dict([a, b])} for method in DIMENSIONS["method"] if a[0] != b[0]]
        found = [refusal(each) for each in both if is_plain(each) and not _holds(each, pairs)]
        if any(found):
            assert all(found), f"{a} and {b} are refused for some methods only: {found}"
            pairs[a, b] = str(found[0])
    return pairs


def _places(dimensions: Iterable[str]) -> list[Place]:
    return [(name, value) for name in DIMENSIONS if name in dimensions for value in DIMENSIONS[name]]


def _holds(combination: Combination, pairs: Iterable[tuple[Place, Place]]) -> bool:
    whole = USUAL | combination
    return any(whole[a] == left and whole[b] == right for (a, left), (b, right) in pairs)


def disagreements(combinations: Iterable[Combination]) -> Iterator[str]:
    """Combinations that are refused without a refused pair, or accepted with one."""
    for combination in combinations:
        message = refusal(combination)
        if (message is not None) != _holds(combination, refused_pairs()):
            yield f"{combination}: {message}"


def combinations_of(dimensions: Iterable[str]) -> Iterator[Combination]:
    """Every combination of these dimensions, for each method without those that it ignores."""
    names = set(dimensions)
    for method in DIMENSIONS["method"] if "method" in names else [USUAL["method"]]:
        used = [name for name in DIMENSIONS if name in names - {"method"} and not ignores(method, name)]
        for values in itertools.product(*(DIMENSIONS[name] for name in used)):
            yield {"method": method, **dict(zip(used, values, strict=True))}


if __name__ == "__main__":
    found = list(disagreements(combinations_of(DIMENSIONS)))
    if found:
        sys.exit("\n".join(found[:20]))
    print(f"{len(refused_pairs())} refused pairs explain every refusal")
