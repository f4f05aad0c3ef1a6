"""The records of methods and operators name what exists, and reading the settings needs nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from pkgutil import resolve_name

import pytest
import torch

from relora_mora.adapters.inject import layer_class
from relora_mora.adapters.layers import AdapterLinear
from relora_mora.config.optim import OptimConfig
from relora_mora.config.registry import MATRIX_OPTIMIZERS, METHODS, OPERATORS, MatrixOptimizer
from relora_mora.config.schema import Config, MethodConfig
from relora_mora.kernels import grouping
from relora_mora.operators import Operator
from relora_mora.optim.groups import matrix_rules
from relora_mora.optim.rules import MatrixRule, PairRule, new_state
from tests.tools.helpers import ROOT

OF_WHOLE_MATRICES = (
    "muon",
    "polar_muon",
    "normuon",
    "galore",
    "fira",
    "apollo",
    "apollo_mini",
    "sumo",
)  # one that goes element by element may cost and keep nothing


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_its_layer_and_settings_that_exist(name):
    method = MethodConfig(name=name)
    assert method.record.name == name
    if method.uses_adapters:
        assert issubclass(layer_class(method), AdapterLinear)
    for setting in method.record.settings:
        section, key = setting.split(".")
        assert key in Config.model_fields[section].annotation.model_fields


@pytest.mark.parametrize("mora_type", OPERATORS)
def test_an_operator_names_its_code_and_groupings(mora_type):
    record = OPERATORS[mora_type]
    assert issubclass(resolve_name(record.code), Operator)
    assert all(callable(getattr(grouping, name)) for name in record.groupings)


def test_the_optimizer_that_contributing_adds_is_one(monkeypatch, tmp_path):
    """Its code is taken from the page, as a reader would take it."""
    diffs = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    [module] = [diff for diff in diffs if diff.startswith("+++ relora_mora/optim/signum.py\n")]
    [record] = [diff for diff in diffs if 'MatrixOptimizer("signum"' in diff]
    (tmp_path / "signum.py").write_text("\n".join(line[1:] for line in module.splitlines()[1:]))
    monkeypatch.syspath_prepend(tmp_path)
    [line] = [line[1:].strip(" ,") for line in record.splitlines() if line.startswith("+ ")]
    entry = eval(line.replace("relora_mora.optim.signum", "signum"), {"MatrixOptimizer": MatrixOptimizer})
    rule = resolve_name(entry.rule)(OptimConfig())
    assert all(callable(getattr(rule, name)) for name in vars(MatrixRule) if not name.startswith("_"))
    gradient, moments = torch.tensor([[2.0, -3.0]]), {name: torch.zeros(1, 2) for name in entry.moments}
    rule.update_moments(gradient, moments)
    assert rule.update(gradient[None], []).tolist() == [[[1.0, -1.0]]]
    assert {setting.removeprefix("optim.") for setting in entry.settings} <= OptimConfig.model_fields.keys()


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_an_optimizer_of_matrices_names_its_rule_and_settings_that_exist(name):
    optim = OptimConfig(matrices=name)
    record = optim.of_group("adapters")
    assert record.name == name
    single = optim.of_group("linears")
    assert single.name == (record.of_single or name)
    assert single.moments == record.moments  # a checkpoint does not tell the two groups apart
    assert record.title
    assert {setting.removeprefix("optim.") for setting in record.settings} <= OptimConfig.model_fields.keys()
    rule = matrix_rules(optim).get("adapters")
    assert isinstance(rule, PairRule) == (single is not record)
    if rule is None or isinstance(rule, PairRule):
        return  # tests/optim/test_lora_muon.py has the other
    moments = {key: torch.zeros(6, 9) for key in record.moments}
    gradient = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    state = new_state(0, rule.state_shapes(6, 9))
    rule.update_moments(gradient, moments)
    assert rule.update(gradient[None], [state]).shape == (1, 6, 9)
    assert all(moment.any() for moment in {**moments, **state.tensors}.values())
    if name in OF_WHOLE_MATRICES:
        assert moments or state.tensors
        assert rule.flops(6, 9) > 0
        assert rule.workspace_bytes(6, 9, on_gpu=False) > 0


@pytest.mark.parametrize(
    "name,adapters,squares,merges,cycle,without_merges",
    [
        ("full", False, False, False, (), "full"),
        ("lora", True, False, False, (), "lora"),
        ("mora", True, True, False, (3,), "mora"),
        ("relora", True, False, True, (), "lora"),
        ("remora", True, True, True, (3, 1), "mora"),
    ],
)
def test_what_follows_from_a_record(name, adapters, squares, merges, cycle, without_merges):
    method = MethodConfig(name=name, operators=[3, 1])
    assert (method.uses_adapters, method.uses_squares, method.merges) == (adapters, squares, merges)
    assert method.cycle == cycle
    assert method.record.without_merges == without_merges


def test_settings_are_read_without_torch():
    code = (
        "import relora_mora.config.load, sys; print(sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
