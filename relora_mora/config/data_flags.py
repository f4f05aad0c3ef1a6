"""Text, and how it is read, as commands that train no model take it: sources, and settings as ``--data.KEY=VALUE``."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import yaml

from relora_mora.config.data import DataConfig
from relora_mora.config.load import ConfigError, put_overrides, validate
from relora_mora.config.yaml_text import explain_yaml, parse_yaml

# settings of data that these commands take
READING = frozenset({"revision", "text_column", "sample_by", "max_line_bytes", "max_bad_fraction", "timeout_seconds"})
SCORING = READING | {"records", "packing", "sequence_length", "document_mask"}


def read_data(given: Mapping[str, Any], overrides: Mapping[str, str], names: Set[str]) -> DataConfig:
    """Settings of data with those of the command line over them, of which the ``names`` have a use.

    Raises :class:`ConfigError`.
    """
    check_names(overrides, names)
    tree = {"data": dict(given), "model": {"config": "none"}, "tokenizer": {"path": "none"}}
    faults = put_overrides(tree, overrides)
    return validate({**tree, "train": {"run_dir": "none"}}, "the command line", faults).data


def check_names(overrides: Mapping[str, str], names: Set[str]) -> None:
    """Raises :class:`ConfigError` for settings that are none of ``data``, or not among its ``names``."""
    faults = [
        f"--{name}: unknown, or of no use here; see --help. Settings that have one: "
        + ", ".join(f"data.{each}" for each in sorted(names))
        for name in overrides
        if not name.startswith("data.") or name.split(".")[1] not in names
    ]
    if faults:
        raise ConfigError(faults, "the command line")


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
