"""Settings and values of release 0.2 that are gone are refused by name, with what replaces them."""

from typing import Any

import pytest

from relora_mora.config import removed
from relora_mora.config.load import ConfigError, stored_config, validate
from relora_mora.config.schema import SETTINGS
from tests.tools.config_tools import faults_of, tree
from tests.tools.each import each


@each("key", removed.REMOVED)
def test_each_is_refused_with_one_line(key):
    name, _, value = key.partition("=")
    section, _, setting = name.partition(".")
    [fault] = faults_of(tree(**{section: {setting: value or 3}}))
    assert fault == f"{name}: only release 0.2 has {value or 'this setting'}; {removed.REMOVED[key]}"


def test_the_table_names_what_is_not_there():
    for key in removed.REMOVED:
        name, is_value, _ = key.partition("=")
        assert (name in SETTINGS) == bool(is_value), key
    assert set(removed.OLD_DEFAULTS) <= set(removed.REMOVED)


def test_an_element_of_a_list_and_a_setting_of_a_source_count(monkeypatch):
    monkeypatch.setitem(removed.REMOVED, "method.operators=4", "use 1")
    sources = [{"source": "a"}, {"source": "b", "max_epochs": 2}]
    given = {"method": {"operators": [1, 4]}, "data": {"train": sources}, "optim": {"rule": {"projection_rank": 1}}}
    left, faults = removed.without_removed(given)
    assert set(faults) == {"method.operators", "data.train.1.max_epochs"}
    assert left == {"method": {}, "data": {"train": [sources[0], {"source": "b"}]}, "optim": given["optim"]}
    assert removed.without_removed({"method": {"operators": [1, 2]}, "optim": None})[1] == {}


def test_settings_of_a_checkpoint_of_02_are_read_if_it_did_not_use_what_is_gone():
    config = validate(tree(data={"train": [{"source": "a"}, {"source": "b"}]}), "the test")
    stored: dict[str, Any] = config.model_dump(mode="json")
    stored["data"]["train"] = [{**source, "max_epochs": None} for source in stored["data"]["train"]]
    places = [(name, *name.split("."), default) for name, default in removed.OLD_DEFAULTS.items()]
    for _, section, setting, default in places:
        stored[section][setting] = default
    assert stored_config(stored, "here") == config
    for name, section, setting, default in places:
        stored[section][setting] = 0.5
        with pytest.raises(ConfigError, match=rf"1 fault in here:\n  - {name}: "):
            stored_config(stored, "here")
        stored[section][setting] = default
