"""Any file and any override gives settings or a list of faults, never another exception."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from relora_mora.adapters.stored import with_products
from relora_mora.config.load import ConfigError, dump, load_config, validate
from relora_mora.config.schema import Config
from relora_mora.config.yaml_text import parse_yaml
from relora_mora.experiments.planner.cluster import Cluster
from relora_mora.experiments.planner.plan import Plan
from relora_mora.experiments.planner.render import answer, tables
from relora_mora.optim.groups import make_schedule
from relora_mora.system.devices import CPU
from tests.tools.config_tools import SECTIONS, SETTINGS, changed_tree, same, tree
from tests.tools.tiny import tiny_llama

pytestmark = pytest.mark.more

many = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

words = st.text(max_size=12)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, 2**63, -(10**400), 10**400])
    | st.floats()
    | words
    | st.sampled_from(
        ["4e-4", "remora", "bf16", "-", "\0", "x" * 5000, "~", "1_0", ".inf", "2026-11-24", "yes", "0x10", "=", "<<"]
    )
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)
plausible = (
    st.integers(0, 4096)
    | st.floats(0, 1)
    | st.sampled_from(["full", "mora", "remora", "wsd", "magnitude", [1, 2], [6], ["q_proj"]])
)
sections = st.dictionaries(st.sampled_from(SETTINGS), values | plausible, max_size=8)
broken = st.dictionaries(st.sampled_from([*SECTIONS, "trian", "", "data.train"]) | words, values, max_size=3)


def check_outcome(act: Any) -> Config | None:
    """Runs it: the settings, or None after checking that the refusal lists its faults."""
    try:
        config = act()
    except ConfigError as error:
        assert error.faults
        assert all(isinstance(fault, str) and fault.strip() for fault in error.faults)
        assert str(error).count("\n") >= len(error.faults)
        return None
    assert isinstance(config, Config)
    return config


@many
@example(changes={"model.overrides": {"a": math.inf}}, wrong={}, world_size=None, complete=True)
@example(changes={"train.steps": 10**400, "optim.lr": math.nan}, wrong={}, world_size=9, complete=True)
@example(changes={"data.train": "\0", "train.run_dir": "x" * 5000}, wrong={}, world_size=None, complete=True)
@example(changes={"method.operators": [True, None]}, wrong={"trian": {}, "": []}, world_size=3, complete=True)
@example(changes={}, wrong=dict.fromkeys(SECTIONS), world_size=1, complete=False)
@given(changes=sections, wrong=broken, world_size=st.none() | st.integers(1, 9), complete=st.booleans())
def test_any_tree_gives_settings_or_faults(
    changes: dict[str, Any], wrong: dict[str, Any], world_size: int | None, complete: bool
) -> None:
    given_tree = (changed_tree(changes) if complete else {}) | wrong
    config = check_outcome(lambda: validate(given_tree, "the test", world_size=world_size))
    if config is not None:
        again = validate(parse_yaml(dump(config)), "its own dump", world_size=world_size)
        assert same(again.model_dump(), config.model_dump())


@many
@example(content=b"")
@example(content=b"\xff\xfe")
@example(content=b"a: &a [*a]")
@example(content=b"<<: 1")
@example(content=b"? {a: 1}\n: 2")
@example(content=b"a: !!python/object/apply:os.getcwd []")
@example(content="train: \ud800".encode("utf-8", "surrogatepass"))
@given(
    content=st.binary(max_size=60)
    | (
        st.text()
        | st.text(alphabet="ab:-[]{}&*!|>'\"#%@,?~ \n\t01.e")
        | values.map(lambda value: yaml.safe_dump(value))
    ).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_any_file_gives_settings_or_faults(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    check_outcome(lambda: load_config(path))


@many
@example(overrides={"train.steps": "1_0", "optim.lr": ".inf"})
@example(overrides={"data.train": '"\\0"', "data.validation": "[", "train.run_dir": "*a"})
@example(overrides={"": "", "train": "{}", "train.": "1", "train.steps": "2026-11-24"})
@given(
    overrides=st.dictionaries(
        st.sampled_from(SETTINGS) | words | st.tuples(st.sampled_from(SETTINGS), words).map(".".join),
        st.text(max_size=20) | (values | plausible).map(lambda value: yaml.safe_dump(value)),
        max_size=6,
    )
)
def test_any_override_gives_settings_or_faults(tmp_path: Path, overrides: dict[str, str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree()))
    check_outcome(lambda: load_config(path, overrides))


# settings that mostly go together, so that many of them make a run
likely = st.fixed_dictionaries(
    {},
    optional={
        "method.name": st.sampled_from(["full", "lora", "mora", "relora", "remora"]),
        "method.rank": st.integers(1, 64),
        "method.operators": st.lists(st.sampled_from([1, 2, 6]), min_size=1, max_size=3),
        "method.square_size": st.none() | st.integers(1, 80),
        "method.merge_every": st.integers(1, 300),
        "method.form": st.sampled_from(["auto", "merged", "resident", "decoupled"]),
        "method.base": st.sampled_from([None, "int8", "fp8"]),
        "method.target_modules": st.lists(st.sampled_from(["q_proj", "up_proj"]), min_size=1, unique=True),
        "optim.schedule": st.sampled_from(["cosine", "linear", "wsd", "constant"]),
        "optim.warmup_steps": st.integers(0, 50),
        "optim.restart_warmup_steps": st.integers(0, 50),
        "train.steps": st.integers(1, 500),
        "train.zero_stage": st.integers(0, 3),
    },
)


@settings(many, max_examples=20)
@given(changes=likely)
def test_accepted_settings_give_a_plan_or_a_message(changes: dict[str, Any]) -> None:
    config = check_outcome(lambda: validate(changed_tree(changes), "the test", world_size=2))
    if config is None:
        return
    schedule = make_schedule(config.method, config.optim, config.train.steps)
    assert all(schedule.rate(step, rewarm=True) >= 0 for step in (1, config.train.steps))
    method, _ = with_products(config.method, bf16=True, capability=None, vnni=True)
    config = config.model_copy(update={"method": method})
    try:
        plan = Plan(tiny_llama(), config, cluster=Cluster(1, 2, CPU), bf16=True, peak=(1e12, "the test"))
    except ValueError as error:
        assert type(error).__module__.startswith("relora_mora.") or "method." in str(error), error
        assert "; " in str(error), "a remedy"
    else:
        assert plan.parameters.trainable > 0
        assert answer(plan) and tables(plan)


texts_without_nul = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
awkward = st.sampled_from(["4e-4", "1e5", "08", "1_000", "yes", "2026-11-24", "~", "-.inf", "null", "0o7", "="])


@settings(many, max_examples=40)
@given(texts=st.lists(texts_without_nul | awkward, min_size=2, max_size=12))
def test_texts_survive_a_dump(texts: list[str]) -> None:
    config = validate(
        tree(data={"train": f"x{texts[0]}", "validation": texts}, train={"run_dir": texts[1]}), "the test"
    )
    assert validate(parse_yaml(dump(config)), "its own dump") == config
