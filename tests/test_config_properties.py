"""Any file and any override gives settings or a list of faults, never another exception."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from relora_mora.config import Config, ConfigError, dump, load_config, parse_yaml, validate
from tests.config_tools import SECTIONS, SETTINGS, same, tree

many = settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

words = st.text(max_size=12)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, 2**63, -(10**400), 10**400])
    | st.floats()
    | words
    | st.sampled_from(["4e-4", "remora", "bf16", "-", "\0", "x" * 5000, "~", "1_0", ".inf", "2026-11-24", "yes", "0x10", "=", "<<"])
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=3), max_leaves=6)
plausible = (
    st.integers(0, 4096) | st.floats(0, 1) | st.sampled_from(["full", "mora", "remora", "wsd", "magnitude", [1, 2], [6], ["q_proj"]])
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
@given(changes=sections, wrong=broken, world_size=st.none() | st.integers(1, 9), complete=st.booleans())
def test_any_tree_gives_settings_or_faults(changes: dict[str, Any], wrong: dict[str, Any], world_size: int | None, complete: bool) -> None:
    given_tree = tree() if complete else {}
    for name, value in changes.items():
        section, key = name.split(".")
        given_tree.setdefault(section, {})[key] = value
    given_tree |= wrong
    config = check_outcome(lambda: validate(given_tree, "the test", world_size=world_size))
    if config is not None:
        again = validate(parse_yaml(dump(config)), "its own dump", world_size=world_size)
        assert same(again.model_dump(), config.model_dump())


@many
@given(
    content=st.binary(max_size=60)
    | (st.text() | st.text(alphabet="ab:-[]{}&*!|>'\"#%@,?~ \n\t01.e") | values.map(lambda value: yaml.safe_dump(value))).map(
        lambda text: text.encode("utf-8", "surrogatepass")
    )
)
def test_any_file_gives_settings_or_faults(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    check_outcome(lambda: load_config(path))


@many
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


awkward = st.sampled_from(["4e-4", "1e5", "08", "1_000", "yes", "2026-11-24", "~", "-.inf", "null", "0o7", "="])


@settings(many, max_examples=300)
@given(texts=st.lists(st.text(min_size=1, max_size=20) | awkward, min_size=2, max_size=12))
def test_texts_survive_a_dump(texts: list[str]) -> None:
    config = validate(tree(data={"train": f"x{texts[0]}", "validation": texts}, train={"run_dir": texts[1]}), "the test")
    assert validate(parse_yaml(dump(config)), "its own dump") == config
