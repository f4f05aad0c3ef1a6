"""Settings and values of release 0.2 that are gone are refused by name, with what replaces them."""

from relora_mora.config import removed
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


def test_an_element_of_a_list_and_a_setting_of_a_source_count():
    sources = [{"source": "a"}, {"source": "b", "max_epochs": 2}]
    given = tree(
        method={"operators": [1, 7]},
        data={"train": sources},
        optim={"rule": {"projection_rank": 1}, "matrices": "galore"},
    )
    assert faults_of(given) == [
        f"data.train.1.max_epochs: only release 0.2 has this setting; {removed.REMOVED['data.max_epochs']}",
        f"method.operators.1: only release 0.2 has 7; {removed.REMOVED['method.operators=7']}",
        f"optim.matrices: only release 0.2 has galore; {removed.REMOVED['optim.matrices=galore']}",
    ]
