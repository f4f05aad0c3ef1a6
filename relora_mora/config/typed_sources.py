"""Held-out text as the flag of a command names it."""

from __future__ import annotations

import yaml

from relora_mora.config.load import ConfigError, explain_yaml, parse_yaml, validate
from relora_mora.config.sources import Given


def parse_sources(text: str, flag: str) -> Given:
    """YAML of a list, a record or a mapping of sets, as data.validation takes it, or else one source as typed.

    A glob may begin with a bracket and a range of numbers with a brace: what is no YAML is a source, unless it has
    keys. Raises :class:`ConfigError`, which calls the setting by the name of the flag.
    """
    if not text.startswith(("[", "{")):
        return text
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        if ": " not in text:
            return text
        raise ConfigError([f"{flag}: not YAML: {explain_yaml(error)}"], "the command line") from error
    around = {"model": {"config": "none"}, "tokenizer": {"path": "none"}, "train": {"run_dir": "none"}}
    try:
        return validate({**around, "data": {"train": "none", "validation": value}}, flag).data.validation
    except ConfigError as error:
        faults = [fault.replace("data.validation", flag, 1) for fault in error.faults]
        raise ConfigError(faults, "the command line") from error
