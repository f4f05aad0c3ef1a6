"""Explains pydantic's errors to a user, and finds out which settings can still be checked despite them."""

from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from typing_extensions import is_typeddict

from relora_mora.config.removed import REMOVED
from relora_mora.config.schema import Config
from relora_mora.config.secrets import redact
from relora_mora.config.shipped import nearest

REQUIRED = {"model": {}, "data": {"train": "?", "validation": "?"}, "train": {"run_dir": "?"}}  # with a placeholder
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


def explain(error: ValidationError, model: type[BaseModel] = Config) -> list[str]:
    """One line for each wrong setting of a model: what was given, what was expected, what the setting means."""
    messages: dict[str, list[ErrorDetails]] = {}
    for item in error.errors():
        name, *_ = _place(item, model)
        messages.setdefault(name, []).append(item)
    return [f"{name}: {_explain(items, model)}" for name, items in messages.items()]


def doubtful(error: ValidationError) -> set[str]:
    """The settings that cannot be checked further, because they are wrong, missing or probably misspelled.

    A whole section is named without a dot.
    """
    names = set()
    for item in error.errors():
        *above, key = map(str, item["loc"][:2])
        near = _meant(item, Config) if len(item["loc"]) <= 2 and item["type"] == "extra_forbidden" else None
        names.add(near if near and "." in near else ".".join([*above, near or key]))
    return names


def substitute_defaults(tree: Mapping[str, Any], error: ValidationError) -> Config | None:
    """The settings with a default (or placeholder) for each faulty one, so that the others can be checked.

    None if that is not possible.
    """
    wrong = {tuple(map(str, item["loc"][:2])) for item in error.errors()}
    pruned = {
        section: {key: value for key, value in values.items() if (section, key) not in wrong}
        for section, values in tree.items()
        if isinstance(values, dict) and (section,) not in wrong
    }
    try:
        return Config.model_validate(pruned | {name: given | pruned.get(name, {}) for name, given in REQUIRED.items()})
    except ValidationError:
        return None


def _explain(items: list[ErrorDetails], model: type[BaseModel]) -> str:
    """The errors of one setting: of each member if its type is a union."""
    _, description, known = _place(items[0], model)
    kind = items[0]["type"]
    if removed := _removed(items[0], model):
        return removed
    if kind == "extra_forbidden":
        near = _meant(items[0], model)
        return "unknown; " + (f"did you mean {near}?" if near else f"known here: {', '.join(known)}")
    if kind == "missing":
        return f"must be given{description}"
    shown = redact(repr(items[0]["input"]))  # before it is cut, because a piece of a token would not be recognized
    shown = shown if len(shown) < 80 else shown[:77] + "..."
    return f"got {shown}; {expectation(items)}{description}"


def _removed(item: ErrorDetails, model: type[BaseModel]) -> str | None:
    """What to use in place of a setting or a value that only release 0.2 has; None for others."""
    section, *rest = (part for part in _place(item, model)[0].split(".") if not part.isdigit())
    value = "" if item["type"] == "extra_forbidden" else f"={item['input']}"
    remedy = REMOVED.get(".".join([section, *(rest[-1:] if section == "data" else rest)]) + value)
    return remedy and f"only release 0.2 has {value[1:] or 'this setting'}; {remedy}"


def expectation(items: list[ErrorDetails]) -> str:
    """What was expected, according to the errors of a value."""
    return " or ".join(dict.fromkeys(map(_expected, items)))


def _expected(item: ErrorDetails) -> str:
    if item["type"] == "model_type":  # pydantic's message names an internal class
        return "input should be names and values"
    if item["type"] == "int_type" and isinstance(item["input"], float) and item["input"].is_integer():
        return f"write {item['input']:.0f}"
    return item["msg"][:1].lower() + item["msg"][1:]


def _place(item: ErrorDetails, model: type[BaseModel]) -> tuple[str, str, Mapping[str, FieldInfo]]:
    """The dotted name of the wrong setting, what it or what holds it means, and the names that are known there."""
    names: list[str] = []
    description = ""
    known: Mapping[str, FieldInfo] = model.model_fields
    for part in item["loc"]:
        field = known.get(str(part))
        if field is not None:
            description = f" ({field.description})" if field.description else description
            known = _fields_in(field.annotation)
        elif not isinstance(part, int) and (not known or part in ("", "[key]")):
            continue  # the member of a union, a key of names and values, or the set without a name
        names.append(str(part))
    return ".".join(names), description, known


def _meant(item: ErrorDetails, model: type[BaseModel]) -> str | None:
    """The name that was meant by an unknown one, with its section if that is another one."""
    key = str(item["loc"][-1])
    return nearest(key, _place(item, model)[2]) or ELSEWHERE.get(key)


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The first pydantic model inside a setting's type; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(model_in, get_args(annotation))), None)


def _fields_in(annotation: Any) -> Mapping[str, FieldInfo]:
    if is_typeddict(annotation):
        hints = get_type_hints(annotation, include_extras=True)
        return {name: FieldInfo.from_annotation(hint) for name, hint in hints.items()}
    model = model_in(annotation)
    return {} if model is None else model.model_fields
