"""Settings that are wrong together, each of which names what to change; and settings that just work together."""

import re
from pathlib import Path
from typing import Any

from relora_mora.config.checks.combinations import remarks
from relora_mora.config.load import dump, load_config, validate
from relora_mora.config.yaml_text import parse_yaml
from tests.tools.config_tools import changed_tree, faults_of
from tests.tools.each import each
from tests.tools.helpers import ROOT

TWO = [{"source": "x/a"}, {"source": "x/b"}]
MIXTURE = [{"source": "x/a", "weight": 1}, {"source": "x/b", "weight": 0}]
FLASH = {"model.attention": "flash_attention_2"}
CHAT = {"kind": "messages"}


def stages(*weights: dict[str, float], steps: tuple[int, ...] = (5, 6)) -> list[dict[str, Any]]:
    return [{"from_step": step, "weights": each} for step, each in zip(steps, weights, strict=False)]


# one for each rule: the setting that the message names first, and what was changed
BAD: list[tuple[str, dict[str, Any]]] = [
    ("model.config", {"model.config": None}),
    ("tokenizer.path", {"tokenizer.path": None}),
    ("data.lanes", {"data.lanes": 48}),
    ("train.micro_batch_size", {"train.micro_batch_size": 3}),
    ("model.attention", FLASH | {"data.document_mask": True}),
    ("model.attention", FLASH | {"data.packing": "whole"}),
    ("model.attention", FLASH | {"train.precision": "fp32"}),
    ("model.compile", {"model.compile": True, "train.zero_stage": 3}),
    ("train.allow_changes", {"train.allow_changes": ["optim.lr", "optim.lrr"]}),
    # methods
    ("method.dropout", {"method.name": "mora", "method.dropout": 0.1, "method.form": "merged"}),
    ("method.square_multiple", {"method.operators": [1, 6]}),
    ("method.square_multiple", {"method.square_size": 101, "method.operators": [1, 6]}),
    ("method.form", {"method.form": "merged", "method.base": "int8", "method.base_products": True}),
    ("method.form", {"method.form": "resident", "method.base": "fp8", "method.base_products": False}),
    *(("method.operators", {"method.operators": cycle}) for cycle in ([1], [1, 1], [1, 2, 1])),
    ("method.reset", {"method.name": "relora", "method.reset": "carry"}),
    ("method.reset", {"method.operators": [2, 6], "method.reset": "carry", "method.square_multiple": 2}),
    *(
        ("method.reset", {"method.reset": reset, "optim.matrices": matrices})
        for reset in ("magnitude", "random", "carry")
        for matrices in ("adamw8bit", "rule.py:Rule")
    ),
    ("method.form", {"method.form": "resident", "train.zero_stage": 3}),
    ("model.adapter", {"model.adapter": "a"}),
    ("model.adapter", {"model.adapter": "a", "model.init_from": "b", "method.name": "full"}),
    # lengths
    ("train.tokens", {"train.tokens": 1e12, "train.steps": 100}),
    ("train.epochs", {"train.tokens": 1e6, "train.epochs": 2}),
    ("optim.warmup_fraction", {"optim.warmup_steps": 3, "optim.warmup_fraction": 0.1}),
    # data
    ("train.epochs", {"train.epochs": 2, "data.train": TWO}),
    ("data.train", {"data.train": [{"source": "x/a"}, {"source": "y/a"}]}),
    ("data.train", {"data.train": [{"source": "x", "weight": 0}]}),
    (
        "data.concatenate",
        {"data.train": [TWO[0], {**TWO[1], "records": {"kind": "question"}}], "data.concatenate": True},
    ),
    (
        "data.concatenate",
        {
            "data.train": [TWO[0], {**TWO[1], "records": {"kind": "text", "too_long": "drop"}}],
            "data.concatenate": True,
            "data.packing": "whole",
        },
    ),
    ("data.stages", {"data.stages": stages({"a": 1})}),
    ("data.stages", {"data.train": TWO, "data.concatenate": True, "data.stages": stages({"a": 1, "b": 1})}),
    ("data.document_mask", {"data.document_mask": True, "data.packing": "none"}),
    ("eval.generate", {"eval.generate": 3}),
    *(
        ("checkpoint.keep_best", {"checkpoint.keep_best": metric})
        for metric in ("validation_loss", "eval/c4/loss", "eval/exact_match", "tasks/arc_easy/acc")
    ),
    ("checkpoint.keep_best", {"checkpoint.keep_best": "eval/loss", "eval.every_steps": 0}),
    ("checkpoint.keep_best", {"checkpoint.keep_best": "tasks/a/acc", "eval.tasks": ["a"], "eval.tasks_every_steps": 0}),
    ("data.train.0", {"data.train": [{"source": "o/n:en", "config": "de"}]}),
    ("data.validation.a.0", {"data.validation": {"a": {"source": "o/n::x", "split": "y"}}}),
    ("data.train", {"data.train": [{"source": "*.json"}]}),
    ("data.validation", {"data.validation": [{"source": "x", "name": "a"}]}),
    ("data.validation", {"data.validation": {"source": "x", "weight": 0.5}}),
    ("data.concatenate", {"data.train": [{**TWO[0], "weight": 2}, TWO[1]], "data.concatenate": True}),
    ("data.stages", {"data.train": TWO, "data.stages": stages(*[{"a": 1, "b": 1}] * 2, steps=(5, 5))}),
    ("data.stages", {"data.train": TWO, "data.stages": stages({"a": 1})}),
    ("data.stages", {"data.train": TWO, "data.stages": stages({"a": 0, "b": 0})}),
    ("data.records", {"data.records": {**CHAT, "columns": {"answer": "b"}}}),
    ("data.records", {"data.records": {"kind": "question", "template": "chatml"}}),
    ("data.packing", {"data.records": {**CHAT, "too_long": "drop"}, "data.packing": "stream"}),
    ("data.document_mask", {"data.records": CHAT, "data.packing": "stream", "data.document_mask": True}),
    # keys of DeepSpeed
    ("train.deepspeed.zero_optimization", {"train.deepspeed": {"zero_optimization": 3}}),
    ("train.deepspeed.zero_optimization.stage", {"train.deepspeed": {"zero_optimization": {"stage": 1}}}),
    ("train.deepspeed.zero_optimization.overlap_comm", {"train.deepspeed": {"zero_optimization": {"overlap_comm": 1}}}),
    ("train.deepspeed.optimizer", {"train.deepspeed": {"optimizer": {}}}),
    # values that are wrong by themselves
    ("data.train.0.weight", {"data.train": [{"source": "x", "weight": -1}]}),
    ("data.train.0.wieght", {"data.train": [{"source": "x", "wieght": 1}]}),
    ("data.train.0.source", {"data.train": [{"weight": 1}]}),
    ("data.train.0.name", {"data.train": [{"source": "x", "name": "a b"}]}),
    ("data.train.1", {"data.train": [{"source": "x"}, 3]}),
    ("data.train", {"data.train": {"a": "x"}}),
    ("data.validation.a b", {"data.validation": {"a b": "x"}}),
    *(("method.merge_every", {"method.merge_every": each}) for each in (0, "often", [10])),
]
BAD_RANKS: list[tuple[str, dict[str, Any]]] = [  # for six ranks
    ("train.batch_size", {"train.batch_size": 48, "data.lanes": 48}),
    ("data.lanes", {"train.batch_size": 96, "train.micro_batch_size": 2}),
]


@each("named,changes", BAD)
def test_impossible_combinations_are_refused(named: str, changes: dict[str, Any]) -> None:
    [fault] = faults_of(changed_tree(changes))
    assert fault.startswith(f"{named}: ")
    assert not re.search(r"\{(c\.|found|at|section)", fault), "all is filled in"


@each("named,changes", BAD_RANKS)
def test_combinations_for_another_number_of_ranks_are_refused(named: str, changes: dict[str, Any]) -> None:
    validate(changed_tree(changes), "the test", world_size=1)
    [fault] = faults_of(changed_tree(changes), 6)
    assert fault.startswith(f"{named}: ")


GOOD: list[dict[str, Any]] = [
    {"method.merge_every": 9999},
    {"method.merge_every": 50, "optim.warmup_steps": 50},
    {"method.merge_every": 10, "optim.warmup_steps": 50, "optim.restart_warmup_steps": 0},
    {"method.merge_until_step": 2000},
    {"method.name": "mora", "method.operators": [1, 6]},
    {"method.name": "mora", "method.dropout": 0.1, "method.form": "decoupled"},
    {"method.operators": [6, 1], "method.square_multiple": 2},
    {"method.square_size": 96},
    {"method.reset": "none", "optim.matrices": "adamw8bit"},
    {"method.form": "merged", "method.base": "int8"},
    {"method.form": "resident", "train.zero_stage": 2},
    {"method.rank_pattern": {"up_proj": 4}},
    {"model.adapter": "a", "model.init_from": "b", "method.name": "mora"},
    {"model.config": None, "tokenizer.path": None, "model.init_from": "b"},
    {"model.compile": True},
    FLASH,
    {"optim.warmup_steps": 0},
    {"optim.matrices": "rule.py:Rule"},
    {"optim.schedule": "wsd", "optim.decay_steps": 9000},
    {"train.allow_changes": ["optim.lr", "data"]},
    {"data.lanes": 1024},
    {"data.document_mask": True, "data.packing": "stream"},
    {"data.records": {"kind": "alpaca", "columns": {"input": "context"}}},
    {"data.records": {**CHAT, "template": "chatml", "too_long": "drop"}},
    {"data.records": CHAT, "eval.generate": 3},
    {"checkpoint.keep_best": "eval/bits_per_byte"},
    {"checkpoint.keep_best": "tasks/a/acc", "eval.tasks": ["a"]},
    {"train.deepspeed": {"zero_optimization": {"reduce_bucket_size": 5e8}}},
]
GOOD_SOURCES: list[dict[str, Any]] = [
    {"data.train": [{"source": "o/n:en", "split": "x"}, {"source": "*.json", "name": "web"}]},
    {"data.train": {"source": "o/n::x", "config": "y"}},
    {"data.train": TWO, "data.concatenate": True, "train.epochs": 2},
    {"data.train": MIXTURE, "data.stages": stages({"a": 1, "b": 1}, {"a": 0, "b": 1})},
    {"data.validation": {"a": "x", "b": ["y", {"source": "data/web/*.jsonl"}]}},
]


@each("changes", GOOD)
def test_combinations_at_the_boundary_are_accepted(changes: dict[str, Any]) -> None:
    config = validate(changed_tree(changes), "the test", world_size=2)
    assert list(remarks(config)) == []
    kept = config.model_dump()
    for name, value in changes.items():
        section, key = name.split(".")
        assert kept[section][key] == (kept[section][key] | value if isinstance(value, dict) else value)


@each("changes", GOOD_SOURCES)
def test_sources_that_go_together_are_accepted(changes: dict[str, Any]) -> None:
    config = validate(changed_tree(changes), "the test")
    assert validate(parse_yaml(dump(config)), "its own dump") == config


REMARKS: list[tuple[str, dict[str, Any]]] = [  # what the remark says; a run has 10,000 steps
    (
        "train.steps: the run of 10000 steps warms up in 5000 (optim.warmup_steps=20000), ends without a",
        {"optim.warmup_steps": 20_000, "method.merge_every": 10_000},
    ),
    (
        "train.steps: the run of 10000 steps decays in 9000 (optim.decay_steps=9001)",
        {"optim.schedule": "wsd", "optim.decay_steps": 9001},
    ),
    (
        "train.steps: the run of 10000 steps ends without a merge (method.merge_every=2000)",
        {"method.merge_until_step": 1999},
    ),
    ("method.merge_every: ", {"method.merge_every": 999}),
    ("optim.restart_warmup_steps: ", {"method.merge_every": 40, "optim.warmup_steps": 10}),
    (
        "train.steps: the run of 10000 steps ends before the stage of step 10001",
        {"data.train": MIXTURE, "data.stages": stages({"a": 1, "b": 1}, steps=(10_001,))},
    ),
]


@each("said,changes", REMARKS)
def test_a_run_says_what_it_does_about_settings_that_its_length_leaves_no_room_for(
    said: str, changes: dict[str, Any]
) -> None:
    [remark] = remarks(validate(changed_tree(changes), "the test"))
    assert remark.startswith(said)


@each("steps", ["1", "20"])
@each("config", sorted((ROOT / "configs" / "run").glob("*.yaml")))
def test_a_few_steps_of_any_shipped_config_can_be_tried(config: Path, steps: str) -> None:
    tried = load_config(config, {"train.steps": steps})
    assert next(remarks(tried)).startswith(f"train.steps: the run of {steps} steps warms up in {int(steps) // 2 or 1} ")
