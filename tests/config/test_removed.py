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


def test_an_element_of_a_list_counts(monkeypatch):
    monkeypatch.setitem(removed.REMOVED, "method.operators=4", "use 1")
    assert set(removed.without_removed({"method": {"operators": [1, 4]}})[1]) == {"method.operators"}
    assert removed.without_removed({"method": {"operators": [1, 2]}, "optim": None})[1] == {}


def test_settings_of_a_checkpoint_of_02_are_read_if_it_did_not_use_what_is_gone():
    config = validate(tree(), "the test")
    stored: dict[str, Any] = config.model_dump(mode="json")
    places = [(name, *name.split("."), default) for name, default in removed.OLD_DEFAULTS.items()]
    for _, section, setting, default in places:
        stored[section][setting] = default
    assert stored_config(stored, "here") == config
    for name, section, setting, default in places:
        stored[section][setting] = 0.5
        with pytest.raises(ConfigError, match=rf"1 fault in here:\n  - {name}: "):
            stored_config(stored, "here")
        stored[section][setting] = default
