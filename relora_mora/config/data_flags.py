"""Data settings for commands that train no model: sources, and ``--data.KEY=VALUE`` flags."""

from collections.abc import Mapping, Set
from typing import Any

import yaml

from relora_mora.config.data import DataConfig
from relora_mora.config.load import ConfigError, validate, with_overrides
from relora_mora.config.yaml_text import explain_yaml, parse_yaml

# the settings of data that these commands take
READING = frozenset({"revision", "text_column", "sample_by", "max_line_bytes", "max_bad_fraction", "timeout_seconds"})
SCORING = READING | {"records", "packing", "sequence_length", "document_mask"}
_OTHERS = {"model": {"config": "none"}, "tokenizer": {"path": "none"}, "train": {"run_dir": "none"}}


def read_data(settings: Mapping[str, Any], overrides: Mapping[str, str], names: Set[str]) -> DataConfig:
    """Settings of ``data``, changed by ``overrides`` from the command line, which may set only ``names``.

    Raises :class:`ConfigError`.
    """
    used = {name: text for name, text in overrides.items() if name.startswith("data.") and name.split(".")[1] in names}
    tree, faults = with_overrides({"data": dict(settings), **_OTHERS}, used)
    uses = f"It uses: {', '.join(f'data.{name}' for name in sorted(names))}"
    faults += [
        f"--{name}: unknown, or not used by this command; see --help. {uses}" for name in overrides if name not in used
    ]
    return validate(tree, "the command line", faults).data


def parse_typed(text: str, flag: str) -> Any:
    """The value of YAML for a list, a record or a mapping of sets; any other text is a single source.

    A glob may begin with a bracket, and a range of numbers with a brace. So text that is not valid YAML is a source
    unless it has keys. Raises :class:`ConfigError`.
    """
    if not text.startswith(("[", "{")):
        return text
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        if ": " not in text:
            return text
        raise ConfigError([f"{flag}: not YAML: {explain_yaml(error)}"], "the command line") from error
