"""Every setting in docs/settings.md, from the schema."""

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typing_extensions import is_typeddict

from relora_mora.config.explain import model_in
from relora_mora.config.schema import Config
from relora_mora.config.types import LARGEST

_SIGNS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def generated() -> str:
    """A table for each section."""
    parts = []
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, BaseModel)
        parts.append(_section(name, section))
        parts += [_section(f"{name}.{key}", record, level=3) for key, record in _records(section).items()]
    return "\n".join(parts)


def _records(section: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The kinds of records in a section, by the first setting that holds them; ``.N`` marks an element of a list."""
    records: dict[type[BaseModel], str] = {}
    for key, field in section.model_fields.items():
        record = model_in(field.annotation)
        if record is not None:
            is_single = get_args(field.annotation) == (record, type(None))
            records.setdefault(record, key if is_single else f"{key}.N")
    return {key: record for record, key in records.items()}


def _section(name: str, section: type[BaseModel], level: int = 2) -> str:
    rows = [f"{'#' * level} {name}", ""]
    if section.__doc__ and section.__dict__.get("__doc__"):
        rows += [" ".join(section.__doc__.replace("``", "`").split()), ""]
    rows += ["| setting | values | default | what it does |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        cells = [f"`{name}.{key}`", _values(field.annotation, field.metadata), _default(field), field.description or ""]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "must be given"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    if isinstance(value, list) and len(value) > 6:
        return "all"
    if isinstance(value, float):
        return f"`{value:g}`"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


def _values(annotation: Any, metadata: list[Any]) -> str:
    """The valid values of a setting in words: its type and limits, or its choices."""
    for item in metadata:
        if getattr(item, "json_schema_input_type", PydanticUndefined) is not PydanticUndefined:
            return _values(item.json_schema_input_type, [])  # a setting of several forms
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        extra = [item for part in arguments[1:] for item in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return _values(arguments[0], [*extra, *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _values(part, metadata) for part in arguments)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {_values(arguments[0], [])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {_values(arguments[0], [])}"
    if origin is dict or is_typeddict(annotation):
        return "names and values"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "records (below)"
    kind = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}[annotation]
    limits = [
        f"{sign} {value:,}" if isinstance(value, int) else f"{sign} {value:g}"
        for item in metadata
        for attribute, sign in _SIGNS
        if (value := getattr(item, attribute, None)) not in (None, LARGEST)
    ]
    return " ".join([kind, ", ".join(limits)]).strip()
