"""Explains pydantic's errors to a user, and finds out which settings can still be checked despite them."""

import difflib
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from relora_mora.config.schema import Config
from relora_mora.config.secrets import redact

Location = tuple[int | str, ...]
# what other trainers call these settings
ELSEWHERE = {
    "output_dir": "train.run_dir",
    "learning_rate": "optim.lr",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size",
    "max_seq_length": "data.sequence_length",
    "max_grad_norm": "optim.clip",
    "lr_scheduler_type": "optim.schedule",
    "report_to": "log.wandb",
    "seed": "train.seed",
}


def explain(error: ValidationError) -> list[str]:
    """One line for each wrong setting: what was given, what was expected, what the setting means."""
    messages: dict[str, list[ErrorDetails]] = {}
    for item in error.errors():
        messages.setdefault(_setting(item["loc"]), []).append(item)
    return [f"{setting}: {_explain(items)}" for setting, items in messages.items()]


def doubtful(error: ValidationError) -> set[str]:
    """The settings that cannot be checked further, because they are wrong, missing or probably misspelled.

    A whole section is named without a dot.
    """
    names = set()
    for item in error.errors():
        location = item["loc"][:2]
        name = ".".join(map(str, location))
        near = _nearest(location) if item["type"] == "extra_forbidden" else None
        names.add(name if near is None else near if "." in near else ".".join([*name.split(".")[:-1], near]))
    return names


def substitute_defaults(tree: Mapping[str, Any], error: ValidationError) -> Config | None:
    """The settings with a default (or placeholder) for each faulty one, so that the others can be checked.

    None if that is not possible.
    """
    pruned: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
    for item in error.errors():
        section, *rest = item["loc"]
        inside = pruned.get(str(section))
        if rest and isinstance(inside, dict):
            inside.pop(str(rest[0]), None)
        else:
            pruned.pop(str(section), None)
    for section, field in Config.model_fields.items():
        model = field.annotation
        assert isinstance(model, type) and issubclass(model, BaseModel)
        inside = pruned.setdefault(section, {})
        if isinstance(inside, dict):
            inside.update(
                {key: "?" for key, inner in model.model_fields.items() if inner.is_required() and key not in inside}
            )
    try:
        return Config.model_validate(pruned)
    except ValidationError:
        return None


def _explain(items: list[ErrorDetails]) -> str:
    location = items[0]["loc"]
    kind = items[0]["type"]
    if kind == "extra_forbidden":
        near = _nearest(location)
        known = _fields_at(location)
        return "unknown" + (f"; did you mean {near}?" if near else f"; known here: {', '.join(known)}" if known else "")
    if kind == "missing":
        return f"must be given{_description(location)}"
    shown = redact(repr(items[0]["input"]))  # before it is cut, because a piece of a token would not be recognized
    shown = shown if len(shown) < 80 else shown[:77] + "..."
    return f"got {shown}; {expectation(items)}{_description(location)}"


def expectation(items: list[ErrorDetails]) -> str:
    """What was expected, according to the errors of a value."""
    return " or ".join(dict.fromkeys(map(_expected, items)))


def _expected(item: ErrorDetails) -> str:
    if item["type"] == "model_type":  # pydantic's message names an internal class
        return "input should be names and values"
    if item["type"] == "int_type" and isinstance(item["input"], float) and item["input"].is_integer():
        return f"write {item['input']:.0f}"
    return item["msg"][:1].lower() + item["msg"][1:]


def _setting(location: Location) -> str:
    """The dotted name of a setting, without the name of a set that has none and without the members of a union."""
    field = _fields_at(location[:2]).get(str(location[:2][-1]))
    holds_records = field is not None and model_in(field.annotation) is not None
    parts = [part for part in location[2:] if isinstance(part, int) or (holds_records and part not in ("", "[key]"))]
    return ".".join(map(str, [*location[:2], *parts]))


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The first pydantic model inside a setting's type; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(model_in, get_args(annotation))), None)


def _fields_at(location: Location) -> dict[str, Any]:
    """The valid names at the level of a location's last part, with their fields."""
    model: type[BaseModel] = Config
    for part in location[:-1]:  # numbers and names of sets are not fields
        field = model.model_fields.get(str(part))
        model = (None if field is None else model_in(field.annotation)) or model
    return dict(model.model_fields)


def _nearest(location: Location) -> str | None:
    """The name that was meant, with its section if that is another one."""
    name = str(location[-1])
    near = difflib.get_close_matches(name, _fields_at(location), n=1)
    return near[0] if near else ELSEWHERE.get(name)


def _description(location: Location) -> str:
    for length in (len(location), 2, 1):
        if len(location) >= length:
            field = _fields_at(location[:length]).get(str(location[length - 1]))
            if field is not None and field.description:
                return f" ({field.description})"
    return ""
