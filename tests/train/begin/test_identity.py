"""What two runs differ in: between ranks, and between a checkpoint and a run that goes on from it."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from relora_mora.config.schema import DECODER_LINEARS
from relora_mora.model.config import plain_model_config
from relora_mora.train.begin.identity import Change, Identity, changes_since
from tests.tools.each import each
from tests.tools.tiny import tiny_config, tiny_llama


def identity(**changes: Any) -> Identity:
    found = Identity(
        config=tiny_config().model_dump(mode="json"),
        model_config=plain_model_config(tiny_llama()),
        tokenizer_fingerprint="tokens",
        eos_token_id=2,
        data_content="content",
        data_order="order",
        bf16=False,
    )
    return replace(found, **changes)


def left(saved: Identity, now: Identity, allowed: Collection[str] = ()) -> list[Change]:
    return [change for change in changes_since(saved, now) if not change.is_allowed(allowed)]


def with_setting(section: str, key: str, value: Any) -> Identity:
    config = tiny_config().model_dump(mode="json")
    config[section][key] = value
    return identity(config=config)


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
        (replace(with_setting("data", "seed", 7), data_order="other"), "data.seed"),
    ],
)
def test_a_change_is_named_until_it_is_allowed(other, permission):
    [change] = left(identity(), other)
    assert change.permission == permission
    assert left(identity(), other, {permission}) == []


def test_a_setting_that_decides_which_parameters_train_cannot_be_allowed_if_used():
    def rank(method: str, value: int) -> Identity:
        given = identity(config=tiny_config(method={"name": method}).model_dump(mode="json"))
        given.config["method"]["rank"] = value
        return given

    [change] = left(identity(), with_setting("method", "name", "relora"), {"method.name"})
    assert change.permission is None
    same_adapter = [with_setting("method", "name", name) for name in ("lora", "relora")]
    assert left(*same_adapter, {"method.name"}) == []
    [change] = left(rank("remora", 3), rank("remora", 5), {"method.rank"})
    assert change.permission is None
    assert "start a new run with model.init_from" in change.text
    assert left(rank("full", 3), rank("full", 5), {"method.rank"}) == []


def test_sources_with_other_names_are_other_data_for_any_weights():
    def mixture(name: str, order: str, weight: float = 1.0) -> Identity:
        records = [{"source": "a", "name": name, "weight": weight}, {"source": "b", "weight": 1.0}]
        return replace(with_setting("data", "train", records), data_order=order)

    text = identity()
    for before, now in ((mixture("web", "1"), mixture("wev", "2", 3.0)), (text, mixture("web", "1"))):
        [change] = left(before, now, {"data.train"})
        assert change.permission == "data"
    assert left(mixture("web", "1"), mixture("web", "1", 3.0), {"data.train"}) == []


LINEARS = list(DECODER_LINEARS)


@each(
    "name, value",
    [
        *(("method.target_modules", same) for same in (None, LINEARS, LINEARS[::-1])),
        *(("method.form", "decoupled"), ("model.attention", "eager")),  # they change rounding at most
        *((name, "another") for name in ("data.workers", "train.zero_stage", "eval.every_steps", "log.progress")),
    ],
)
def test_settings_that_may_change(name, value):
    assert left(identity(), with_setting(*name.split("."), value)) == []


def test_weights_with_the_same_shares_are_not_a_change():
    def mixture(*weights: float) -> Identity:
        named = zip("abc", weights, strict=False)
        records = [{"source": name, "name": name, "weight": weight} for name, weight in named]
        return with_setting("data", "train", records)

    assert left(mixture(1.0, 1.0), mixture(2.0, 2.0)) == []
    assert left(mixture(0.1, 0.1, 0.5), mixture(1.0, 1.0, 5.0)) == []


def test_lanes_are_compared_by_their_resulting_number():
    def lanes(batch_size: int, given: int | None, order: str) -> Identity:
        config = tiny_config().model_dump(mode="json")
        config["train"]["batch_size"], config["data"]["lanes"] = batch_size, given
        return identity(config=config, data_order=order)

    assert left(lanes(16, None, "16"), lanes(16, 16, "16")) == []
    [change] = left(lanes(16, None, "16"), lanes(24, None, "8"), {"train.batch_size"})
    assert change.text == "data.lanes: 16 in the checkpoint, 8 now"
    assert change.permission == "data.lanes"


def test_another_model_cannot_be_allowed():
    other = identity(model_config=plain_model_config(tiny_llama(rms_norm_eps=1e-3)))
    [change] = left(identity(), other, {"model"})
    assert change.permission is None
    assert "rms_norm_eps" in change.text


@each("setting,value", [("matrices", "muon"), ("others", "adamw8bit")])
def test_another_optimizer_cannot_be_allowed(setting, value):
    changed = with_setting("optim", setting, value)
    [change] = left(identity(), changed, {f"optim.{setting}"})
    assert change.permission is None
    assert f"optim.{setting}: 'adamw' in the checkpoint, '{value}' now; " in change.text
    older = identity()
    del older.config["optim"][setting]  # as a version without it wrote
    assert left(older, identity()) == []
    assert len(left(older, changed)) == 1


def _rule(folder: str, name: str, **optim: Any) -> Identity:
    config = identity().config
    matrices = {"matrices": f"{folder}/rule.py:{name}", "rule_digest": "a"}
    return identity(config={**config, "optim": {**config["optim"], **matrices, **optim}})


def test_a_rule_is_compared_by_its_name_and_the_digest_of_its_file():
    before = _rule("here", "Rule")
    assert left(before, _rule("/elsewhere", "Rule")) == []
    for changed, permission in (({"rule_digest": "b"}, "optim.rule_digest"), ({"rule": {"rank": 2}}, "optim.rule")):
        [change] = left(before, _rule("here", "Rule", **changed))
        assert change.permission == permission
    [change] = left(before, _rule("here", "Other", rule_digest="b", rule={"rank": 2}))
    assert change.permission is None
    assert change.text.startswith("optim.matrices: ")
