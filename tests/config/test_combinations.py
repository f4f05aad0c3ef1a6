"""Settings that are wrong together: mixtures of sources, and values that do not go with each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relora_mora.config.checks.combinations import remarks
from relora_mora.config.checks.deepspeed import DERIVED_DEEPSPEED_KEYS
from relora_mora.config.load import dump, load_config, validate
from relora_mora.config.yaml_text import parse_yaml
from tests.tools.config_tools import SETTINGS, faults_of, tree
from tests.tools.helpers import ROOT


def test_mixtures_and_sets_of_held_out_text() -> None:
    def record(**given: Any) -> dict[str, Any]:
        return {"source": "data/web/*.jsonl", **given}

    config = validate(tree(data={"train": record(text_column="content")}), "the test")
    assert config.data.is_mixture
    assert [source.label for source in config.data.train_sources] == ["web"]
    config = validate(tree(data={"validation": {"a": "x", "b": ["y", record()]}}), "the test")
    sets = config.data.validation_sets
    assert {name: [source.source for source in sources] for name, sources in sets.items()} == {
        "a": ["x"],
        "b": ["y", "data/web/*.jsonl"],
    }
    assert validate(parse_yaml(dump(config)), "the test") == config


MIXTURE = [{"source": "a/*.json", "weight": 1}, {"source": "b/*.json", "weight": 0}]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"train": [{"source": "x", "weight": -1}]}, "data.train.0.weight: got -1"),
        ({"train": [{"source": "x", "wieght": 1}]}, "data.train.0.wieght: unknown; did you mean weight?"),
        ({"train": [{"weight": 1}]}, "data.train.0.source: must be given"),
        ({"train": [{"source": "x", "name": "a b"}]}, "data.train.0.name: got 'a b'; input should be a name"),
        ({"train": [{"source": "*.json"}]}, "data.train.0.name: no name for metrics follows from *.json"),
        ({"train": [{"source": "x/a"}, {"source": "y/a"}]}, "data.train: 2 sources are named a"),
        ({"train": [{"source": "x", "weight": 0}]}, "data.train: all weights are 0"),
        (
            {"train": [{"source": "o/n:en", "config": "de"}]},
            "data.train.0.config: it is de, but the source o/n:en names en",
        ),
        ({"train": [{"source": "x"}, 3]}, "data.train.1: got 3; input should be names and values"),
        ({"train": {"a": "x"}}, "data.train: got {'a': 'x'}; input should be a source, or a list"),
        ({"stages": [{"from_step": 5, "weights": {"a": 1}}]}, "data.stages: stages change the weights of a mixture"),
        (
            {"train": MIXTURE, "stages": [{"from_step": 5, "weights": {"a": 1}}]},
            "data.stages.0.weights: it names a; name each source of data.train (a, b) once",
        ),
        (
            {"train": MIXTURE, "stages": [{"from_step": 5, "weights": {"a": 0, "b": 0}}]},
            "data.stages.0.weights: all weights are 0",
        ),
        (
            {"train": MIXTURE, "stages": [{"from_step": n, "weights": {"a": 1, "b": 1}} for n in (5, 5)]},
            "data.stages.1.from_step: 5 is not after the previous stage",
        ),
        ({"train": "x/a", "concatenate": True}, "data.concatenate: it is for a list of records"),
        (
            {"train": [{"source": "x/a", "weight": 2}, {"source": "x/b"}], "concatenate": True},
            "data.train.0.weight: 2.0 is for the sources of a mixture, but data.concatenate joins them into one text",
        ),
        (
            {"train": [{"source": "x/a"}, {"source": "x/b", "records": {"kind": "question"}}], "concatenate": True},
            "data.packing: sources of text and of records are packed differently",
        ),
        (
            {
                "train": [{"source": "x/a"}, {"source": "x/b", "records": {"kind": "text", "too_long": "drop"}}],
                "concatenate": True,
                "packing": "whole",
            },
            "data.concatenate: sources of plain text have different values of records.too_long",
        ),
        (
            {
                "train": [{"source": "x/a"}, {"source": "x/b"}],
                "concatenate": True,
                "stages": [{"from_step": 5, "weights": {"a": 1, "b": 1}}],
            },
            "data.stages: stages change the weights of a mixture",
        ),
        ({"validation": {"a b": "x"}}, "data.validation.a b: got 'a b'; input should be a name"),
        (
            {"validation": {"a": {"source": "o/n::x", "split": "y"}}},
            "data.validation.a.0.split: it is y, but the source",
        ),
        ({"validation": {"source": "x", "weight": 0.5}}, "data.validation.0.weight: 0.5 is for the sources of a mix"),
        ({"validation": [{"source": "x", "name": "a"}]}, "data.validation.0.name: a is for the sources of a mix"),
    ],
)
def test_impossible_mixtures_are_refused(data: dict[str, Any], says: str) -> None:
    (fault,) = faults_of(tree(data=data))
    assert fault.startswith(says), fault


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (0, "method.merge_every: got 0; input should be greater than or equal to 1"),
        ("often", "method.merge_every: got 'often'; input should be a valid integer"),
        ([], "method.merge_every: got []; input should be a whole number of steps; only release 0.2"),
        ([{"every": 10, "growth": 1.5}], "method.merge_every: got [{'every': 10, 'growth': 1.5}]; input should be"),
        ({"every": 10}, "method.merge_every: got {'every': 10}; input should be a whole number of steps; only release"),
    ],
)
def test_a_wrong_interval_is_one_fault(given: object, says: str) -> None:
    (fault,) = faults_of(tree(method={"merge_every": given}))
    assert fault.startswith(says), fault


COMBINATIONS: list[tuple[dict[str, dict[str, Any]], int | None, str]] = [
    ({"method": {"target_modules": ["q_proj", "qq_proj"]}}, None, "method.target_modules: qq_proj is not a linear"),
    ({"method": {"target_modules": ["q_proj", "q_proj"]}}, None, "method.target_modules: duplicate name"),
    (
        {"method": {"square_size": 100, "square_multiple": 8}},
        None,
        "method.square_size: 100 is not a multiple of method.square_multiple 8",
    ),
    (
        {"method": {"square_size": 101, "operators": [1, 6]}},
        None,
        "method.square_size: operator 6 needs an even size, got 101; use 100",
    ),
    ({"model": {"adapter": "a"}}, None, "model.adapter: an adapter belongs to a trained model"),
    (
        {"model": {"adapter": "a", "init_from": "b"}, "method": {"name": "full"}},
        None,
        "model.adapter: the method full has no adapters",
    ),
    ({"method": {"operators": [1, 6]}}, None, "method.square_multiple: operator 6 needs an even R"),
    ({"method": {"name": "mora", "operators": [6], "square_multiple": 3}}, None, "set method.square_multiple=6"),
    (
        {"train": {"deepspeed": {"zero_optimization": 3}}},
        None,
        "train.deepspeed: zero_optimization is 3, expected a mapping",
    ),
    (
        {"train": {"deepspeed": {"zero_optimization": {"offload_optimizer": {}}}}},
        None,
        "zero_optimization.offload_optimizer: not supported",
    ),
    ({"train": {"deepspeed": {"torch_autocast": {"enabled": True}}}}, None, "torch_autocast: not supported"),
    ({"train": {"allow_changes": ["optim.lrr"]}}, None, "train.allow_changes: optim.lrr: unknown setting"),
    (
        {"data": {"document_mask": True}, "model": {"attention": "flash_attention_2"}},
        None,
        "flash_attention_2 does not support a mask",
    ),
    (
        {"method": {"form": "resident"}, "train": {"zero_stage": 3}},
        None,
        "which no rank has at ZeRO-3; use method.form=auto, or train.zero_stage=2",
    ),
    ({"model": {"compile": True}, "train": {"zero_stage": 3}}, None, "use train.zero_stage=2, or leave it at auto"),
    ({"method": {"operators": [1]}}, None, "method.operators: the cycle [1] repeats an operator"),
    ({"method": {"operators": [1, 1]}}, None, "method.operators: the cycle [1, 1] repeats an operator"),
    ({"method": {"operators": [1, 2, 1]}}, None, "method.operators: the cycle [1, 2, 1] repeats an operator"),
    ({"method": {"reset": "magnitude", "reset_ratio": 0.0}}, None, "method.reset_ratio: 0 with method.reset=magnitude"),
    ({"method": {"reset": "random", "reset_ratio": 0.0}}, None, "method.reset_ratio: 0 with method.reset=random"),
    ({"method": {"rank_pattern": {"down": 4}}}, None, "method.rank_pattern: down is not in method.target_modules"),
    (
        {"method": {"rank_pattern": {"up_proj": 4}, "square_size": 8}},
        None,
        "is R of every layer, so ranks have no effect",
    ),
    (
        {"method": {"name": "relora", "reset": "carry"}},
        None,
        "but relora has no square matrices; use method.reset=full",
    ),
    ({"method": {"operators": [2, 6], "reset": "carry", "square_multiple": 2}}, None, "and 6 is not"),
    *(
        (
            {"method": {"reset": reset}, "optim": {"matrices": matrices}},
            None,
            f"method.reset: {reset} changes element-wise moments, but {matrices} has none; "
            "use method.reset=full or none",
        )
        for reset in ("magnitude", "random", "carry")
        for matrices in ("adamw8bit", "rule.py:Rule")
    ),
    (
        {"method": {"merge_until_step": 1999}},
        None,
        "method.merge_until_step: 1999 comes before the first merge (step 2000); raise it, or use method.name=mora",
    ),
    ({"optim": {"decay_steps": 100}}, None, "optim.decay_steps: only the schedule wsd uses it, got cosine"),
    ({"data": {"lanes": 48}}, None, "data.lanes: every global batch takes the same number of sequences from each lane"),
    ({"train": {"micro_batch_size": 3}}, None, "train.micro_batch_size: 3 does not divide train.batch_size 1024"),
    ({"train": {"batch_size": 48}}, 6, "train.batch_size: 48 is not a multiple of train.micro_batch_size 16 x 6 ranks"),
    (
        {"train": {"batch_size": 96, "micro_batch_size": 2}},
        6,
        "data.lanes: 32 lanes cannot be split evenly among 6 ranks; set data.lanes=48, a multiple of 6 that divides",
    ),
    (
        {"train": {"deepspeed": {"zero_optimization": {"stage": 1}}}},
        None,
        "zero_optimization.stage is derived from train.zero_stage",
    ),
    *(
        ({"train": {"deepspeed": {key: 1}}}, None, f"train.deepspeed: {key} is derived from")
        for key in DERIVED_DEEPSPEED_KEYS
        if "." not in key
    ),
]


@pytest.mark.parametrize(
    ("sections_given", "world_size", "message"), COMBINATIONS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_impossible_combinations_are_refused(
    sections_given: dict[str, dict[str, Any]], world_size: int | None, message: str
) -> None:
    found = faults_of(tree(**sections_given), world_size)
    assert any(message in fault for fault in found), found
    assert all(fault.split(":")[0] in SETTINGS for fault in found)


STAGES = {"train": MIXTURE, "stages": [{"from_step": 10_001, "weights": {"a": 1, "b": 1}}]}
REMARKS = [  # settings, the setting that the remark names, and what the run of 10,000 steps does
    ({"method": {"name": "full"}, "optim": {"warmup_steps": 10_000}}, "optim.warmup_steps", "at 100% of"),
    ({"method": {"name": "full"}, "optim": {"warmup_steps": 40_000}}, "optim.warmup_steps", "at 25% of"),
    ({"optim": {"schedule": "wsd", "decay_steps": 9001}}, "optim.decay_steps", "the decay has 9,000 steps"),
    ({"method": {"merge_every": 10_000}}, "method.merge_every", "follow step 10000: it trains as mora does"),
    ({"method": {"name": "relora", "merge_every": 10_000}}, "method.merge_every", "as lora does"),
    ({"method": {"merge_every": 999}}, "method.merge_every", "first merge (step 999) comes before the warmup ends"),
    (
        {"method": {"merge_every": 40}, "optim": {"warmup_steps": 10}},
        "optim.restart_warmup_steps",
        "each warmup after a merge has 40 steps",
    ),
    ({"data": STAGES}, "data.stages.0.from_step", "before this stage"),
]


@pytest.mark.parametrize(("sections_given", "setting", "says"), REMARKS, ids=lambda value: str(value)[:60])
def test_a_run_says_what_it_does_about_settings_that_its_length_leaves_no_room_for(
    sections_given: dict[str, dict[str, Any]], setting: str, says: str
) -> None:
    (remark,) = remarks(validate(tree(**sections_given), "the test"))
    assert remark.startswith(f"{setting}: ")
    assert says in remark
    assert setting in SETTINGS or setting.startswith("data.stages.")


@pytest.mark.parametrize("steps", ["1", "6", "30"])
@pytest.mark.parametrize("config", sorted((ROOT / "configs" / "run").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_few_steps_of_any_shipped_config_can_be_tried(config: Path, steps: str) -> None:
    tried = load_config(config, {"train.steps": steps})
    assert next(remarks(tried)).startswith("optim.warmup_steps: ")


@pytest.mark.parametrize(
    "sections_given",
    [
        {"method": {"merge_every": 1000}},
        {"method": {"merge_every": 9999}},
        {"method": {"merge_every": 50}, "optim": {"warmup_steps": 50}},
        {"method": {"merge_every": 10}, "optim": {"warmup_steps": 50, "restart_warmup_steps": 0}},
        {"method": {"name": "mora", "merge_every": 1, "operators": [1, 6]}},
        {"method": {"name": "full", "target_modules": ["experts"], "operators": [1, 1]}},
        {"method": {"operators": [6, 1], "square_multiple": 2}},
        {"method": {"square_size": 96, "square_multiple": 8}},
        {"method": {"reset": "full", "reset_ratio": 0.0}},
        {"optim": {"warmup_steps": 0}},
        {"optim": {"matrices": "rule.py:Rule"}},
        {"optim": {"schedule": "wsd", "decay_steps": 9000}},
        {"data": {"lanes": 1024}},
        {"train": {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 1}, "comms_logger": {"enabled": True}}}},
    ],
    ids=str,
)
def test_combinations_at_the_boundary_are_accepted(sections_given: dict[str, dict[str, Any]]) -> None:
    config = validate(tree(**sections_given), "the test", world_size=2)
    assert list(remarks(config)) == []
    given = {(section, key): value for section, settings in sections_given.items() for key, value in settings.items()}
    assert {place: getattr(getattr(config, place[0]), place[1]) for place in given} == given
