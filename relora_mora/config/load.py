"""Reads a run's settings: YAML file, then ``--section.key=value``; every fault is reported at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from relora_mora.config.checks import faults
from relora_mora.config.schema import Config


class ConfigError(ValueError):
    """Settings that cannot be used. ``faults`` lists every one, each with its remedy."""

    def __init__(self, faults: list[str], source: str) -> None:
        self.faults = faults
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__("\n".join([f"{count} in {source}:", *(f"  - {fault}" for fault in faults)]))


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers (``4e-4`` is one, ``010`` is ten) and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for key in keys:
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is not a name", problem_mark=node.start_mark)
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":int", ":timestamp", ":bool"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+(_[0-9]+)*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value).replace("_", "")))
_Loader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda loader, node: float(
        str(node.value)
        .replace("_", "")
        .replace(".inf", "inf")
        .replace(".Inf", "inf")
        .replace(".INF", "inf")
        .replace(".nan", "nan")
        .replace(".NaN", "nan")
        .replace(".NAN", "nan")
    ),
)


def parse_yaml(text: str) -> Any:
    """YAML text as plain values; raises yaml.YAMLError, also for numbers and dates that Python refuses."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


def load_config(path: str | Path, overrides: Mapping[str, str] | None = None, world_size: int | None = None) -> Config:
    """The settings of a run.

    ``overrides`` maps dotted names to YAML text. ``model.config`` and ``tokenizer.path`` that do not exist below the
    current folder are looked for beside the file. Raises :class:`ConfigError` with every fault found.
    """
    path = Path(path)
    found: list[str] = []
    tree: dict[str, Any] = {}
    try:
        tree = _as_tree(parse_yaml(path.read_text(encoding="utf-8")))
    except OSError as error:
        found.append(f"cannot read it ({error.strerror}); give the path of a YAML file such as configs/run/tiny_remora.yaml")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        found.append(f"it is not YAML: {' '.join(str(error).split())}")
    except ValueError as error:
        found.append(str(error))
    if found:
        raise ConfigError(found, str(path))
    for name, text in (overrides or {}).items():
        problem = _override(tree, name, text)
        if problem:
            found.append(problem)
    source = f"{path} and the command line" if overrides else str(path)
    config = validate(tree, source, found, world_size)
    return _resolve_paths(config, path.parent)


def validate(tree: Mapping[str, Any], source: str, found: list[str] | None = None, world_size: int | None = None) -> Config:
    """The settings of a parsed tree; raises :class:`ConfigError` with the faults ``found`` before and all others."""
    found = list(found or [])
    config = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found.extend(_explain(error))
    if config is not None:
        found.extend(faults(config, world_size))
    if found or config is None:
        raise ConfigError(found, source)
    return config


def dump(config: Config) -> str:
    """The settings as YAML that :func:`load_config` reads back to the same settings."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _as_tree(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, expected sections such as `train:`")
    return value


def _override(tree: dict[str, Any], name: str, text: str) -> str | None:
    """Puts one override into the tree; returns what is wrong with it."""
    section, *keys = name.split(".")
    if not keys or not all(keys):
        return f"--{name}: not a setting; settings have the form --section.key=value, e.g. --train.steps=100"
    try:
        value = parse_yaml(text) if isinstance(text, str) else text
    except yaml.YAMLError as error:
        return f"--{name}={text}: not YAML: {' '.join(str(error).split())}"
    node = tree
    for key in [section, *keys[:-1]]:
        inner = node.setdefault(key, {})
        if inner is None:
            inner = node[key] = {}
        if not isinstance(inner, dict):
            return f"--{name}: {key} is {inner!r} in the file, which has no keys below it"
        node = inner
    node[keys[-1]] = value
    return None


def _explain(error: ValidationError) -> list[str]:
    lines: list[str] = []
    for item in error.errors():
        location = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{location}: unknown{_suggestion(item['loc'])}")
        elif item["type"] == "missing":
            lines.append(f"{location}: must be given{_description(item['loc'])}")
        else:
            given = repr(item["input"])
            shown = given if len(given) < 80 else given[:77] + "..."
            lines.append(f"{location}: got {shown}; {item['msg'][0].lower() + item['msg'][1:]}{_description(item['loc'])}")
    return lines


def _fields_at(location: tuple[int | str, ...]) -> dict[str, Any]:
    model: type[BaseModel] = Config
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return {}
        model = field.annotation
    return dict(model.model_fields)


def _suggestion(location: tuple[int | str, ...]) -> str:
    known = _fields_at(location)
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}" if known else ""


def _description(location: tuple[int | str, ...]) -> str:
    for length in (2, 1):
        if len(location) >= length:
            field = _fields_at(location[:length]).get(str(location[length - 1]))
            if field is not None and field.description:
                return f" ({field.description})"
    return ""


def _resolve_paths(config: Config, beside: Path) -> Config:
    def resolve(value: str) -> str:
        other = beside / value
        return str(other) if not Path(value).exists() and other.exists() else value

    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"config": resolve(config.model.config)}),
            "tokenizer": config.tokenizer.model_copy(update={"path": resolve(config.tokenizer.path)}),
        }
    )
