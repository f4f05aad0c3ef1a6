"""The identity of a run: the facts that are compared between ranks at a start, and with the checkpoint at a resume."""

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from relora_mora.checkpoint.layout import Manifest
from relora_mora.config.data import TextSource
from relora_mora.config.registry import METHODS, RULE_SETTINGS, is_own, settings_of_others, split_rule
from relora_mora.config.removed import OLD_DEFAULTS
from relora_mora.config.schema import DECODER_LINEARS, SETTINGS, lanes_of, may_change
from relora_mora.model.config import keys_with, stored_model_config
from relora_mora.model.config_keys import FUNCTION, TRAINING

FREE_SECTIONS = {"eval", "checkpoint", "log"}
ORDER_SETTINGS = {"data.lanes", "data.seed", "data.shuffle_documents"}  # they decide what a position in the data means
# why train.allow_changes cannot allow a fixed setting to differ
_FIXED = {
    "method": "the checkpoint holds the state of what trained with it; start a new run with model.init_from",
    "method.name": "the checkpoint holds the state of what trained by that method; give another train.run_dir, or "
    "start a new run with model.init_from",
    "optim": "one optimizer cannot use the state of another; start a new run with model.init_from",
}


@dataclass(frozen=True)
class Identity:
    """The settings of a run and what they refer to. A checkpoint's manifest has the same fields."""

    config: dict[str, dict[str, Any]]  # all settings
    model_config: dict[str, Any]
    tokenizer_fingerprint: str
    eos_token_id: int  # ends a document; the fingerprint of a Hugging Face tokenizer does not include it
    data_fingerprint: str
    data_content: str  # fingerprint of the training data's content
    data_order: str  # fingerprint of everything that decides what a position in the data means
    bf16: bool

    @staticmethod
    def of(manifest: Manifest) -> "Identity":
        return Identity(**{field.name: getattr(manifest, field.name) for field in fields(Identity)})


@dataclass(frozen=True)
class Change:
    """A difference that would change the result of a run. ``permission`` in train.allow_changes allows it."""

    text: str
    permission: str | None

    def is_allowed(self, allowed: Container[str]) -> bool:
        return self.permission in allowed or (self.permission == "data.train" and "data" in allowed)


def changes_since(saved: Identity, now: Identity) -> Iterator[Change]:
    """The differences between a checkpoint and a run that would change the result."""
    saved = replace(saved, config=_comparable(saved.config))
    now = replace(now, config=_comparable(now.config))
    changed = list(changed_settings(saved.config, now.config))
    unused = _unused_settings(saved, now)
    follow = RULE_SETTINGS if "optim.matrices" in changed else ()
    for name in changed:
        section, change = name.partition(".")[0], may_change(name)
        if change in ("free", "data") or section in FREE_SECTIONS or name in follow:
            continue
        difference = f"{name}: {_value(saved.config, name)!r} in the checkpoint, {_value(now.config, name)!r} now"
        if change == "fixed" and name not in unused:
            yield Change(f"{difference}; {_FIXED.get(name) or _FIXED[section]}", None)
        else:
            yield Change(difference, name)
    shares, after = _shares(saved), _shares(now)
    if shares.keys() == after.keys() and not all(math.isclose(shares[name], after[name]) for name in shares):
        shown = (f"{name} {shares[name]:.3g} in the checkpoint, {share:.3g} now" for name, share in after.items())
        yield Change(f"data.train: the shares of its sources: {' and '.join(shown)}", "data.train")
    model, other = (keys_with(stored_model_config(each.model_config), FUNCTION, TRAINING) for each in (saved, now))
    for key, value in other.items():
        if model.get(key) != value:
            yield Change(f"model: {key} is {model.get(key)!r} in the checkpoint, {value!r} now", None)
    path, eos = _value(now.config, "tokenizer.path"), saved.eos_token_id
    if saved.tokenizer_fingerprint != now.tokenizer_fingerprint:
        yield Change(f"tokenizer: {path} produces other tokens", "tokenizer")
    if saved.eos_token_id != now.eos_token_id:
        text = f"documents ended with token {eos}, with {path} they end with {now.eos_token_id}"
        yield Change(f"tokenizer: {text}", "tokenizer")
    if _other_data(saved, now):
        yield Change("data: other sources, or files that have changed", "data")
    if saved.bf16 != now.bf16 and "train.precision" not in changed:
        yield Change("train.precision: auto chooses another precision on this machine", "train.precision")


def _comparable(config: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Replaces a null number of lanes by its value, and sorts names whose order does not matter.

    The file of a rule has only its name: its digest is compared, too.
    """
    lanes = config["data"]["lanes"] or lanes_of(config["train"]["batch_size"])
    modules = sorted(_value(config, "method.target_modules") or DECODER_LINEARS)
    matrices = _value(config, "optim.matrices")
    if is_own(matrices):
        file, name = split_rule(matrices)
        matrices = f"{Path(file).name}:{name}"
    return {
        **config,
        "data": {**config["data"], "lanes": lanes},
        "method": {**config["method"], "target_modules": modules},
        "optim": {**config["optim"], "matrices": matrices},
    }


def changed_settings(saved: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Names of settings (dotted) whose values differ between two dumps of a config."""
    for section in {**saved, **now}:
        before = saved.get(section, {})
        after = now.get(section, {})
        for key in {**before, **after}:
            default = _default(section, key)  # an older version behaved like this without the setting
            if before.get(key, default) != after.get(key, default):
                yield f"{section}.{key}"


def _default(section: str, key: str) -> Any:
    name = f"{section}.{key}"
    setting = SETTINGS.get(name)
    return OLD_DEFAULTS.get(name) if setting is None or setting.is_required() else setting.get_default()


def _unused_settings(saved: Identity, now: Identity) -> set[str]:
    """Settings that the saved run did not use, and ``method.name`` if both methods have the same adapter."""
    before, after = (METHODS[_value(each.config, "method.name")] for each in (saved, now))
    unused = set(settings_of_others(before))
    return unused | ({"method.name"} if before.adapter is after.adapter else set())


def _value(tree: dict[str, Any], name: str) -> Any:
    section, _, key = name.partition(".")
    return tree.get(section, {}).get(key, _default(section, key))


def _shares(identity: Identity) -> dict[str, float]:
    """The shares of a mixture's sources by name; empty if the training text is not a mixture."""
    train = _value(identity.config, "data.train")
    if not isinstance(train, list) or not isinstance(train[0], dict):
        return {}
    sources = [TextSource.model_validate(record) for record in train]
    total = sum(source.weight for source in sources)
    return {source.label: source.weight / total for source in sources}


def _other_data(saved: Identity, now: Identity) -> bool:
    if saved.data_content != now.data_content:
        return True
    if saved.data_order == now.data_order:
        return False
    changed = set(changed_settings(saved.config, now.config))
    if saved.tokenizer_fingerprint == now.tokenizer_fingerprint and not changed & ORDER_SETTINGS:
        return True
    # the tokenizer and the order explain the other fingerprint, so only the settings show whether the text changed
    return any(may_change(name) == "data" for name in changed)
