"""The records of methods and operators name what exists, and reading the settings needs nothing else."""

from pkgutil import resolve_name

from relora_mora.adapters.inject import layer_class
from relora_mora.adapters.layers import AdapterLinear
from relora_mora.config.optim import OptimConfig
from relora_mora.config.registry import (
    MATRIX_OPTIMIZERS,
    METHODS,
    MUON_SETTINGS,
    OPERATORS,
    RULE_SETTINGS,
    split_rule,
)
from relora_mora.config.schema import SETTINGS, MethodConfig
from relora_mora.kernels import grouping
from relora_mora.operators import Operator
from relora_mora.optim.groups import matrix_rules
from tests.tools.each import each


def test_records_name_code_and_settings_that_exist():
    for name, record in METHODS.items():
        method = MethodConfig(name=name)
        assert method.record is record and record.name == name
        assert not method.uses_adapters or issubclass(layer_class(method), AdapterLinear)
        assert set(record.settings) <= set(SETTINGS)
    for record in OPERATORS.values():
        assert issubclass(resolve_name(record.code), Operator)
        assert all(callable(getattr(grouping, name)) for name in record.groupings)
    assert {*MUON_SETTINGS, *RULE_SETTINGS} <= set(SETTINGS)
    for name, record in MATRIX_OPTIMIZERS.items():
        optim = OptimConfig(matrices=name)
        assert optim.of_group("adapters") == optim.of_group("linears") == record and record.name == name
        assert record.title
        assert ("adapters" in matrix_rules(optim)) == (name != "adamw")


@each("given", ["rule.py:Rule", "a/b c/rule.py:Rule", "/a:b/rule.py:Rule", "package.module:Rule"])
def test_a_rule_of_ones_own_has_a_record(given):
    optim = OptimConfig(matrices=given)
    for group in ("adapters", "linears"):
        record = optim.of_group(group)
        assert (record.name, record.title, record.moments, record.rule) == (given, "Rule", (), given)
    assert optim.of_group("embeddings").name == optim.of_group("norms").name == "adamw"
    assert split_rule(given) == (given.removesuffix(":Rule"), "Rule")
