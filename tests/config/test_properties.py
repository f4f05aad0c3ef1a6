"""Any file and any override gives settings or a list of faults, never another exception."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from relora_mora.config.load import ConfigError, dump, load_config, validate
from relora_mora.config.schema import Config
from relora_mora.config.yaml_text import parse_yaml
from tests.tools.config_tools import SECTIONS, SETTINGS, changed_tree, same, settings_file

pytestmark = pytest.mark.more

slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
many = settings(max_examples=80, deadline=None, suppress_health_check=slow)

words = st.text(max_size=12)
numbers = st.integers() | st.floats() | st.sampled_from([10**30, 2**63, -(10**400), 10**400])
odd = ["4e-4", "remora", "bf16", "-", "\0", "x" * 5000, "~", "1_0", ".inf", "2026-11-24", "yes", "0x10", "=", "<<"]
values = st.recursive(
    st.none() | st.booleans() | numbers | words | st.sampled_from(odd),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
names = ["full", "mora", "remora", "wsd", "magnitude", [1, 2], [6], ["q_proj"]]
plausible = st.integers(0, 4096) | st.floats(0, 1) | st.sampled_from(names)
sections = st.dictionaries(st.sampled_from(SETTINGS), values | plausible, max_size=8)
broken = st.dictionaries(st.sampled_from([*SECTIONS, "trian", "", "data.train"]) | words, values, max_size=3)


def check_outcome(act: Callable[[], Config]) -> Config | None:
    """Runs it: the settings, or None after checking that the refusal lists its faults."""
    try:
        return act()
    except ConfigError as error:
        assert error.faults and all(fault.strip() for fault in error.faults)
        return None


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
    path = settings_file(tmp_path)
    check_outcome(lambda: load_config(path, overrides))
