"""Trees of settings for the tests of the config package."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from relora_mora.config.load import ConfigError, validate
from relora_mora.config.schema import Config

SECTIONS = {name: list(field.annotation.model_fields) for name, field in Config.model_fields.items()}  # type: ignore[union-attr]
SETTINGS = [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys]


def tree(**sections: dict[str, Any]) -> dict[str, Any]:
    """The least that a run must say, with changes."""
    base: dict[str, dict[str, Any]] = {
        "model": {"config": "m.json"},
        "tokenizer": {"path": "t"},
        "data": {"train": "a", "validation": "b"},
        "train": {"run_dir": "r"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return base


def settings_file(folder: Path, **sections: dict[str, Any]) -> Path:
    """A file with such settings."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree(**sections)))
    return path


def changed_tree(changes: dict[str, Any]) -> dict[str, Any]:
    """The same with other values for some settings, by dotted name."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, key = name.split(".")
        sections.setdefault(section, {})[key] = value
    return tree(**sections)


def faults_of(given_tree: dict[str, Any], world_size: int | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        validate(given_tree, "the test", world_size=world_size)
    return error.value.faults


def same(a: Any, b: Any) -> bool:
    """Equal, and nan equals nan."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))
