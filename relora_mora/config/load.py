"""Reads the settings of a run: defaults, YAML file, then ``--section.key=value``. All faults are reported at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from relora_mora.config.checks.combinations import faults, secret_faults
from relora_mora.config.data import CHATML, RecordsConfig, TextSource, map_records
from relora_mora.config.explain import doubtful, explain, substitute_defaults
from relora_mora.config.lengths import (
    ALTERNATIVES,
    settled,
    tree_of,
    with_counted_epochs,
    with_steps,
    without_nulls,
    without_replaced,
)
from relora_mora.config.registry import METHODS, settings_of_others
from relora_mora.config.schema import Config
from relora_mora.config.secrets import redact
from relora_mora.config.yaml_text import MOST_CHARACTERS, dump_yaml, explain_yaml, parse_yaml
from relora_mora.system.files import from_home
from relora_mora.system.logs import counted

# rank, operator 6, rate, warmup, batch and epochs are those of the release for mathematics (github.com/kongds/MoRA)
FINETUNING: dict[str, dict[str, Any]] = {
    "method": {
        "name": "mora",
        "rank": 8,
        "square_multiple": 2,  # operator 6 turns pairs
        "operators": [6, 1],
        "train_embeddings": False,
        "train_norms": False,
        "train_head": False,
    },
    "optim": {"lr": 3e-4, "warmup_fraction": 0.03},
    "train": {"epochs": 3, "batch_size": 128},
}


def with_defaults(tree: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A tree of settings with others below it.

    A default is left out where the tree says the same in another way (steps for epochs), or where the tree's method
    does not use it.
    """
    given = tree.get("method")
    method = METHODS.get(str(given.get("name"))) if isinstance(given, dict) else None
    unused = settings_of_others(METHODS, method)
    result = dict(tree)
    for section, values in defaults.items():
        own = tree.get(section) or {}
        if not isinstance(own, dict):
            continue  # a fault, which is told as such
        alternatives = ALTERNATIVES.get(section, ())
        said = any(own.get(key) is not None for key in alternatives)
        below = {
            key: value
            for key, value in values.items()
            if f"{section}.{key}" not in unused and not (said and key in alternatives)
        }
        result[section] = {**below, **own}
    return result


class ConfigError(ValueError):
    """Settings that cannot be used. ``faults`` lists every one with its remedy; none repeats a token or password."""

    same_on_host = True  # before the ranks have met, the first one of each host says it

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str], str]]:
        return type(self), (self.faults, self.source)  # it travels between ranks

    def __init__(self, faults: list[str], source: str) -> None:
        self.faults = [redact(fault) for fault in faults]
        self.source = redact(source)
        title = f"{counted(len(faults), 'fault')} in {self.source}:"
        super().__init__("\n".join([title, *(f"  - {fault}" for fault in self.faults)]))


def load_config(
    path: str | Path,
    overrides: Mapping[str, str] | None = None,
    world_size: int | None = None,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """The settings of a run.

    ``overrides`` maps dotted names to YAML text; ``defaults`` hold where neither file nor overrides say anything, by
    section, before those of the schema. ``model.config``, ``tokenizer.path`` and templates of records that do not exist
    below the current folder are looked for beside the file; ``~`` at the front of a path is the home folder. Raises
    :class:`ConfigError` with every fault found.
    """
    return config_of(read_tree(path), path, overrides, world_size, defaults)


def read_tree(path: str | Path) -> dict[str, Any]:
    """What a file of settings holds, by section; raises :class:`ConfigError` where it cannot be read."""
    path = Path(from_home(str(path)))
    try:
        with path.open(encoding="utf-8") as stream:
            return _as_tree(parse_yaml(stream.read(MOST_CHARACTERS + 1)))
    except OSError as error:
        found = (
            f"cannot read it ({error.strerror}); give the path of a YAML file such as configs/run/tiny_remora.yaml"
            + relative_to(path)
        )
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        found = f"it is not YAML: {explain_yaml(error)}"
    except ValueError as error:
        found = str(error)
    raise ConfigError([found], str(path))


def config_of(
    tree: Mapping[str, Any],
    path: str | Path,
    overrides: Mapping[str, str] | None = None,
    world_size: int | None = None,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """:func:`load_config` of a file whose content is known."""
    path = Path(from_home(str(path)))
    tree = dict(tree)
    found = put_overrides(tree, overrides or {})
    tree = without_replaced(tree, set(overrides or {}))
    tree = with_defaults(tree, defaults or {})
    source = f"{path} and the command line" if overrides else str(path)
    config = validate(tree, source, found, world_size)
    return _resolve_paths(config, path.parent)


def relative_to(path: Path) -> str:
    """For messages about a file that is not there: where a relative path starts."""
    return "" if path.is_absolute() else f" (relative paths start from the current folder, {Path.cwd()})"


def validate(
    tree: Mapping[str, Any], source: str, found: list[str] | None = None, world_size: int | None = None
) -> Config:
    """The settings of a parsed tree; raises :class:`ConfigError` with the faults ``found`` before and all others."""
    found = [*(found or []), *map(str, secret_faults(tree))]
    unknown: set[str] = set()
    config: Config | None
    tree = without_nulls(tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found.extend(explain(error))
        unknown = doubtful(error)
        for section, (steps, *others) in ALTERNATIVES.items():
            if unknown.intersection(f"{section}.{name}" for name in others):
                unknown.add(f"{section}.{steps}")
        config = substitute_defaults(tree, error)
    if config is not None:
        if config.train.epochs is not None:
            unknown.add("train.steps")
            if config.optim.warmup_fraction is not None:
                unknown.add("optim.warmup_steps")
        config = with_steps(config)
    for fault in faults(config, world_size) if config is not None else ():
        # a fault that rests on a setting which is itself wrong would be about a default that nobody asked for
        if not unknown.intersection({*fault.settings, *(name.split(".")[0] for name in fault.settings)}):
            found.append(str(fault))
    if found or config is None:
        raise ConfigError(found, source)
    return settled(config)


def stored_config(tree: Mapping[str, Any], source: str) -> Config:
    """The settings that a checkpoint was made with; raises :class:`ConfigError` for such as this version lacks.

    Whether a run can have them was looked at when it began, and may be another question by now.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(list(explain(error)), source) from None


def with_epochs(config: Config, tokens: float, world_size: int) -> Config:
    """With the steps that ``train.epochs`` are, which have so many tokens in all.

    Raises :class:`ConfigError` where other settings do not fit a run of this length.
    """
    config = with_counted_epochs(config, tokens)
    found = [str(fault) for fault in faults(config, world_size)]
    if found:
        steps = counted(config.train.steps, "step")
        raise ConfigError(found, f"the settings, with {steps} for {tokens:,.0f} tokens of all epochs")
    return config


def dump(config: Config) -> str:
    """The settings as YAML that :func:`load_config` reads back to the same settings."""
    return dump_yaml(tree_of(config))


def _as_tree(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, expected sections such as `train:`")
    return value


def put_overrides(tree: dict[str, Any], overrides: Mapping[str, str]) -> list[str]:
    """Puts ``section.key`` of the command line into a tree of settings; returns what is wrong with them."""
    # a whole section or set before what is in it
    ordered = sorted(overrides.items(), key=lambda override: override[0].count("."))
    return list(filter(None, [_override(tree, name, text) for name, text in ordered]))


def _override(tree: dict[str, Any], name: str, text: str) -> str | None:
    """Puts one override into the tree; returns what is wrong with it."""
    section, *keys = name.split(".")
    if not keys or not all(keys):
        return f"--{name}: not a setting; settings have the form --section.key=value, e.g. --train.steps=100"
    if text == "":
        return f"--{name}: is empty; give a value, or null"
    try:
        value = parse_yaml(text) if isinstance(text, str) else text
    except yaml.YAMLError as error:
        return (
            f"--{name}={text}: not YAML: {explain_yaml(error)}; give text with special characters as --{name}='\"...\"'"
        )
    if isinstance(value, str) and _has_comment(text, value):
        return f"--{name}={text}: YAML takes what follows ' #' for a comment; give such text as --{name}='\"...\"'"
    node = tree
    for key in [section, *keys[:-1]]:
        inner = node.get(key)
        if inner is not None and not isinstance(inner, dict):
            return f"--{name}: {key} is {inner!r} in the file, which has no keys below it"
        node[key] = dict(inner or {})  # an alias elsewhere in the file may stand for the same
        node = node[key]
    node[keys[-1]] = value
    return None


def _has_comment(text: str, value: str) -> bool:
    """Whether a plain text, which is not in quotes and no block, goes on behind its ``value`` in YAML."""
    text = re.sub(r"^[!&]\S*\s+", "", text.strip())  # without a tag or an anchor
    return text[:1] not in ("'", '"', "|", ">") and " #" in text and value != text


def _resolve_paths(config: Config, beside: Path) -> Config:
    def home(value: str | None) -> str | None:
        return None if value is None else from_home(value)

    def resolve(value: str | None) -> str | None:
        value = home(value)
        if value is None or _exists(Path(value)):
            return value
        return str(beside / value) if _exists(beside / value) else value

    def resolve_template(held: RecordsConfig | None) -> RecordsConfig | None:
        if held is None or held.template in (None, CHATML):
            return held
        return held.model_copy(update={"template": resolve(held.template)})

    def resolve_source(source: TextSource) -> TextSource:
        return source.model_copy(update={"records": resolve_template(source.records)})

    data = {name: map_records(getattr(config.data, name), resolve_source) for name in ("train", "validation")}
    return config.model_copy(
        update={
            "model": config.model.model_copy(
                update={
                    "config": resolve(config.model.config),
                    "init_from": home(config.model.init_from),
                    "adapter": home(config.model.adapter),
                }
            ),
            "train": config.train.model_copy(
                update={"run_dir": home(config.train.run_dir), "resume": home(config.train.resume)}
            ),
            "tokenizer": config.tokenizer.model_copy(update={"path": resolve(config.tokenizer.path)}),
            "data": config.data.model_copy(update={**data, "records": resolve_template(config.data.records)}),
        }
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False
