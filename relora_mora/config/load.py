"""Reads a run's settings: defaults, YAML file, then ``--section.key=value``. All faults are reported together."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from relora_mora.config import lengths
from relora_mora.config.checks.combinations import faults
from relora_mora.config.data import CHATML
from relora_mora.config.explain import doubtful, explain, substitute_defaults
from relora_mora.config.registry import METHODS, is_own, settings_of_others, split_rule
from relora_mora.config.removed import removed_faults, without, without_old_defaults
from relora_mora.config.schema import Config
from relora_mora.config.secrets import redact, secrets_in
from relora_mora.config.shipped import MODELS, exists, find_config, nearest, shipped_files, with_names
from relora_mora.config.yaml_text import MOST_CHARACTERS, dump_yaml, explain_yaml, parse_yaml
from relora_mora.system.files import from_home
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


def with_defaults(tree: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A tree of settings, with defaults for those that it lacks.

    A default is left out if the tree gives the same in another way (steps for epochs), or if the tree's method does not
    use it.
    """
    section_method = tree.get("method")
    method = METHODS.get(str(section_method.get("name"))) if isinstance(section_method, dict) else None
    unused = settings_of_others(METHODS, method)
    result = dict(tree)
    for section, values in defaults.items():
        own = tree.get(section) or {}
        if not isinstance(own, dict):
            continue  # a fault, which is reported later
        alternatives = lengths.ALTERNATIVES.get(section, ())
        has_length = any(own.get(key) is not None for key in alternatives)
        added = {
            key: value
            for key, value in values.items()
            if f"{section}.{key}" not in unused and not (has_length and key in alternatives)
        }
        result[section] = {**added, **own}
    return result


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
        if tree is None:
            return {}
        if isinstance(tree, dict):
            return tree
        fault = f"it holds a {type(tree).__name__}, expected names and values, such as `train:`"
    except OSError as error:
        if str(path) in shipped_files(MODELS):
            fault = f"it is a model and has no other settings; give those of a run, and --model.config={path}"
        else:
            fault = (
                f"cannot read it ({error.strerror}); give a YAML file, or a name that relora-mora configs lists, "
                f"such as tiny_remora{nearest(path)}{relative_to(path)}"
            )
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
    tree = dict(tree)
    override_faults = put_overrides(tree, overrides or {})
    tree = lengths.without_replaced(tree, set(overrides or {}))
    tree = with_defaults(tree, defaults or {})
    source = f"{path} and the command line" if overrides else str(path)
    return validate(_with_paths(tree, path.parent), source, override_faults, world_size)


def relative_to(path: Path) -> str:
    """An addition to messages about a missing file: the folder in which a relative path starts."""
    return "" if path.is_absolute() else f" (relative paths start from the current folder, {Path.cwd()})"


def validate(
    tree: Mapping[str, Any], source: str, found: list[str] | None = None, world_size: int | None = None
) -> Config:
    """The settings of a parsed tree.

    Raises :class:`ConfigError` with the faults already ``found`` and all others.
    """
    if "grid" in tree:
        raise ConfigError(
            ["grid: this is a study, and not the settings of a run; start it with relora-mora study"], source
        )
    # settings are saved in config.yaml, logs and checkpoints, so they may have no tokens and passwords
    found = [*(found or []), *(f"{name}: {text}" for name, text in secrets_in(tree))]
    removed = removed_faults(tree)
    found += [f"{name}: {text}" for name, text in removed.items()]
    unknown = set(removed)
    config: Config | None
    tree = lengths.without_nulls(without(tree, removed))
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found.extend(explain(error))
        unknown |= doubtful(error)
        config = substitute_defaults(tree, error)
    if config is not None:
        config = lengths.with_steps(config)
    for fault in faults(config, world_size) if config is not None else ():
        # a fault that involves a setting with a wrong value would be about its default, which nobody asked for
        if not unknown.intersection({*fault.settings, *(name.split(".")[0] for name in fault.settings)}):
            found.append(str(fault))
    if found or config is None:
        raise ConfigError(found, source)
    return lengths.settled(config)


def stored_config(tree: Mapping[str, Any], source: str) -> Config:
    """The settings stored in a checkpoint; raises :class:`ConfigError` for settings that this version lacks.

    Combinations are not checked again: they were checked when the run began, and the checks may have changed since.
    """
    tree = without_old_defaults(tree)
    if removed := removed_faults(tree):
        raise ConfigError([f"{name}: {text}" for name, text in removed.items()], source)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(list(explain(error)), source) from None


def dump(config: Config) -> str:
    """The settings as YAML that :func:`load_config` reads back to the same settings."""
    return dump_yaml(lengths.tree_of(config))


def put_overrides(tree: dict[str, Any], overrides: Mapping[str, str]) -> list[str]:
    """Puts ``section.key`` of the command line into a tree of settings; returns the faults."""
    # a whole section or set comes before its parts
    ordered = sorted(overrides.items(), key=lambda override: override[0].count("."))
    return list(filter(None, [_override(tree, name, text) for name, text in ordered]))


def _override(tree: dict[str, Any], name: str, text: str) -> str | None:
    """Puts one override into the tree; returns its fault, if any."""
    section, *keys = name.split(".")
    if not keys or not all(keys):
        return f"--{name}: not a setting; settings have the form --section.key=value, e.g. --train.steps=100"
    if text == "":
        return f"--{name}: empty; give a value, or null"
    try:
        value = parse_yaml(text) if isinstance(text, str) else text
    except yaml.YAMLError as error:
        return (
            f"--{name}={text}: not YAML: {explain_yaml(error)}; give text with special characters as --{name}='\"...\"'"
        )
    plain = re.sub(r"^[!&]\S*\s+", "", text.strip()) if isinstance(value, str) else ""  # without a tag or an anchor
    if " #" in plain and value != plain and plain[0] not in "'\"|>":  # not quoted and not a block
        return f"--{name}={text}: in YAML, ' #' begins a comment; give such text as --{name}='\"...\"'"
    node = tree
    parents = [section, *keys[:-1]]
    for depth, key in enumerate(parents, start=1):
        inner = node.get(key)
        if inner is not None and not isinstance(inner, dict):
            whole = ".".join(parents[:depth])
            return f"--{name}: {whole} is {inner!r} in the file, so it has no keys; set --{whole} as a whole"
        node[key] = dict(inner or {})  # a copy, because an alias elsewhere in the file may refer to the same dict
        node = node[key]
    node[keys[-1]] = value
    return None


def _with_paths(tree: Any, folder: Path) -> Any:
    """Paths below the home folder, and those that exist only relative to the settings file, as they can be opened."""

    def resolve(value: str) -> str:
        value = from_home(value)
        return str(folder / value) if not exists(Path(value)) and exists(folder / value) else value

    def resolve_rule(value: str) -> str:
        place, name = split_rule(value)
        return f"{resolve(place)}:{name}" if is_own(value) and place.endswith(".py") else value

    changes: dict[str, Callable[[str], str]] = {
        "model.config": lambda value: str(find_config(resolve(value), MODELS)),
        "optim.matrices": resolve_rule,
        "tokenizer.path": resolve,
        **dict.fromkeys(("model.init_from", "model.adapter", "train.run_dir", "train.resume"), from_home),
    }

    def changed(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: changed(inner, f"{name}.{key}".removeprefix(".")) for key, inner in value.items()}
        if isinstance(value, list):
            return [changed(inner, name) for inner in value]
        if not isinstance(value, str) or not value or "\0" in value:  # a fault, which is reported later
            return value
        is_template = name.startswith("data.") and name.endswith("records.template") and value != CHATML
        return (resolve if is_template else changes.get(name, str))(value)

    return changed(tree, "")
