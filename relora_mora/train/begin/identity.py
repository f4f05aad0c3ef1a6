"""The identity of a run: the facts that are compared between ranks at a start, and with the checkpoint at a resume."""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora_mora.checkpoint.layout import Manifest
from relora_mora.config.data import as_sources, is_mixture
from relora_mora.config.registry import METHODS, RULE_SETTINGS, is_own, settings_of_others, split_rule
from relora_mora.config.schema import DECODER_LINEARS, SETTINGS, lanes_of, may_change
from relora_mora.model.config import compared_keys, stored_model_config

FREE_SECTIONS = {"eval", "checkpoint", "log"}
ORDER_SETTINGS = {"data.lanes", "data.seed", "data.shuffle_documents"}  # they decide what a position in the data means
# what to do about a setting that must not change
_FIXED = "the checkpoint holds the state of what trained with it; start a new run with model.init_from"


@dataclass(frozen=True)
class Identity:
    """The settings of a run and what they refer to. A checkpoint's manifest has the same fields."""

    config: dict[str, dict[str, Any]]  # all settings
    model_config: dict[str, Any]
    tokenizer_fingerprint: str
    eos_token_id: int  # ends a document; the fingerprint of a Hugging Face tokenizer does not include it
    data_content: str  # fingerprint of the training data's content
    data_order: str  # fingerprint of everything that decides what a position in the data means
    bf16: bool


@dataclass(frozen=True)
class Change:
    """A difference that would change the result of a run. ``permission`` in train.allow_changes allows it."""

    text: str
    permission: str | None

    def is_allowed(self, allowed: Container[str]) -> bool:
        return self.permission in allowed or (self.permission == "data.train" and "data" in allowed)


def changes_since(saved: Identity | Manifest, now: Identity) -> Iterator[Change]:
    """The differences between a checkpoint and a run that would change the result."""
    before, after = _comparable(saved.config), _comparable(now.config)
    changed = _different(before, after)
    unused = _unused_settings(before["method.name"], after["method.name"])
    follow = RULE_SETTINGS if "optim.matrices" in changed else ()
    for name in changed:
        change = may_change(name)
        if change in ("free", "data") or name.partition(".")[0] in FREE_SECTIONS or name in follow:
            continue
        is_fixed = change == "fixed" and name not in unused
        difference = f"{name}: {before.get(name)!r} in the checkpoint, {after.get(name)!r} now"
        yield Change(f"{difference}; {_FIXED}", None) if is_fixed else Change(difference, name)
    shares, other_shares = _shares(before["data.train"]), _shares(after["data.train"])
    if shares.keys() == other_shares.keys() and shares != other_shares:
        text = f"the shares of its sources: {shares} in the checkpoint, {other_shares} now"
        yield Change(f"data.train: {text}", "data.train")
    model, other = (compared_keys(stored_model_config(each.model_config), training=True) for each in (saved, now))
    for key, value in other.items():
        if model.get(key) != value:
            yield Change(f"model: {key} is {model.get(key)!r} in the checkpoint, {value!r} now", None)
    if (saved.tokenizer_fingerprint, saved.eos_token_id) != (now.tokenizer_fingerprint, now.eos_token_id):
        text = f"{after['tokenizer.path']} produces other tokens, or ends documents with another one"
        yield Change(f"tokenizer: {text}", "tokenizer")
    if _other_data(saved, now, changed):
        yield Change("data: other sources, or files that have changed", "data")
    if saved.bf16 != now.bf16 and "train.precision" not in changed:
        yield Change("train.precision: auto chooses another precision on this machine", "train.precision")


def changed_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of settings (dotted) whose values differ between two dumps of a config."""
    return _different(_by_name(saved), _by_name(now))


def _different(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def _by_name(config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings by dotted name. One that an older version did not have has its default."""
    defaults = {name: field.get_default() for name, field in SETTINGS.items() if not field.is_required()}
    return defaults | {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings by name: with the number of lanes, and sorted names if their order does not matter.

    The file of a rule has only its name: its digest is compared, too.
    """
    values = _by_name(config)
    values["data.lanes"] = values["data.lanes"] or lanes_of(values["train.batch_size"])
    values["method.target_modules"] = sorted(values["method.target_modules"] or DECODER_LINEARS)
    matrices = values["optim.matrices"]
    if is_own(matrices):
        file, name = split_rule(matrices)
        values["optim.matrices"] = f"{Path(file).name}:{name}"
    return values


def _unused_settings(saved: str, now: str) -> set[str]:
    """Settings that the method of the saved run did not use, and ``method.name`` if both have the same adapter."""
    before, after = METHODS[saved], METHODS[now]
    unused = set(settings_of_others(before))
    return unused | ({"method.name"} if before.adapter is after.adapter else set())


def _shares(train: Any) -> dict[str, float]:
    """The shares of a mixture's sources by name; empty if the training text is not a mixture."""
    sources = as_sources(train)
    total = sum(source.weight for source in sources)
    return {source.label: round(source.weight / total, 9) for source in sources} if is_mixture(sources) else {}


def _other_data(saved: Identity | Manifest, now: Identity, changed: list[str]) -> bool:
    if saved.data_content != now.data_content:
        return True
    if saved.data_order == now.data_order:
        return False
    if saved.tokenizer_fingerprint == now.tokenizer_fingerprint and not ORDER_SETTINGS & {*changed}:
        return True
    # the tokenizer and the order explain the other fingerprint, so only the settings show whether the text changed
    return any(may_change(name) == "data" for name in changed)
