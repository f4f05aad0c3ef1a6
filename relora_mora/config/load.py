"""Reads a run's settings: defaults, YAML file, then ``--section.key=value``. All faults are reported together."""

import json
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from relora_mora.config import lengths
from relora_mora.config.checks.combinations import faults
from relora_mora.config.data import DataConfig
from relora_mora.config.explain import doubtful, explain, substitute_defaults
from relora_mora.config.registry import METHODS, settings_of_others
from relora_mora.config.schema import Config
from relora_mora.config.secrets import redact, secrets_in
from relora_mora.config.shipped import MODELS, SETTINGS, find_config, nearest, shipped_files, with_names
from relora_mora.config.yaml_text import MOST_CHARACTERS, dump_yaml, explain_yaml, parse_yaml
from relora_mora.system.logs import counted

# rank, operator 6, lr, warmup, batch size and epochs come from the release's mathematics run (github.com/kongds/MoRA)
FINETUNING: dict[str, dict[str, Any]] = {
    "method": {
        "name": "mora",
        "rank": 8,
        "square_multiple": 2,  # operator 6 rotates pairs
        "operators": [6, 1],
        "train_embeddings": False,
        "train_norms": False,
        "train_head": False,
    },
    "optim": {"lr": 3e-4, "warmup_fraction": 0.03},
    "train": {"epochs": 3, "batch_size": 128},
}
# the settings of data that commands that train no model take
READING = frozenset({"revision", "text_column", "sample_by", "max_line_bytes", "max_bad_fraction", "timeout_seconds"})
SCORING = READING | {"records", "packing", "sequence_length", "document_mask"}
_OTHERS = {"model": {"config": "none"}, "tokenizer": {"path": "none"}, "train": {"run_dir": "none"}}


class ConfigError(ValueError):
    """Settings that cannot be used. ``faults`` has one message with a remedy each; none repeats a token or password."""

    same_on_host = True  # raised before the ranks have met; the first rank of each host shows it

    def __reduce__(self) -> "tuple[type[ConfigError], tuple[list[str], str]]":
        return type(self), (self.faults, self.source)  # the error is sent between ranks

    def __init__(self, faults: list[str], source: str) -> None:
        self.faults = [with_names(redact(fault)) for fault in faults]
        self.source = with_names(redact(source))
        title = f"{counted(len(faults), 'fault')} in {self.source}:"
        super().__init__("\n".join([title, *(f"  - {fault}" for fault in self.faults)]))


def load_config(
    path: str | Path,
    overrides: Mapping[str, str] | None = None,
    world_size: int | None = None,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """The settings of a run.

    ``overrides`` maps dotted names to YAML text. ``defaults`` (by section) apply to settings that neither the file nor
    the overrides set, and take precedence over the schema's defaults. If ``model.config``, ``tokenizer.path``, the file
    of a rule or a template of records does not exist relative to the current folder, it is taken relative to the file.
    A leading ``~`` of a path is the home folder. Raises :class:`ConfigError` with all faults.
    """
    return config_of(read_tree(path), path, overrides, world_size, defaults)


def read_tree(path: str | Path) -> dict[str, Any]:
    """The content of a settings file, by section; raises :class:`ConfigError` if it cannot be read."""
    path = find_config(path)
    try:
        with path.open(encoding="utf-8") as stream:
            tree = parse_yaml(stream.read(MOST_CHARACTERS + 1))
        if tree is None or isinstance(tree, dict):
            return tree or {}
        fault = f"it holds a {type(tree).__name__}, expected names and values, such as `train:`"
    except OSError as error:
        if str(path) in shipped_files(MODELS):
            fault = f"it is a model and has no other settings; give those of a run, and --model.config={path}"
        else:
            near = nearest(path.stem, shipped_files(SETTINGS))
            remedy = f"did you mean {near}?" if near else "give a YAML file, or a name that relora-mora configs lists"
            fault = f"cannot read it ({error.strerror}); {remedy}{relative_to(path)}"
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fault = f"it is not YAML: {explain_yaml(error)}"
    except ValueError as error:  # a path that no file can have
        fault = str(error)
    raise ConfigError([fault], str(path))


def config_of(
    tree: Mapping[str, Any],
    path: str | Path,
    overrides: Mapping[str, str] | None = None,
    world_size: int | None = None,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """Like :func:`load_config`, for a file that has been read."""
    path = find_config(path)
    tree, found = with_overrides(tree, overrides or {})
    source = f"{path} and the command line" if overrides else str(path)
    return validate(with_defaults(tree, defaults or {}), source, found, world_size, path.parent)


def relative_to(path: Path) -> str:
    """An addition to messages about a missing file: the folder in which a relative path starts."""
    return "" if path.is_absolute() else f" (relative paths start from the current folder, {Path.cwd()})"


def read_json(path: Path, setting: str) -> dict[str, Any]:
    """The keys in a config.json. Raises :class:`ConfigError`, with the name of the setting, if it cannot be read."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        near = nearest(str(path), shipped_files(MODELS))
        remedy = f"did you mean {near}?" if near else "give a file, or a name such as llama_130m"
        fault = f"{setting}: cannot read {path} ({error.strerror}); {remedy}"
        raise ConfigError([fault + relative_to(path)], str(path)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{setting}: not JSON ({error}); give the config.json of a model"], str(path)) from error
    if not isinstance(values, dict):
        fault = f"{setting}: holds a {type(values).__name__}, expected an object; give the config.json of a model"
        raise ConfigError([fault], str(path))
    return values


def validate(
    tree: Mapping[str, Any],
    source: str,
    found: Iterable[str] = (),
    world_size: int | None = None,
    folder: Path | None = None,
    *,
    stored: bool = False,
) -> Config:
    """The settings of a parsed tree, whose paths may be relative to ``folder``.

    Combinations of ``stored`` settings are not checked. Raises :class:`ConfigError` with the faults already ``found``
    and all others.
    """
    if "grid" in tree:
        raise ConfigError(
            ["grid: this is a study, and not the settings of a run; start it with relora-mora study"], source
        )
    tree = lengths.without_nulls(tree)
    # settings are saved in config.yaml, logs and checkpoints, so they may have no tokens and passwords
    found = [*found, *(f"{name}: {text}" for name, text in secrets_in(tree))]
    unknown: set[str] = set()
    config: Config | None
    try:
        config = Config.model_validate(tree, context={"folder": folder})
    except ValidationError as error:
        found.extend(explain(error))
        unknown = doubtful(error)
        config = substitute_defaults(tree, error)
    for fault in faults(config, world_size) if config is not None and not stored else ():
        # a fault that involves a setting with a wrong value would be about its default, which nobody asked for
        if not unknown.intersection({*fault.settings, *(name.split(".")[0] for name in fault.settings)}):
            found.append(str(fault))
    if found or config is None:
        raise ConfigError(found, source)
    return lengths.with_steps(config)


def stored_config(tree: Mapping[str, Any], source: str) -> Config:
    """The settings stored in a checkpoint; raises :class:`ConfigError` for settings that this version lacks.

    Combinations are not checked again: they were checked when the run began, and the checks may have changed since.
    """
    return validate(tree, source, stored=True)


def dump(config: Config) -> str:
    """The settings as YAML that :func:`load_config` reads back to the same settings."""
    return dump_yaml(lengths.tree_of(config))


def with_defaults(tree: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A tree of settings, with defaults for those that it lacks and that its method uses."""
    section = tree.get("method")
    name = section.get("name") if isinstance(section, dict) else None
    unused = settings_of_others(METHODS.get(str(name)))
    result = dict(tree)
    for section, values in defaults.items():
        own = tree.get(section) or {}
        if isinstance(own, dict):  # else it is a fault, which is reported later
            used = {key: value for key, value in values.items() if f"{section}.{key}" not in unused}
            result[section] = lengths.over(section, used, own)
    return result


def with_overrides(tree: Mapping[str, Any], overrides: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """A tree of settings with ``section.key`` of the command line, and the faults of these."""
    result = dict(tree)
    faults = []
    for name in sorted(overrides, key=lambda name: name.count(".")):  # a whole setting comes before its parts
        try:
            _put(result, name, _parsed(name, overrides[name]))
        except ValueError as error:
            faults.append(f"--{name}{error}")
    for section, names in lengths.ALTERNATIVES.items():
        values = result.get(section)
        if isinstance(values, dict):
            given = {name: values[name] for name in names if f"{section}.{name}" in overrides and name in values}
            result[section] = lengths.over(section, values, given)
    return result, faults


def _parsed(name: str, text: str) -> Any:
    """The value of an override. Plain text is taken as typed, although YAML cuts it at `` #``."""
    if text == "":
        raise ValueError(": empty; give a value, or null")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        remedy = f"give text with special characters as --{name}='\"...\"'"
        raise ValueError(f"={text}: not YAML: {explain_yaml(error)}; {remedy}") from None
    is_plain = isinstance(value, str) and text.strip().startswith(value)
    return text.strip() if is_plain else value


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *parents, key = name.split(".")
    if not (parents and key and all(parents)):
        raise ValueError(": not a setting; settings have the form --section.key=value, e.g. --train.steps=100")
    node = tree
    for depth, parent in enumerate(parents, start=1):
        inner = node.get(parent)
        if inner is not None and not isinstance(inner, dict):
            whole = ".".join(parents[:depth])
            raise ValueError(f": {whole} is {inner!r} in the file, so it has no keys; set --{whole} as a whole")
        node[parent] = dict(inner or {})  # a copy, because an alias elsewhere in the file may refer to the same dict
        node = node[parent]
    node[key] = value


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
