"""The sparse part of SLTrain: where its values are, and how they begin."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from relora_mora.adapters.inject import inject, replace_linears
from relora_mora.adapters.layers import adapter_layers
from relora_mora.adapters.sltrain import SLTrainLinear, support, values_per_row
from relora_mora.config.load import ConfigError
from relora_mora.config.optim import OptimConfig
from relora_mora.config.schema import MethodConfig
from relora_mora.model.llama import empty_model
from relora_mora.optim.groups import parameter_groups, set_trainable
from relora_mora.sizing.fit import check_adapters
from tests.tools.tiny import tiny_llama

CPU = torch.device("cpu")


def layer_of(inputs: int, outputs: int, seed: int, density: float = 0.03) -> SLTrainLinear:
    linear = nn.Linear(inputs, outputs, bias=False)
    return SLTrainLinear(linear, 2, None, density, torch.Generator().manual_seed(seed))


def mixed(number: int) -> int:
    """The same rule in whole numbers of any size, so nothing can overflow."""
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        number ^= number >> shift
        number = number * factor % 2**32
    return number ^ number >> 15


@pytest.mark.parametrize("rows,row_values,columns", [(1, 1, 1), (3, 5, 5), (7, 3, 10), (40, 21, 688), (2, 3, 2**20)])
@pytest.mark.parametrize("seed", [0, 12345, 2**32 - 1])
def test_the_support_is_one_column_in_each_run_of_a_row(seed, rows, row_values, columns):
    expected = []
    for row in range(rows):
        starts = [index * columns // row_values for index in range(row_values + 1)]
        widths = [end - start for start, end in itertools.pairwise(starts)]
        numbers = [mixed(mixed(row * row_values + index) ^ seed) for index in range(row_values)]
        assert all(widths)
        expected.append(
            [a + number * width // 2**32 for a, number, width in zip(starts, numbers, widths, strict=False)]
        )
    found = support(torch.tensor(seed), (rows, row_values), columns, CPU)
    assert found.tolist() == expected
    assert (found.diff() > 0).all()
    assert found.max() < columns


def test_the_support_is_uniform_and_independent_of_other_layers():
    shape, columns, width = (4000, 8), 256, 32
    first, second = (support(torch.tensor(seed), shape, columns, CPU) for seed in (1, 2))
    for drawn in (first, second):
        counts = drawn.flatten().bincount(minlength=columns).double()
        expected = shape[0] / width
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        freedom = columns - shape[1]
        assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)
    for a, b in ((first, second), (first[1:], first[:-1]), (first[:, 1:] - width, first[:, :-1])):
        equal = float((a == b).double().mean())
        assert abs(equal - 1 / width) < 5 * math.sqrt(1 / width / a.numel())


@pytest.mark.parametrize("density,inputs,row_values", [(0.03, 256, 8), (0.03, 688, 21), (0.001, 256, 1), (1.0, 9, 9)])
def test_the_initial_weight_is_uniform_at_the_support_and_zero_elsewhere(density, inputs, row_values):
    layer = layer_of(inputs, 500, 7, density)
    weight = layer.initial_weight()
    assert values_per_row(density, inputs) == row_values
    places = layer.delta_of(layer.lora_A, layer.lora_B, torch.ones(500, row_values)).detach()
    assert places.sum(1).tolist() == [row_values] * 500
    assert torch.equal(weight != 0, places != 0)
    bound = 1 / math.sqrt(inputs)
    values = weight[weight != 0]
    assert values.abs().max() <= bound
    error = 5 / math.sqrt(len(values))
    assert abs(float(values.mean())) < error * bound
    assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=error)
    assert torch.equal(weight, layer.initial_weight())
    assert not torch.equal(weight, layer_of(inputs, 500, 8, density).initial_weight())


def test_each_layer_of_a_model_has_its_own_support_which_only_the_seed_changes():
    def seeds(seed: int, meta: bool = False) -> list[int]:
        lm = empty_model(tiny_llama())
        with torch.device("meta" if meta else "cpu"):
            inject(lm, MethodConfig(name="sltrain", rank=2), seed=seed)
        return [int(layer.support_seed) for _, layer in adapter_layers(lm) if isinstance(layer, SLTrainLinear)]

    assert len(set(seeds(0) + seeds(1))) == 2 * len(seeds(0)) > 0
    assert seeds(0) == seeds(0, meta=True)


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_adamw_trains_the_values_at_the_rate_of_adapters(matrices):
    lm = empty_model(tiny_llama())
    method = MethodConfig(name="sltrain", rank=2)
    inject(lm, method, seed=0)
    set_trainable(lm, method)
    optim = OptimConfig(matrices=matrices, lr=1.0, lr_other=2.0, rewarm="adapters")
    groups = {group.name: group for group in parameter_groups(lm, optim)}
    kinds = {name: {key.rpartition(".")[2] for key in group.parameters} for name, group in groups.items()}
    assert kinds["adapters"] == {"lora_A", "lora_B"}
    assert kinds["values"] == {"sparse_values"}
    assert groups["values"].moments == ("exp_avg", "exp_avg_sq")
    assert (groups["values"].peak_lr, groups["embeddings"].peak_lr) == (1.0, 2.0)


def test_compiled_layers_of_one_shape_share_a_program():
    """The seed of the support is data of the program, not a constant in it."""
    layers = nn.ModuleDict({"a": nn.Linear(12, 20, bias=False), "b": nn.Linear(12, 20, bias=False)})
    replaced = replace_linears(layers, ["a", "b"], MethodConfig(name="sltrain", rank=2, form="merged"), seed=0)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(5, 12, requires_grad=True)
    for layer in replaced.values():
        assert isinstance(layer, SLTrainLinear)
        nn.init.normal_(layer.sparse_values)
        compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=False)
        gradients = [
            torch.autograd.grad(each(x).square().sum(), [x, layer.sparse_values]) for each in (layer, compiled)
        ]
        for plain, other in zip(*gradients, strict=True):
            torch.testing.assert_close(plain, other)
    assert counter.frame_count == 1


def test_more_values_than_the_weights_have_are_refused_with_both_settings():
    with pytest.raises(ConfigError, match=r"lower it or method\.sparse_density, or use method\.name=full"):
        check_adapters(tiny_llama(), MethodConfig(name="sltrain", rank=2, sparse_density=1.0))
