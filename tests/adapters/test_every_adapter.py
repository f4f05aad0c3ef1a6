"""The contract that every adapter of the registry must keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from relora_mora.adapters.inject import inject, layer_class
from relora_mora.adapters.layers import AdapterLinear
from relora_mora.adapters.lora import LoRALinear
from relora_mora.config.registry import METHODS
from relora_mora.config.schema import MethodConfig
from relora_mora.model.causal import empty_model
from tests.tools.each import each
from tests.tools.tiny import tiny_llama

ADAPTERS = [method.name for method in METHODS.values() if method.adapter is not None]
INPUTS = 12
OUTPUTS = 20
ROWS = 5


def layer_of(name: str) -> AdapterLinear:
    """A merged layer in float64 with random values instead of initial ones."""
    torch.manual_seed(0)
    linear = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.float64)
    method = MethodConfig(name=name, rank=3, form="merged")
    layer = layer_class(method)(linear, method, torch.Generator().manual_seed(1))
    for key in layer.adapter_names:
        nn.init.normal_(layer.get_parameter(key), std=0.3)
    return layer


def values_of(layer: AdapterLinear) -> list[torch.Tensor]:
    return [layer.get_parameter(key).detach() for key in layer.adapter_names]


@each("name", ADAPTERS)
def test_singular_values_and_lora_factors_match_the_delta(name: str) -> None:
    layer = layer_of(name)
    delta = layer.delta_of(*values_of(layer))
    actual = layer.singular_values(*values_of(layer))
    expected = torch.linalg.svdvals(delta)
    torch.testing.assert_close(actual, expected[: len(actual)])
    assert (expected[len(actual) :] < 1e-12).all()
    A, B = layer.as_lora(*values_of(layer))  # alpha is r
    torch.testing.assert_close(B @ A, delta)


@each("name", ADAPTERS)
def test_it_starts_with_a_delta_of_zero_even_if_the_weight_has_no_values_yet(name: str) -> None:
    """A run adds the adapters to a model on meta; whatever is still on meta then is drawn as a weight of the model."""
    linear = nn.Linear(INPUTS, OUTPUTS, bias=False, device="meta")
    method = MethodConfig(name=name, rank=3)
    layer = layer_class(method)(linear, method, torch.Generator().manual_seed(1))
    fresh = [layer.fresh(key, torch.Generator().manual_seed(2)) for key in layer.adapter_names]
    for values in (values_of(layer), fresh):
        assert not any(value.is_meta for value in values)
        assert not layer.delta_of(*values).any()
    assert [value.shape for value in fresh] == [value.shape for value in values_of(layer)]
    with torch.device("meta"):  # the way a resume and an export build it
        assert all(value.is_meta for value in values_of(layer_of(name)))


@each("stray", ["buffer", "vector"])
def test_a_layer_that_a_resume_could_not_restore_is_refused(stray: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LoRALinear.__init__

    def with_stray(self: LoRALinear, *arguments: Any) -> None:
        original(self, *arguments)
        if stray == "buffer":
            self.register_buffer("shift", torch.zeros(2), persistent=False)
        else:
            self.lora_A = nn.Parameter(torch.zeros(3))

    monkeypatch.setattr(LoRALinear, "__init__", with_stray)
    with pytest.raises(AssertionError, match="not a matrix" if stray == "vector" else "restores only parameters"):
        inject(empty_model(tiny_llama()), MethodConfig(name="lora", rank=3), seed=0)
