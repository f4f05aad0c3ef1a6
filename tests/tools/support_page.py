"""What the checks of settings refuse together, in docs/support.md."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, get_args

from relora_mora.config.checks.combinations import faults
from relora_mora.config.registry import MATRIX_OPTIMIZERS, METHODS, OPERATORS, OTHERS, settings_of_others
from relora_mora.config.schema import SETTINGS, Config
from tests.tools.config_tools import tree
from tests.tools.grids import STAGES

_HEAD = """\
## With each method

"not" names the values that are refused; – means that the method does not use the setting.

"""
_REFUSED = """
## Refused together

The checks refuse these pairs before anything is read. What depends on the machine is checked when a
run starts: a compiler for `model.compile`, a GPU and its package for `flash_attention_2`, and the
[units](method.md#frozen-weights-in-8-bits) that `method.base` needs.

| setting | refused with | why | instead |
|---|---|---|---|
"""


class Value(NamedTuple):
    """A value of a setting: how the page shows it, and the settings of a run that has it."""

    setting: str
    shown: str
    run: dict[str, Any]


def _each(setting: str, values: Iterable[Any] = (), **run: Any) -> list[Value]:
    """Some values of a setting, or all that the schema names. ``run`` is what else a run with them needs."""
    kinds = get_args(SETTINGS[setting].annotation)
    named = itertools.chain(*(get_args(kind) or [kind] for kind in kinds))
    given = [value for value in values or named if value is not type(None)]
    return [Value(setting, str(value).lower(), {setting: value, **run}) for value in given]


VALUES = [
    *_each("train.zero_stage", STAGES),
    *_each("train.precision"),
    *_each("optim.matrices", MATRIX_OPTIMIZERS),
    *_each("optim.others", OTHERS),
    *_each("method.form"),
    *_each("method.base"),
    Value("method.base", "int8 with base_products: false", {"method.base": "int8", "method.base_products": False}),
    *_each("method.dropout", [0.1]),
    *_each(
        "method.operators",
        [*([number, 2 if number == 1 else 1] for number in OPERATORS), [1]],
        **{"method.square_multiple": 2},  # some operators need it
    ),
    *_each("method.reset"),
    *_each("model.adapter", ["folder"], **{"model.init_from": "folder"}),
    *_each("model.attention"),
    *_each("model.compile", [True]),
    *_each("model.activation_checkpointing", [True]),
    *_each("data.packing", **{"data.records": {"kind": "question"}}),
    *_each("data.document_mask", [True]),
]
_METHODS = _each("method.name", METHODS)


def _refusal(*values: Value) -> str | None:
    """The message of the first check that refuses a run with these values."""
    sections: dict[str, dict[str, Any]] = {}
    for setting, value in itertools.chain(*(each.run.items() for each in values)):
        section, key = setting.split(".")
        sections.setdefault(section, {})[key] = value
    return next((fault.text for fault in faults(Config.model_validate(tree(**sections)), world_size=1)), None)


def _uses(method: Value, value: Value) -> bool:
    return value.setting not in settings_of_others(METHODS[method.shown])


def _refused() -> Iterator[tuple[Value, Value, str]]:
    for method in _METHODS:
        used = [(value, _refusal(method, value)) for value in VALUES if _uses(method, value)]
        yield from ((value, method, text) for value, text in used if text)
        for a, b in itertools.combinations([value for value, text in used if text is None], 2):
            if a.setting != b.setting and (text := _refusal(method, a, b)):
                yield a, b, text


def _cell(method: Value, values: list[Value]) -> str:
    if not _uses(method, values[0]):
        return "–"
    refused = [value.shown for value in values if _refusal(method, value)]
    if len(refused) == len(values):
        return "no"
    return f"not {', '.join(refused)}" if refused else "yes"


def _matrix() -> str:
    lines = [f"| setting | {' | '.join(METHODS)} |", "|---|" + "---|" * len(METHODS)]
    for setting, group in itertools.groupby(VALUES, lambda value: value.setting):
        values = list(group)
        cells = [_cell(method, values) for method in _METHODS]
        lines.append(f"| `{setting}`: {', '.join(value.shown for value in values)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _pairs() -> str:
    """Pairs with the same settings and remedy share a line; the reason is the one of the first pair."""
    seconds: dict[tuple[str, ...], dict[str, str]] = {}
    for a, b, text in _refused():
        why, _, instead = text.rpartition("; ")
        seconds.setdefault((a.setting, b.setting, instead, a.shown), {}).setdefault(b.shown, why)
    firsts: dict[tuple[str, ...], dict[str, str]] = {}
    for (*same, shown), found in seconds.items():
        firsts.setdefault((*same, ", ".join(found)), {})[shown] = next(iter(found.values()))
    return "\n".join(
        f"| `{a}`: {', '.join(found)} | `{b}`: {shown} | {next(iter(found.values()))} | {instead} |"
        for (a, b, instead, shown), found in firsts.items()
    )


def generated() -> str:
    return f"{_HEAD}{_matrix()}\n{_REFUSED}{_pairs()}\n"
