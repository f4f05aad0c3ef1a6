"""Held-out text, and what its rows hold, as flags of a command name them."""

from __future__ import annotations

from typing import Any

import yaml

from relora_mora.config.data import DataConfig
from relora_mora.config.load import ConfigError, explain_yaml, parse_yaml, validate
from relora_mora.config.records import RecordsConfig
from relora_mora.config.sources import Given


def parse_sources(text: str, flag: str) -> Given:
    """Sources as data.validation takes them, from YAML or as typed.

    Raises :class:`ConfigError`, which calls the setting by the name of the flag.
    """
    value = parse_typed(text, flag)
    return value if isinstance(value, str) else _validated("validation", value, flag).validation


def parse_records(text: str, flag: str) -> RecordsConfig | None:
    """Records as data.records takes them, from YAML; None for ``null``. Raises :class:`ConfigError`."""
    try:
        return _validated("records", parse_yaml(text), flag).records
    except yaml.YAMLError as error:
        raise ConfigError([f"{flag}: not YAML: {explain_yaml(error)}"], "the command line") from error


def _validated(name: str, value: Any, flag: str) -> DataConfig:
    around = {"model": {"config": "none"}, "tokenizer": {"path": "none"}, "train": {"run_dir": "none"}}
    data = {"train": "none", "validation": "none", name: value}
    try:
        return validate({**around, "data": data}, flag).data
    except ConfigError as error:
        faults = [fault.replace(f"data.{name}", flag, 1) for fault in error.faults]
        raise ConfigError(faults, "the command line") from error


def parse_typed(text: str, flag: str) -> Any:
    """The value of YAML of a list, a record or a mapping of sets, or else the one source that was typed.

    A glob may begin with a bracket and a range of numbers with a brace: what is no YAML is a source, unless it has
    keys. Raises :class:`ConfigError`.
    """
    if not text.startswith(("[", "{")):
        return text
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        if ": " not in text:
            return text
        raise ConfigError([f"{flag}: not YAML: {explain_yaml(error)}"], "the command line") from error
