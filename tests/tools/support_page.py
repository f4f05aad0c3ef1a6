"""What the checks of settings refuse together, in docs/support.md."""

import itertools
from typing import Any

from relora_mora.config.checks.combinations import faults
from relora_mora.config.registry import MATRIX_OPTIMIZERS, METHODS, OPERATORS, OTHERS, settings_of_others
from relora_mora.config.schema import Config
from tests.tools.config_tools import changed_tree
from tests.tools.grids import STAGES

# each value of a setting is tried with each of those below it
VALUES: dict[str, tuple[Any, ...]] = {
    "method.name": tuple(METHODS),
    "method.dropout": (0.1,),
    "method.base": ("int8", "fp8"),
    "method.base_products": (False,),
    "method.operators": (*([number, 2 if number == 1 else 1] for number in OPERATORS), [1]),
    "train.zero_stage": STAGES,
    "train.precision": ("bf16", "fp32"),
    "method.form": ("merged", "resident", "decoupled"),
    "optim.matrices": tuple(MATRIX_OPTIMIZERS),
    "optim.others": OTHERS,
    "method.reset": ("full", "magnitude", "random", "none", "carry"),
    "model.adapter": ("folder",),
    "model.attention": ("sdpa", "eager", "flash_attention_2"),
    "model.compile": (True,),
    "model.activation_checkpointing": (True,),
    "data.packing": ("stream", "whole", "none"),
    "data.document_mask": (True,),
}
# what else a run with such a value must say
NEEDS: dict[str, dict[str, Any]] = {
    "method.base_products": {"method.base": "int8"},
    "method.operators": {"method.square_multiple": 2},
    "model.adapter": {"model.init_from": "folder"},
    "data.packing": {"data.records": {"kind": "question"}},
}


def _refusal(*values: tuple[str, Any]) -> str | None:
    """The message of the first check that refuses a run with these values."""
    settings: dict[str, Any] = {}
    for setting, value in values:
        settings |= {**NEEDS.get(setting, {}), setting: value}
    return next((fault.text for fault in faults(Config.model_validate(changed_tree(settings)), world_size=1)), None)


def _is_tried(first: tuple[str, Any], second: tuple[str, Any]) -> bool:
    """Whether a run with both values would use both; with other settings than the method, it is one of ReMoRA."""
    if first[0] == "method.name":
        return second[0] not in settings_of_others(METHODS[first[1]])
    return first[0] != second[0] and not (_refusal(first) or _refusal(second))


def generated() -> str:
    """A table of the pairs; those of one value with several of another setting share a line, and its reason."""
    rows: dict[tuple[str, str, str], tuple[str, list[str]]] = {}
    values = [(setting, value) for setting, values in VALUES.items() for value in values]
    for first, second in itertools.combinations(values, 2):
        if _is_tried(first, second) and (text := _refusal(first, second)):
            why, _, instead = text.rpartition("; ")
            key = (f"`{first[0]}`: {str(first[1]).lower()}", second[0], instead)
            rows.setdefault(key, (why, []))[1].append(str(second[1]).lower())
    lines = ["| setting | refused with | why | instead |", "|---|---|---|---|"]
    for (first_shown, setting, instead), (why, shown) in rows.items():
        lines.append(f"| {first_shown} | `{setting}`: {', '.join(shown)} | {why} | {instead} |")
    return "\n".join(lines) + "\n"
