"""Settings: what is accepted, what is refused, and the messages."""

import re
from pathlib import Path
from typing import Any

import pytest

from relora_mora.config.checks.combinations import remarks, unused_by
from relora_mora.config.explain import ELSEWHERE
from relora_mora.config.lengths import with_counted_epochs
from relora_mora.config.load import FINETUNING, ConfigError, dump, load_config, stored_config, validate
from relora_mora.config.yaml_text import parse_yaml
from tests.tools.config_tools import SETTINGS, changed_tree, faults_of, settings_file, tree
from tests.tools.each import each
from tests.tools.helpers import ROOT


def test_a_misspelled_setting_gets_a_suggestion() -> None:
    wrong = {f"{name}x": 1 for name in SETTINGS}
    found = faults_of(changed_tree(wrong))
    assert [
        name for name in wrong if not any(fault.startswith(f"{name}: unknown; did you mean ") for fault in found)
    ] == []


def test_a_wrong_length_does_not_conflict_with_the_default_of_another() -> None:
    found = faults_of(tree(optim={"warmup_steps": 2, "warmup_fraction": "3%"}, train={"tokens": "many"}))
    assert sorted(fault.partition(":")[0] for fault in found) == ["optim.warmup_fraction", "train.tokens"]


def test_names_of_other_trainers_get_a_hint() -> None:
    assert {ours for ours in ELSEWHERE.values() if ours not in SETTINGS} == set()
    [fault] = faults_of(tree(train={"output_dir": "a"}))
    assert fault == "train.output_dir: unknown; did you mean train.run_dir?"
    assert "optim.nonsense: unknown; known here: lr, " in faults_of(tree(optim={"nonsense": 1e-3}))[0]
    assert faults_of({**tree(), "trian": {}}) == ["trian: unknown; did you mean train?"]


def test_all_faults_are_reported_together(tmp_path: Path) -> None:
    path = settings_file(
        tmp_path,
        tokenizer={"path": None},
        data={"train": 3, "lanes": 7},
        method={"nmae": "remora", "operators": [1, 5], "merge_every": 10},
        optim={"lr": "fast"},
        train={"steps": True, "deepspeed": {"bf16": {}}},
    )
    with pytest.raises(ConfigError) as error:
        load_config(
            path, {"steps": "3", "train.seed": "[", "train.batch_size": "1000", "model.init_from": ""}, world_size=3
        )
    starts = sorted(fault.split(":")[0] for fault in error.value.faults)
    assert starts == sorted(
        [
            "--model.init_from",  # empty, which is not null
            "--steps",  # no section
            "--train.seed=[",  # no YAML
            "data.train",  # a number
            "data.lanes",  # does not divide the batch
            "data.lanes",  # cannot be shared by three ranks
            "method.nmae",  # misspelled
            "method.operators.1",  # no such operator
            "optim.lr",  # a word
            "tokenizer.path",  # missing
            "train.micro_batch_size",  # does not divide the batch
            "train.steps",  # true is not a number
            "train.deepspeed.bf16",  # a derived key
        ]
    ), str(error.value)


def test_defaults_that_replace_faulty_settings_are_not_reported() -> None:
    # 48 lanes would not divide the default of 1,024 sequences; the number of sequences is unknown here
    for batch in ({"batch_size": "many"}, {"batch_sizee": 96}, {"gradient_accumulation_steps": 2}, {}):
        assert len(faults_of(tree(train=batch, data={"lanes": 48}))) == 1


@each(
    "overrides,steps,epochs,warmup",
    [
        ({}, 10_000, 3, 1000),  # as long as the text has not been counted
        ({"train.epochs": "2"}, 10_000, 2, 1000),
        ({"train.steps": "300"}, 300, None, 9),
        ({"train.tokens": "1e8"}, 1526, None, 46),
        ({"train.steps": "300", "optim.warmup_steps": "4"}, 300, None, 4),
        ({"train.tokens": "null", "optim.warmup_steps": "null"}, 10_000, 3, 1000),
    ],
)
def test_the_command_line_may_give_the_length_in_another_unit(
    overrides: dict[str, str], steps: int, epochs: float | None, warmup: int
) -> None:
    config = load_config(ROOT / "configs/task/math.yaml", overrides, defaults=FINETUNING)
    assert (config.train.steps, config.train.epochs, config.optim.warmup_steps) == (steps, epochs, warmup)


def test_an_override_changes_what_it_names_and_not_an_alias_of_it(tmp_path: Path) -> None:
    text = {"source": "a.json"}
    path = settings_file(tmp_path, data={"train": text, "validation": text})
    assert "*id001" in path.read_text()
    data = load_config(path, {"data.validation.source": "b.json"}).data
    assert [[one.source for one in data.sources(split)] for split in ("train", "validation")] == [
        ["a.json"],
        ["b.json"],
    ]


def test_a_whole_setting_and_a_part_of_it_may_be_given_in_any_order(tmp_path: Path) -> None:
    part, whole = ("data.validation.x", "b"), ("data.validation", "{y: c}")
    for given in ([part, whole], [whole, part]):
        assert load_config(settings_file(tmp_path), dict(given)).model_dump()["data"]["validation"] == {
            "y": "c",
            "x": "b",
        }


@each("name", ["train.tokens", "train.epochs", "optim.warmup_fraction"])
def test_a_null_override_does_not_remove_other_settings_of_the_file(name: str) -> None:
    given, changed = (load_config(ROOT / "configs/run/tiny_remora.yaml", flags) for flags in ({}, {name: "null"}))
    assert changed == given
    assert (given.train.steps, given.optim.warmup_steps) == (1000, 100)


def test_settings_of_a_checkpoint_need_not_be_possible_today() -> None:
    """Its weights can be used even if today's checks of a run would refuse its settings."""
    before = validate(tree(), "the test")
    settings = before.model_dump(mode="json")
    settings["data"]["lanes"] = 7
    with pytest.raises(ConfigError, match=r"data\.lanes"):
        validate(settings, "the test")
    assert stored_config(settings, "step-1").method == before.method
    with pytest.raises(ConfigError, match=r"1 fault in step-1:\n  - optim.lrx: unknown; did you mean lr"):
        stored_config(tree(optim={"lrx": 1}), "step-1")


def test_the_length_of_a_run_is_given_in_steps_or_tokens_or_epochs() -> None:
    batches = {"batch_size": 8, "micro_batch_size": 8}
    config = validate(tree(train={"steps": None, "tokens": 1e6, **batches}, method={"name": "mora"}), "the test")
    assert config.tokens_per_step * 245 >= 1_000_000 > config.tokens_per_step * 244
    assert config.train.steps == 245
    assert validate(parse_yaml(dump(config)), "the test") == config  # the same again, now in steps
    epochs = validate(tree(train={"epochs": 2.5, **batches}, method={"name": "mora"}), "the test")
    assert with_counted_epochs(epochs, 2.5e9).train.steps == 610_352


@each(
    "train,optim,steps,fraction",
    [
        ({"steps": 200}, {"warmup_fraction": 0.1}, 20, None),
        ({"tokens": 300 * 1024 * 512}, {"warmup_fraction": 0.1}, 30, None),
        ({}, {"warmup_steps": None, "warmup_fraction": 0.0}, 0, None),  # null removes the steps of a file
        ({"epochs": 2}, {"warmup_fraction": 0.1}, 8, 0.1),
        ({"epochs": 2}, {"warmup_fraction": 0.0}, 0, 0.0),
    ],
)
def test_the_warmup_is_given_in_steps_or_as_a_fraction_of_the_run(
    train: dict[str, Any], optim: dict[str, Any], steps: int, fraction: float | None
) -> None:
    config = validate(tree(train=train, method={"name": "mora"}, optim=optim), "the test")
    assert config.optim.warmup_fraction == fraction  # it is kept while the steps are unknown
    assert validate(parse_yaml(dump(config)), "the test").optim == config.optim
    if "epochs" in train:
        config = with_counted_epochs(config, 80 * 1024 * 512)
        assert (config.train.steps, config.optim.warmup_fraction) == (80, None)
    assert config.optim.warmup_steps == steps


def test_the_page_names_every_default_of_fine_tuning() -> None:
    page = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    documented: dict[str, Any] = {}
    for row in page[page.index("## Defaults") :].splitlines():
        if row.startswith("| `"):
            names = re.findall(r"`([a-z_.]+)`", row.split("|")[1])
            values = parse_yaml(f"[{row.split('|')[2].replace('`', '')}]")
            documented |= zip(names, values if len(values) > 1 else values * len(names), strict=True)
    assert documented == {
        f"{section}.{key}": value for section, values in FINETUNING.items() for key, value in values.items()
    }


WRONG: dict[str, list[Any]] = {
    "train.steps": [0, 1.0, True],  # the message for 1.0 is to write 1
    "train.zero_stage": [4],
    "train.run_dir": ["", "a\0b"],
    "train.precision": ["fp16"],
    "optim.lr": [0, float("nan")],
    "optim.betas": [[0.9, 1.0], [0.9]],
    "optim.min_ratio": [1.1],
    "optim.matrices": ["adafactor", "rule.py", "a b:Rule"],
    "optim.others": ["muon", "rule.py:Rule"],
    "optim.rule": [[1]],
    "data.train": [3, [], [""]],
    "data.validation": [["a\0b"]],
    "data.sequence_length": [1],
    "data.timeout_seconds": [float("inf")],
    "method.operators": [[], [5]],
    "method.name": ["galore"],
    "log.tensorboard": ["yes"],
}


@each("name,value", [(name, value) for name, values in WRONG.items() for value in values])
def test_values_out_of_range(name: str, value: Any) -> None:
    found = faults_of(changed_tree({name: value}))
    assert [fault for fault in found if fault.startswith(name)], found


ALONE = {"method.name": "mora", "method.train_embeddings": False, "method.train_norms": False} | {
    "method.train_head": False
}
OWN = {"optim.matrices": "rule.py:Rule", "optim.rule": {"rank": 4}, "optim.rule_digest": "1"}


@each(
    "changes,unused",
    [
        ({}, {}),
        ({"method.name": "full", "method.base": "int8"}, {"method.base": "method full"}),
        ({"method.lora_alpha": 8.0}, {"method.lora_alpha": "method remora"}),
        ({"method.square_size": 8, "method.rank": 4}, {"method.rank": "method.square_size"}),
        ({"method.name": "lora", "method.rank": 4}, {}),
        ({"method.reset_ratio": 0.5}, {"method.reset_ratio": "method.reset=full"}),
        ({"method.reset": "random", "method.reset_ratio": 0.5}, {}),
        ({"optim.momentum": 0.9}, {"optim.momentum": "optim.matrices=adamw"}),
        ({"optim.matrices": "muon", "optim.nesterov": False}, {}),
        (OWN, {}),
        (OWN | {"optim.momentum": 0.9}, {"optim.momentum": "optim.matrices=rule.py:Rule"}),
        ({"optim.rule": {"rank": 4}, "optim.others": "adamw8bit"}, {"optim.rule": "optim.matrices=adamw"}),
        ({"optim.schedule": "constant", "optim.min_ratio": 0.2}, {"optim.min_ratio": "optim.schedule=constant"}),
        ({"optim.decay_steps": 9}, {"optim.decay_steps": "optim.schedule=cosine"}),
        (
            {"optim.restart_warmup_steps": 0, "optim.rewarm": "adapters"},
            {"optim.rewarm": "optim.restart_warmup_steps=0"},
        ),
        (ALONE | {"optim.others": "adamw8bit"}, {"optim.others": "a run that trains neither embeddings nor head"}),
        ({"method.train_embeddings": False, "optim.others": "adamw8bit"}, {}),
        (ALONE | {"optim.lr_other": 1e-3}, {"optim.lr_other": "a run that trains only adapters"}),
        (ALONE | {"method.train_norms": True, "optim.lr_other": 1e-3}, {}),
        ({"eval.limit": 3}, {"eval.limit": "a run without eval.tasks"}),
    ],
)
def test_settings_without_effect_are_named(changes: dict[str, Any], unused: dict[str, str]) -> None:
    config = validate(changed_tree(changes), "the test")
    assert unused_by(config) == unused
    assert [remark for remark in remarks(config) if "does not use it" in remark] == [
        f"{name}: {cause} does not use it" for name, cause in unused.items()
    ]
