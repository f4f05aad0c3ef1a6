"""The records of methods and operators name what exists, and reading the settings needs nothing else."""

from __future__ import annotations

import subprocess
import sys
from pkgutil import resolve_name

import torch

from relora_mora.adapters.inject import layer_class
from relora_mora.adapters.layers import AdapterLinear
from relora_mora.config.optim import OptimConfig
from relora_mora.config.registry import MATRIX_OPTIMIZERS, METHODS, OPERATORS, split_rule
from relora_mora.config.schema import SETTINGS, MethodConfig
from relora_mora.kernels import grouping
from relora_mora.operators import Operator
from relora_mora.optim.groups import matrix_rules
from relora_mora.optim.rules import MatrixState, shapes_of
from tests.tools.each import each


@each("name", METHODS)
def test_a_method_names_its_layer_and_settings_that_exist(name):
    method = MethodConfig(name=name)
    assert method.record.name == name
    if method.uses_adapters:
        assert issubclass(layer_class(method), AdapterLinear)
    assert set(method.record.settings) <= set(SETTINGS)


def test_an_operator_names_its_code_and_groupings():
    for record in OPERATORS.values():
        assert issubclass(resolve_name(record.code), Operator)
        assert all(callable(getattr(grouping, name)) for name in record.groupings)


@each("name", MATRIX_OPTIMIZERS)
def test_an_optimizer_of_matrices_names_its_rule_and_settings_that_exist(name):
    optim = OptimConfig(matrices=name)
    record = optim.of_group("adapters")
    assert record.name == name
    assert optim.of_group("linears") == record
    assert record.title
    assert set(record.settings) <= set(SETTINGS)
    rule = matrix_rules(optim).get("adapters")
    assert (rule is None) == (name == "adamw")
    if rule is None:
        return
    moments = {key: torch.zeros(6, 9) for key in record.moments}
    gradient = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    state = MatrixState(0, shapes_of(rule, 6, 9))
    rule.update_moments(gradient, moments)
    assert rule.update(gradient, state).shape == (6, 9)
    assert all(moment.any() for moment in {**moments, **state}.values())
    assert rule.workspace_bytes(6, 9, on_gpu=False) > 0


@each("given", ["rule.py:Rule", "a/b c/rule.py:Rule", "/a:b/rule.py:Rule", "package.module:Rule"])
def test_a_rule_of_ones_own_has_a_record(given):
    optim = OptimConfig(matrices=given)
    for group in ("adapters", "linears"):
        record = optim.of_group(group)
        assert (record.name, record.title, record.moments, record.rule) == (given, "Rule", (), given)
        assert set(record.settings) <= set(SETTINGS)
    assert optim.of_group("embeddings").name == optim.of_group("norms").name == "adamw"
    assert split_rule(given) == (given.removesuffix(":Rule"), "Rule")


def test_settings_are_read_without_torch():
    code = (
        "import relora_mora.config.load, sys; print(sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
