"""The content of a settings file, and the meaning of its paths and patterns."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from relora_mora.config.load import ConfigError, load_config
from relora_mora.config.yaml_text import parse_yaml
from tests.tools.config_tools import same, settings_file
from tests.tools.each import each


@each(
    "text,value",
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
        ("<<: {a: 1}\nb: =", {"<<": {"a": 1}, "b": "="}),  # YAML 1.2 has no merge keys
        ("{a: 1, b:, 'c:d': , e: null}", {"a": 1, "b": None, "c:d": None, "e": None}),
    ],
)
def test_numbers_are_read_as_in_yaml_1_2(text: str, value: Any) -> None:
    assert same(parse_yaml(text), value)


@each(
    "text",
    [
        *("a: 1\na: 2", "1: 2", "{[a]: 1}", "a: &x [*x]", "a: [", "a: {{b}}"),
        *("!!python/object:os.system {}", "a: !!binary aGk=", "!!set {a}", "!!timestamp 2026-11-24"),
        *("!!timestamp maybe", "!!bool maybe", "!!map text", "!!int {a: 1}", "9" * 5000, "#" * (1 << 23)),
    ],
)
def test_unsupported_yaml_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


def test_paths_are_found_next_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    folder.mkdir()
    for name in ("m.json", "t.jinja", "r.py"):
        (folder / name).write_text("{}")
    records = {"kind": "messages", "template": "t.jinja"}
    source = {"source": "m.json", "records": {**records, "template": "other.jinja"}}
    settings_file(folder, data={"train": source, "records": records}, optim={"matrices": "r.py:Rule"})
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config("runs/run.yaml", {"train.resume": "~/other", "model.init_from": "~/m"})
    assert (config.train.resume, config.model.init_from) == ("/home/me/other", "/home/me/m")
    assert (config.model.config, config.tokenizer.path) == ("runs/m.json", "t")
    assert (config.data.records.template, config.optim.matrices) == ("runs/t.jinja", "runs/r.py:Rule")
    assert (config.data.train[0].source, config.data.train[0].records.template) == ("m.json", "other.jinja")
    (tmp_path / "m.json").write_text("{}")
    assert load_config("runs/run.yaml").model.config == "m.json"


@each("text", ["- a", "3", "a: [", "\x00"])
def test_files_that_are_not_settings(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"1 fault in {path}"):
        load_config(path)


def test_overrides_that_are_not_yaml_or_below_a_value_are_refused(tmp_path: Path) -> None:
    path = settings_file(tmp_path)
    for overrides, message in (
        ({"data.train": "*.json.gz"}, """give text with special characters as --data.train='"..."'"""),  # an alias
        ({"train.run_dir.x": "3"}, "so it has no keys"),
        ({"data.train": "x", "data.train.0.weight": "3"}, "data.train is 'x' in the file, so it has no keys"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_config(path, overrides)
    config = load_config(
        path, {"model.overrides.hidden_size": "64", "train.deepspeed.zero_optimization.reduce_bucket_size": "5"}
    )
    assert config.model.overrides == {"hidden_size": 64}
    assert config.train.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5}}


def test_text_after_a_hash_is_not_dropped_silently(tmp_path: Path) -> None:
    path = settings_file(tmp_path)
    for given, read in (("run #2", "run #2"), ('"run #2"', "run #2"), ("run#2 ", "run#2"), (">-\n  run #2", "run #2")):
        assert load_config(path, {"train.run_dir": given}).train.run_dir == read
