"""Settings: what is accepted, what is refused and how it is said."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from relora_mora.config import (
    FINETUNING,
    ConfigError,
    dump,
    load_config,
    parse_yaml,
    unused_settings,
    validate,
    with_epochs,
)
from relora_mora.config.deepspeed_checks import DERIVED_DEEPSPEED_KEYS
from relora_mora.config.table import settings_page
from tests.tools.config_tools import SETTINGS, faults_of, same, tree
from tests.tools.helpers import ROOT


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4e-4", 4e-4),
        ("1e5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_000", 1000),
        ("010", 10),
        ("-3", -3),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    assert same(parse_yaml(text), value)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "1: 2",
        "a: &x [*x]",
        "!!python/object:os.system {}",
        "a: !!binary aGk=",
        "!!set {a}",
        "a: [",
        "!!timestamp 2026-11-24",
        "!!timestamp maybe",
        "!!bool maybe",
        "!!map text",
        "!!int {a: 1}",
        "9" * 5000,
        "#" * (1 << 23),
        "["
        + "&a [x, x, x, x, x, x, x, x, x, x]"
        + "".join(f", &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in pairwise("abcdefghi"))
        + "]",
    ],
    ids=lambda text: text[:20],
)
def test_yaml_that_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


def test_a_file_that_never_ends_is_refused() -> None:
    with pytest.raises(ConfigError, match="longer than"):
        load_config("/dev/zero")


def test_merge_keys_are_keys_like_others(tmp_path: Path) -> None:
    """YAML 1.2 has none; 1.1's would change settings from elsewhere in the file."""
    assert parse_yaml("<<: {a: 1}\nb: =") == {"<<": {"a": 1}, "b": "="}
    (tmp_path / "run.yaml").write_text("eval:\n  <<: {every_steps: 3}\n")
    with pytest.raises(ConfigError, match=re.escape("eval.<<: unknown")):
        load_config(tmp_path / "run.yaml")


def test_rates_may_be_written_with_exponents(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {config: m}\ntokenizer: {path: t}\n"
        "data: {train: a, validation: b}\ntrain: {run_dir: r}\noptim: {lr: 4e-4}\n"
    )
    config = load_config(path, {"optim.lr_other": "2e-3", "method.operators": "[1, 2, 3, 4]", "data.lanes": "null"})
    assert (config.optim.lr, config.optim.lr_other, config.method.operators, config.data.lanes) == (
        4e-4,
        2e-3,
        [1, 2, 3, 4],
        None,
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_a_misspelt_setting_gets_a_suggestion(name: str) -> None:
    section, key = name.split(".")
    values_of = tree()
    values_of.setdefault(section, {})[f"{key}x"] = 1
    assert any(fault.startswith(f"{section}.{key}x: unknown; did you mean ") for fault in faults_of(values_of))


def test_suggestions_and_lists() -> None:
    assert "optim.learning_rate: unknown; known here: lr, " in faults_of(tree(optim={"learning_rate": 1e-3}))[0]
    assert faults_of({**tree(), "trian": {}}) == ["trian: unknown; did you mean train?"]


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"config": "m.json"},
                "data": {"train": 3, "validation": "b", "lanes": 7},
                "method": {"nmae": "remora", "operators": [1, 5], "merge_every": 10},
                "optim": {"lr": "fast"},
                "train": {"run_dir": "r", "steps": True, "deepspeed": {"bf16": {}}},
            }
        )
    )
    with pytest.raises(ConfigError) as error:
        load_config(path, {"steps": "3", "train.seed": "[", "train.batch_size": "1000"}, world_size=3)
    starts = sorted(fault.split(":")[0] for fault in error.value.faults)
    assert starts == sorted(
        [
            "--steps",  # no section
            "--train.seed=[",  # no YAML
            "data.train",  # a number
            "data.lanes",  # does not divide the batch
            "data.lanes",  # cannot be shared by three ranks
            "method.nmae",  # misspelt
            "method.operators.1",  # no such operator
            "optim.lr",  # a word
            "tokenizer.path",  # missing
            "train.micro_batch_size",  # does not divide the batch
            "train.steps",  # true is no number
            "train.deepspeed",  # a derived key
        ]
    ), str(error.value)


def test_nothing_is_said_about_defaults_in_the_place_of_faulty_settings() -> None:
    # with the default of 10,000 steps a merge every 20,000 would be a fault; the number of steps is unknown here
    assert len(faults_of(tree(train={"steps": "many"}, method={"merge_every": 20_000}))) == 1
    assert len(faults_of(tree(train={"stepss": 90_000}, method={"merge_every": 20_000}))) == 1
    assert len(faults_of(tree(method={"merge_every": 20_000}))) == 1


def test_one_line_for_a_setting_of_two_types() -> None:
    assert faults_of(tree(data={"train": 3})) == [
        "data.train: got 3; input should be a source, or a list of sources or of records such as {source: ..., "
        "weight: 0.7, name: web} (source or sources of training text; records are mixed by their weights)"
    ]


@pytest.mark.parametrize("operators", ["[7]", "[1, 7]", "[7, 7]"])
def test_an_operator_that_is_drawn_anew_may_follow_itself(operators: str) -> None:
    config = load_config("configs/run/tiny_remora.yaml", {"method.operators": operators})
    assert config.method.cycle == tuple(json.loads(operators))


@pytest.mark.parametrize(
    ("overrides", "steps", "epochs", "warmup"),
    [
        ({}, 10_000, 3, 1000),  # as long as the text has not been counted
        ({"train.epochs": "2"}, 10_000, 2, 1000),
        ({"train.steps": "300"}, 300, None, 9),
        ({"train.tokens": "1e8"}, 1526, None, 46),
        ({"train.steps": "300", "optim.warmup_steps": "4"}, 300, None, 4),
    ],
)
def test_the_command_line_gives_the_length_in_its_own_way(
    overrides: dict[str, str], steps: int, epochs: float | None, warmup: int
) -> None:
    config = load_config(ROOT / "configs/task/math.yaml", overrides, defaults=FINETUNING)
    assert (config.train.steps, config.train.epochs, config.optim.warmup_steps) == (steps, epochs, warmup)


def test_two_lengths_on_one_command_line_are_a_fault() -> None:
    with pytest.raises(ConfigError, match=r"train\.tokens and train\.epochs are set"):
        load_config(ROOT / "configs/task/math.yaml", {"train.tokens": "1e6", "train.epochs": "2"})


def test_the_length_of_a_run_is_given_in_steps_or_tokens_or_epochs() -> None:
    settings = tree(
        train={"steps": None, "tokens": 1e6, "batch_size": 8, "micro_batch_size": 8}, method={"name": "mora"}
    )
    settings["optim"] = {"warmup_steps": 10}
    config = validate(settings, "the test")
    assert config.train.steps == 245 and config.tokens_per_step * 245 >= 1_000_000 > config.tokens_per_step * 244
    assert validate(parse_yaml(dump(config)), "the test") == config  # the same once more, now in steps
    (fault,) = faults_of(tree(train={"tokens": 1e12, "steps": 100}))
    assert fault.startswith("train.tokens: ") and "given once" in fault and "train.steps" in fault
    settings["train"] = {"run_dir": "r", "epochs": 2.5, "batch_size": 8, "micro_batch_size": 8}
    settings["method"] = {"name": "remora", "merge_every": 50_000}  # no fault: how many steps there are is not known
    config = validate(settings, "the test")
    with pytest.raises(ConfigError, match=r"method\.merge_every: 50000 means no merge in a run of 62 steps"):
        with_epochs(config, 100_001, world_size=1)
    assert with_epochs(config, 10**9, world_size=1).train.steps == 610_352


def test_the_warmup_is_given_in_steps_or_as_a_fraction_of_the_run() -> None:
    method = {"name": "mora"}
    for train, steps in (({"steps": 200}, 20), ({"tokens": 300 * 1024 * 512}, 30)):
        config = validate(tree(train=train, method=method, optim={"warmup_fraction": 0.1}), "the test")
        assert (config.optim.warmup_steps, config.optim.warmup_fraction) == (steps, None)
        assert validate(parse_yaml(dump(config)), "the test").optim == config.optim
        assert config.optim.model_fields_set == {"warmup_fraction"}
    counted = validate(tree(train={"epochs": 2}, method=method, optim={"warmup_fraction": 0.1}), "the test")
    config = with_epochs(counted, 40 * 1024 * 512, 1)
    assert (config.train.steps, config.optim.warmup_steps, config.optim.warmup_fraction) == (80, 8, None)
    given = {"warmup_steps": None, "warmup_fraction": 0.0}  # null takes the steps of a file back
    assert validate(tree(method=method, optim=given), "the test").optim.warmup_steps == 0
    (fault,) = faults_of(tree(method=method, optim={"warmup_steps": 3, "warmup_fraction": 0.1}))
    assert "the warmup is given once, and optim.warmup_steps and optim.warmup_fraction are set" in fault
    (fault,) = faults_of(tree(method={"merge_every": 50}, train={"steps": 1000}, optim={"warmup_fraction": 0.1}))
    assert "comes before the warmup ends (step 100)" in fault


def test_the_page_names_every_default_of_fine_tuning() -> None:
    page = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    told: dict[str, Any] = {}
    for row in page[page.index("## Defaults") :].splitlines():
        if row.startswith("| `"):
            names = re.findall(r"`([a-z_.]+)`", row.split("|")[1])
            values = parse_yaml(f"[{row.split('|')[2].replace('`', '')}]")
            told |= zip(names, values if len(values) > 1 else values * len(names), strict=True)
    assert told == {
        f"{section}.{key}": value for section, values in FINETUNING.items() for key, value in values.items()
    }


def test_mixtures_and_sets_of_held_out_text() -> None:
    def record(**given: Any) -> dict[str, Any]:
        return {"source": "data/web/*.jsonl", **given}

    config = validate(tree(data={"train": record(text_column="content")}), "the test")
    assert config.data.is_mixture and [source.label for source in config.data.train_sources] == ["web"]
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
        ({"train": [{"source": "*.json"}]}, "data.train.0.name: *.json gives no name for metrics"),
        ({"train": [{"source": "x/a"}, {"source": "y/a"}]}, "data.train: 2 sources are named a"),
        ({"train": [{"source": "x", "weight": 0}]}, "data.train: all weights are 0"),
        ({"train": [{"source": "o/n:en", "config": "de"}]}, "data.train.0.config: de, and the source o/n:en names en"),
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
            "data.stages.1.from_step: 5 is not after the stage before it",
        ),
        (
            {"train": MIXTURE, "stages": [{"from_step": 10**7, "weights": {"a": 1, "b": 1}}]},
            "data.stages.0.from_step: 10000000 is never reached",
        ),
        ({"train": "x/a", "concatenate": True}, "data.concatenate: it is for a list of records"),
        (
            {"train": [{"source": "x/a", "weight": 2}, {"source": "x/b"}], "concatenate": True},
            "data.train.0.weight: 2.0 is for the sources of a mixture, and data.concatenate makes them one text",
        ),
        (
            {"train": [{"source": "x/a"}, {"source": "x/b", "records": {"kind": "question"}}], "concatenate": True},
            "data.packing: sources of text and of records become sequences in different ways",
        ),
        (
            {
                "train": [{"source": "x/a"}, {"source": "x/b", "records": {"kind": "text", "too_long": "drop"}}],
                "concatenate": True,
                "packing": "whole",
            },
            "data.concatenate: sources of plain text have different records.too_long",
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
        ({"validation": {"a": {"source": "o/n::x", "split": "y"}}}, "data.validation.a.0.split: y, and the source"),
        ({"validation": {"source": "x", "weight": 0.5}}, "data.validation.0.weight: 0.5 is for the sources of a mix"),
        ({"validation": [{"source": "x", "name": "a"}]}, "data.validation.0.name: a is for the sources of a mix"),
    ],
)
def test_mixtures_that_cannot_be(data: dict[str, Any], says: str) -> None:
    (fault,) = faults_of(tree(data=data))
    assert fault.startswith(says), fault


COMBINATIONS: list[tuple[dict[str, dict[str, Any]], int | None, str]] = [
    ({"method": {"target_modules": ["q_proj", "qq_proj"]}}, None, "method.target_modules: qq_proj is not a linear"),
    ({"method": {"target_modules": ["q_proj", "q_proj"]}}, None, "method.target_modules: a name stands there twice"),
    (
        {"method": {"square_size": 100, "square_multiple": 8}},
        None,
        "method.square_size: 100 is no multiple of method.square_multiple 8",
    ),
    (
        {"method": {"square_size": 101, "operators": [1, 6]}},
        None,
        "method.square_size: operator 6 needs an even size, got 101; take 100",
    ),
    ({"model": {"adapter": "a"}}, None, "model.adapter: an adapter belongs to a trained model"),
    (
        {"model": {"adapter": "a", "init_from": "b"}, "method": {"name": "full"}},
        None,
        "model.adapter: full has no adapters",
    ),
    ({"method": {"operators": [1, 6]}}, None, "method.square_multiple: operator 6 needs an even R"),
    ({"method": {"name": "mora", "operators": [6], "square_multiple": 3}}, None, "set method.square_multiple=6"),
    (
        {"train": {"deepspeed": {"zero_optimization": 3}}},
        None,
        "train.deepspeed: zero_optimization is 3, expected its keys",
    ),
    (
        {"train": {"deepspeed": {"zero_optimization": {"offload_optimizer": {}}}}},
        None,
        "zero_optimization.offload_optimizer: not supported here",
    ),
    ({"train": {"deepspeed": {"torch_autocast": {"enabled": True}}}}, None, "torch_autocast: not supported here"),
    ({"train": {"allow_changes": ["optim.lrr"]}}, None, "train.allow_changes: optim.lrr: no such setting"),
    (
        {"data": {"document_mask": True}, "model": {"attention": "flash_attention_2"}},
        None,
        "flash_attention_2 takes no mask",
    ),
    ({"model": {"compile": True}, "train": {"zero_stage": 3}}, None, "use train.zero_stage=2, or leave it at auto"),
    ({"method": {"operators": [1]}}, None, "method.operators: the cycle [1] repeats an operator"),
    ({"method": {"operators": [1, 1]}}, None, "method.operators: the cycle [1, 1] repeats an operator"),
    ({"method": {"operators": [1, 2, 1]}}, None, "method.operators: the cycle [1, 2, 1] repeats an operator"),
    ({"method": {"reset": "magnitude", "reset_ratio": 0.0}}, None, "method.reset_ratio: 0 with method.reset=magnitude"),
    ({"method": {"reset": "random", "reset_ratio": 0.0}}, None, "method.reset_ratio: 0 with method.reset=random"),
    ({"method": {"rank_pattern": {"down": 4}}}, None, "method.rank_pattern: down is none of method.target_modules"),
    (
        {"method": {"rank_pattern": {"up_proj": 4}, "square_size": 8}},
        None,
        "ranks change nothing with method.square_size",
    ),
    ({"method": {"name": "relora", "reset": "carry"}}, None, "and relora has none; use method.reset=full"),
    ({"method": {"operators": [2, 6], "reset": "carry", "square_multiple": 2}}, None, "and 6 rotates them"),
    *(
        (
            {"method": {"reset": reset}, "optim": {"matrices": "galore"}},
            None,
            f"method.reset: {reset} changes moments element by element, and those of galore are not of elements; "
            "use method.reset=full or none",
        )
        for reset in ("magnitude", "random", "carry")
    ),
    (
        {"method": {"merge_every": 999}},
        None,
        "method.merge_every: the first merge (step 999) comes before the warmup ends (step 1000)",
    ),
    (
        {"method": {"merge_every": 40}, "optim": {"warmup_steps": 10}},
        None,
        "fewer than optim.restart_warmup_steps (50)",
    ),
    (
        {"method": {"merge_every": 10_000}},
        None,
        "method.merge_every: 10000 means no merge in a run of 10000 steps; lower it, or use method.name=mora",
    ),
    ({"method": {"name": "relora", "merge_every": 10_000}}, None, "use method.name=lora"),
    (
        {"method": {"merge_until_step": 1999}},
        None,
        "method.merge_until_step: 1999 comes before the first merge (step 2000); raise it, or use method.name=mora",
    ),
    (
        {"method": {"name": "full"}, "optim": {"warmup_steps": 10_000}},
        None,
        "optim.warmup_steps: 10000 warmup steps leave nothing",
    ),
    ({"optim": {"decay_steps": 100}}, None, "optim.decay_steps: only the schedule wsd has it, got cosine"),
    (
        {"optim": {"schedule": "wsd", "decay_steps": 9001}},
        None,
        "optim.decay_steps: 9001 steps of decay and 1000 of warmup are longer",
    ),
    ({"data": {"lanes": 48}}, None, "data.lanes: every global batch takes as many sequences from each lane"),
    ({"train": {"micro_batch_size": 3}}, None, "train.micro_batch_size: 3 does not divide train.batch_size 1024"),
    ({"train": {"batch_size": 48}}, 6, "train.batch_size: 48 is no multiple of train.micro_batch_size 16 x 6 ranks"),
    (
        {"train": {"batch_size": 96, "micro_batch_size": 2}},
        6,
        "data.lanes: 32 lanes cannot be shared evenly by 6 ranks; set data.lanes=48, a multiple of 6 that divides",
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
def test_combination_that_cannot_work(
    sections_given: dict[str, dict[str, Any]], world_size: int | None, message: str
) -> None:
    found = faults_of(tree(**sections_given), world_size)
    assert any(message in fault for fault in found), found
    assert all(fault.split(":")[0] in SETTINGS for fault in found)


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
        {"optim": {"schedule": "wsd", "decay_steps": 9000}},
        {"data": {"lanes": 1024}},
        {"train": {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 1}, "comms_logger": {"enabled": True}}}},
    ],
    ids=str,
)
def test_combination_at_the_border_that_works(sections_given: dict[str, dict[str, Any]]) -> None:
    config = validate(tree(**sections_given), "the test", world_size=2)
    given = {(section, key): value for section, settings in sections_given.items() for key, value in settings.items()}
    assert {place: getattr(getattr(config, place[0]), place[1]) for place in given} == given


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "steps", 0),
        ("train", "steps", 1.0),
        ("train", "steps", True),
        ("train", "zero_stage", 4),
        ("train", "run_dir", ""),
        ("train", "run_dir", "a\0b"),
        ("data", "validation", ["a\0b"]),
        ("train", "precision", "fp16"),
        ("optim", "lr", 0),
        ("optim", "lr", float("nan")),
        ("optim", "betas", [0.9, 1.0]),
        ("optim", "betas", [0.9]),
        ("optim", "min_ratio", 1.1),
        ("data", "train", []),
        ("data", "train", [""]),
        ("data", "sequence_length", 1),
        ("data", "timeout_seconds", float("inf")),
        ("method", "operators", []),
        ("method", "operators", [5]),
        ("method", "name", "galore"),
        ("optim", "matrices", "adafactor"),
        ("optim", "projection_rank", 0),
        ("optim", "projection_every", 0),
        ("optim", "projection_scale", 0.0),
        ("optim", "projection_scale", float("nan")),
        ("log", "tensorboard", "yes"),
    ],
)
def test_values_out_of_range(section: str, key: str, value: Any) -> None:
    found = faults_of(tree(**{section: {key: value}}))
    assert [fault for fault in found if fault.startswith(f"{section}.{key}")], found


def test_settings_of_other_methods_are_named() -> None:
    assert unused_settings(validate(tree(method={"name": "full", "rank": 8}, optim={"rewarm": "linears"}), "t")) == [
        "method.rank",
        "optim.rewarm",
    ]
    assert unused_settings(validate(tree(method={"name": "remora", "lora_alpha": 8.0}), "t")) == ["method.lora_alpha"]
    assert unused_settings(validate(tree(optim={"momentum": 0.9}), "t")) == ["optim.momentum"]
    assert unused_settings(validate(tree(optim={"matrices": "muon", "nesterov": False}), "t")) == []
    assert unused_settings(validate(tree(optim={"matrices": "muon", "projection_scale": 0.5}), "t")) == [
        "optim.projection_scale"
    ]
    assert unused_settings(validate(tree(optim={"matrices": "apollo", "projection_scale": 0.5}), "t")) == []
    assert unused_settings(validate(tree(), "t")) == []


def test_derived_quantities() -> None:
    config = validate(tree(train={"batch_size": 96, "micro_batch_size": 4}), "t")
    assert (config.tokens_per_step, config.lanes, config.accumulation_steps(3)) == (96 * 512, 32, 8)
    assert validate(tree(data={"lanes": 12}, train={"batch_size": 96}), "t").lanes == 12


def test_paths_are_found_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "m.json").write_text("{}")
    (folder / "run.yaml").write_text(yaml.safe_dump(tree()))
    config = load_config("runs/run.yaml")
    assert (config.model.config, config.tokenizer.path) == ("runs/m.json", "t")
    (tmp_path / "m.json").write_text("{}")
    assert load_config("runs/run.yaml").model.config == "m.json"


@pytest.mark.parametrize("text", [None, "- a", "3", "a: [", "\x00"])
def test_files_that_are_no_settings(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert len(error.value.faults) == 1
    assert str(path) in str(error.value)


def test_a_pattern_without_quotes_of_its_own_says_how_to_give_it(tmp_path: Path) -> None:
    """The shell has taken one pair; for YAML a star begins an alias."""
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(ConfigError, match=re.escape("""give text with special characters as --data.train='"..."'""")):
        load_config(tmp_path / "run.yaml", {"data.train": "*.json.gz"})


def test_overrides_below_a_value_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree()))
    with pytest.raises(ConfigError, match="which has no keys below it"):
        load_config(path, {"train.run_dir.x": "3"})
    config = load_config(
        path, {"model.overrides.hidden_size": "64", "train.deepspeed.zero_optimization.reduce_bucket_size": "5"}
    )
    assert config.model.overrides == {"hidden_size": 64}
    assert config.train.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5}}


def test_settings_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_page(), "run: python -m relora_mora.config.table > docs/settings.md"
    assert all(f"`{name}`" in page for name in SETTINGS)
