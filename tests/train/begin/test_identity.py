"""What two runs differ in: between ranks, and between a checkpoint and a run that goes on from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from relora_mora.config.schema import DECODER_LINEARS
from relora_mora.model.config import plain_model_config
from relora_mora.train.begin.identity import Identity, changed_settings, changes_since, describe_differences
from tests.tools.each import each
from tests.tools.tiny import tiny_config, tiny_llama


def identity(**changes: Any) -> Identity:
    found = Identity(
        config=tiny_config().model_dump(mode="json"),
        model_config=plain_model_config(tiny_llama()),
        tokenizer_fingerprint="tokens",
        eos_token_id=2,
        data_fingerprint="data",
        data_content="content",
        data_order="order",
        bf16=False,
    )
    return replace(found, **changes)


def with_setting(section: str, key: str, value: Any) -> Identity:
    config = tiny_config().model_dump(mode="json")
    config[section][key] = value
    return identity(config=config)


def test_changed_settings_are_named():
    saved = {"optim": {"lr": 1.0, "clip": 1.0}, "train": {"steps": 3}}
    now = {"optim": {"lr": 2.0, "clip": 1.0, "new": 1}, "train": {"steps": 3}}
    assert sorted(changed_settings(saved, now)) == ["optim.lr", "optim.new"]


@each(
    "changes,message",
    [
        ({}, []),
        ({"tokenizer_fingerprint": "other"}, ["the tokenizer"]),
        ({"eos_token_id": 3}, ["the tokenizer"]),
        ({"data_fingerprint": "other"}, ["the training data"]),
        ({"data_content": "other"}, ["the training data"]),
        ({"bf16": True}, ["the fast precision of the device"]),
    ],
)
def test_ranks_report_what_differs(changes, message):
    assert describe_differences(identity(), identity(**changes)) == message


def test_ranks_compare_every_setting():
    assert describe_differences(identity(), with_setting("data", "workers", 7)) == ["data.workers"]


@each(
    "other,permission",
    [
        (with_setting("optim", "lr", 1.0), "optim.lr"),
        (with_setting("data", "seed", 7), "data.seed"),
        (identity(tokenizer_fingerprint="other"), "tokenizer"),
        (identity(eos_token_id=3), "tokenizer"),
        (identity(data_content="other"), "data"),
        (identity(data_order="other"), "data"),
        (identity(bf16=True), "train.precision"),
    ],
)
def test_a_change_is_named_until_it_is_allowed(other, permission):
    [change] = changes_since(identity(), other, set())
    assert change.permission == permission
    assert list(changes_since(identity(), other, {permission})) == []


def test_changes_of_rounding_need_no_permission():
    for section, key, value in (("method", "form", "decoupled"), ("model", "attention", "eager")):
        assert list(changes_since(identity(), with_setting(section, key, value), set())) == []


def test_other_text_is_reported_together_with_other_order_settings():
    both = with_setting("data", "seed", 7)
    both.config["data"]["text_column"] = "summary"
    both = replace(both, data_order="other")
    assert {change.permission for change in changes_since(identity(), both, set())} == {"data.seed", "data"}
    seed = replace(with_setting("data", "seed", 7), data_order="other")
    assert [change.permission for change in changes_since(identity(), seed, set())] == ["data.seed"]


def test_a_setting_that_decides_which_parameters_train_cannot_be_allowed_if_used():
    def rank(method: str, value: int) -> Identity:
        given = identity(config=tiny_config(method={"name": method}).model_dump(mode="json"))
        given.config["method"]["rank"] = value
        return given

    [change] = changes_since(identity(), with_setting("method", "name", "relora"), {"method.name"})
    assert change.permission is None
    [change] = changes_since(rank("remora", 3), rank("remora", 5), {"method.rank"})
    assert change.permission is None
    assert "start a new run with model.init_from" in change.text
    assert list(changes_since(rank("full", 3), rank("full", 5), {"method.rank"})) == []


def test_sources_with_other_names_are_other_data_for_any_weights():
    def mixture(name: str, order: str, weight: float = 1.0) -> Identity:
        records = [{"source": "a", "name": name, "weight": weight}, {"source": "b", "weight": 1.0}]
        return replace(with_setting("data", "train", records), data_order=order, data_fingerprint=f"{order}{weight}")

    text = identity(data_fingerprint="text")
    for before, now in ((mixture("web", "1"), mixture("wev", "2", 3.0)), (text, mixture("web", "1"))):
        [change] = changes_since(before, now, {"data.train"})
        assert change.permission == "data"
    assert list(changes_since(mixture("web", "1"), mixture("web", "1", 3.0), {"data.train"})) == []


def test_the_order_of_projections_has_no_effect():
    names = list(DECODER_LINEARS)
    for same in (None, names, names[::-1]):
        assert list(changes_since(identity(), with_setting("method", "target_modules", same), set())) == []
    [change] = changes_since(identity(), with_setting("method", "target_modules", names[1:]), set())
    assert change.text.startswith("method.target_modules: ")


def test_weights_with_the_same_shares_are_not_a_change():
    def mixture(*weights: float) -> Identity:
        named = zip("abc", weights, strict=False)
        records = [{"source": name, "name": name, "weight": weight} for name, weight in named]
        return replace(with_setting("data", "train", records), data_fingerprint=str(weights))

    assert list(changes_since(mixture(1.0, 1.0), mixture(2.0, 2.0), set())) == []
    assert list(changes_since(mixture(0.1, 0.1, 0.5), mixture(1.0, 1.0, 5.0), set())) == []


def test_lanes_are_compared_by_their_resulting_number():
    def lanes(batch_size: int, given: int | None, order: str) -> Identity:
        config = tiny_config().model_dump(mode="json")
        config["train"]["batch_size"], config["data"]["lanes"] = batch_size, given
        return identity(config=config, data_order=order)

    assert list(changes_since(lanes(16, None, "16"), lanes(16, 16, "16"), set())) == []
    [change] = changes_since(lanes(16, None, "16"), lanes(24, None, "8"), {"train.batch_size"})
    assert change.text == "data.lanes: 16 in the checkpoint, 8 now"
    assert change.permission == "data.lanes"


def test_another_model_cannot_be_allowed():
    other = identity(model_config=plain_model_config(tiny_llama(rms_norm_eps=1e-3)))
    [change] = changes_since(identity(), other, {"model"})
    assert change.permission is None
    assert "rms_norm_eps" in change.text


@each("setting,value", [("matrices", "muon"), ("others", "adamw8bit")])
def test_another_optimizer_cannot_be_allowed(setting, value):
    changed = with_setting("optim", setting, value)
    [change] = changes_since(identity(), changed, {f"optim.{setting}"})
    assert change.permission is None
    assert f"optim.{setting}: 'adamw' in the checkpoint, '{value}' now; one optimizer" in change.text
    older = identity()
    del older.config["optim"][setting]  # as a version without it wrote
    assert list(changes_since(older, identity(), set())) == []
    [change] = changes_since(older, changed, set())
    assert f"'adamw' in the checkpoint, '{value}' now" in change.text


def _rule(folder: str, name: str, **optim: Any) -> Identity:
    config = identity().config
    matrices = {"matrices": f"{folder}/rule.py:{name}", "rule_digest": "a"}
    return identity(config={**config, "optim": {**config["optim"], **matrices, **optim}})


def test_a_rule_is_compared_by_its_name_and_the_digest_of_its_file():
    before = _rule("here", "Rule")
    assert list(changes_since(before, _rule("/elsewhere", "Rule"), set())) == []
    for changed, permission in (({"rule_digest": "b"}, "optim.rule_digest"), ({"rule": {"rank": 2}}, "optim.rule")):
        [change] = changes_since(before, _rule("here", "Rule", **changed), set())
        assert change.permission == permission
    [change] = changes_since(before, _rule("here", "Other", rule_digest="b", rule={"rank": 2}), set())
    assert change.permission is None
    assert change.text.startswith("optim.matrices: ")
    assert describe_differences(before, _rule("here", "Rule", rule_digest="b")) == ["optim.rule_digest"]


def test_a_checkpoint_of_02_that_did_not_use_a_removed_setting_has_not_changed():
    def old(value: int) -> Identity:
        config = identity().config
        return identity(config={**config, "optim": {**config["optim"], "projection_rank": value}})

    assert list(changes_since(old(128), identity(), set())) == []
    [change] = changes_since(old(64), identity(), set())
    assert change.text.startswith("optim.projection_rank: ")


@each("name", ["data.workers", "train.zero_stage", "eval.every_steps", "log.progress"])
def test_operational_settings_may_change(name):
    section, key = name.split(".")
    assert list(changes_since(identity(), with_setting(section, key, "another"), set())) == []
