"""Every setting in docs/settings.md, from the JSON schema of ``Config``."""

from collections.abc import Iterator
from typing import Any

import yaml

from relora_mora.config.schema import Config
from relora_mora.config.types import LARGEST

Schema = dict[str, Any]
_SCHEMA = Config.model_json_schema()
_KINDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`", "null": "null"}
_SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_HEAD = ["| setting | values | default | what it does |", "|---|---|---|---|"]


def generated() -> str:
    """A table for each section, followed by one for each kind of records in it."""
    parts = []
    for name, section in _SCHEMA["properties"].items():
        fields = _named(section)["properties"]
        parts.append(_table("##", name, _named(section)))
        records: dict[str, str] = {}  # by the first setting that holds them
        for key, field in fields.items():
            for record, suffix in _records(field):
                records.setdefault(record, f"{name}.{key}{suffix}")
        parts += [_table("###", place, _SCHEMA["$defs"][record]) for record, place in records.items()]
    return "\n".join(parts)


def _named(schema: Schema) -> Schema:
    return _SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _is_record(schema: Schema) -> bool:
    return "$ref" in schema and _named(schema)["title"] != "DeepSpeed"


def _records(schema: Schema, suffix: str = "") -> Iterator[tuple[str, str]]:
    """The kinds of records in a setting, and ``.N`` for those that are elements of a list."""
    if _is_record(schema):
        yield schema["$ref"].rpartition("/")[2], suffix
    for part in schema.get("anyOf", ()):
        yield from _records(part, suffix)
    if "items" in schema:
        yield from _records(schema["items"], ".N")


def _table(heading: str, name: str, record: Schema) -> str:
    about = [" ".join(record["description"].replace("``", "`").split()), ""] if "description" in record else []
    rows = [f"{heading} {name}", "", *about, *_HEAD]
    for key, field in record["properties"].items():
        cells = (f"`{name}.{key}`", _values(field), _default(field), " ".join(field.get("description", "").split()))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _default(field: Schema) -> str:
    if "default" not in field:
        return "must be given"
    value = field["default"]
    if isinstance(value, float):
        return f"`{value:g}`"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n")
    return f"`{text.strip()}`"


def _values(schema: Schema) -> str:
    """The valid values of a setting in words: its type and limits, or its choices."""
    if "anyOf" in schema:
        return " or ".join(map(_values, schema["anyOf"]))
    if _is_record(schema):
        return "records (below)"
    schema = _named(schema)
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if choices:
        return ", ".join(f"`{value}`" for value in choices)
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {_values(schema['prefixItems'][0])}"
    if schema["type"] == "array":
        return f"list of {_values(schema['items'])}"
    if schema["type"] == "object":
        return "names and values"
    limits = [f"{sign} {_number(schema[key])}" for key, sign in _SIGNS.items() if schema.get(key, LARGEST) != LARGEST]
    return " ".join([_KINDS[schema["type"]], ", ".join(limits)]).strip()


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
