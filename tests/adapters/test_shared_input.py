"""Layers that read one input make its compressed form once, and keep nothing of it."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from relora_mora.adapters.inject import inject
from relora_mora.adapters.layers import adapter_layers
from relora_mora.adapters.mora import MoRALinear
from relora_mora.model.llama import build_model
from relora_mora.operators import GroupingOperator
from relora_mora.optim.groups import set_trainable
from tests.adapters.tools import layers_of, made_resident
from tests.tools.grids import rest
from tests.tools.tiny import tiny_config, tiny_llama


def _pair(kinds: str) -> nn.ModuleList:
    pair = [layers_of(kind, 12, 20, 6, torch.float64)[0] for kind in kinds]
    MoRALinear.share_input(pair)
    return nn.ModuleList(pair)


def _use(norm: nn.Module, pair: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    x = norm(x)
    return pair[0](x) * pair[1](x)


KINDS = ("11", "12", "24", "66")
CASES = [(run, kinds) for run in ("plain", "recomputed", "recomputed, reentrant", "resident") for kinds in KINDS]
CASES += [("compiled", "11"), ("compiled", "24"), ("resident, compiled", "12"), ("resident, compiled", "66")]
CASES += rest(("compiled", "12"), ("compiled", "66"), ("resident, compiled", "11"), ("resident, compiled", "24"))


@pytest.mark.parametrize("run,kinds", CASES)
def test_layers_that_see_one_input_get_the_right_gradients(kinds, run):
    """Under every way to run them, over two micro-batches and a switch of operators."""
    torch.compiler.reset()  # else the programs of other cases count as recompilations
    norm, pair = nn.RMSNorm(12, dtype=torch.float64), _pair(kinds)
    reference = copy.deepcopy(pair)
    for layer in reference:
        layer.form = "decoupled"
    use = torch.compile(_use, backend="eager", fullgraph=True) if "compiled" in run else _use
    results = []
    for layers, call in ((reference, _use), (pair, use)):
        for switched in (False, True):
            if switched:
                layers[0].set_operator(3)
            if layers is pair and "resident" in run:
                for layer in layers:
                    assert (layer.merged_weight is None) != (switched and layer is layers[1])
                    made_resident(layer)
            for seed in (0, 1):
                x = torch.randn(
                    5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
                ).requires_grad_()
                if layers is pair and run.startswith("recomputed"):
                    y = checkpoint(call, norm, layers, x, use_reentrant="reentrant" in run)
                else:
                    y = call(norm, layers, x)
                y.sum().backward()
                results.append(x.grad)
        results += [layer.mora_M.grad for layer in layers]
    half = len(results) // 2
    for a, b in zip(results[half:], results[:half], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.fixture
def compressions(monkeypatch):
    """[weak reference to C x] of each time that it is made"""
    made = []
    compress = GroupingOperator.compress_for_gradient
    monkeypatch.setattr(
        GroupingOperator,
        "compress_for_gradient",
        lambda op, x: made.append(weakref.ref(y := compress(op, x))) or y,
    )
    return made


def test_the_compressed_input_is_made_once_and_goes_with_the_graph(compressions):
    layers = _pair("11")
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True) * 1
    alias = x.view_as(x)  # ZeRO-3 gives each layer an alias
    outputs = [layers[0](x), layers[1](alias)]
    assert len(compressions) == 1 and compressions[0]() is not None
    with torch.no_grad():
        outputs += [layers[0](x), layers[1](x)]
    assert len(compressions) == 1
    del outputs
    assert compressions[0]() is None


@pytest.mark.parametrize("between", ["x is written to", "another x", "another operator", "M does not train", "in vain"])
def test_no_layer_takes_what_was_made_for_another_use(between, compressions):
    layers = _pair("11")
    reference = copy.deepcopy(layers)
    for layer in reference:
        layer.form = "decoupled"
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    gradients = []
    for first, second in (layers, reference):
        seen = x * 1
        outputs = [first(seen)]
        if between == "x is written to":
            outputs.clear()  # autograd could not go back through it
            with torch.no_grad():
                seen.add_(1)
        elif between == "another x":
            seen = x * 2
        elif between == "another operator":
            second.set_operator(2)
        elif between == "M does not train":
            second.mora_M.requires_grad_(False)
        else:  # the first is called again, and the second never was
            outputs = [first(seen)]
        outputs.append(second(seen))
        torch.stack([y.square().sum() for y in outputs]).sum().backward()
        gradients.append([layer.mora_M.grad for layer in (first, second)])
    assert len(compressions) == (1 if between == "M does not train" else 2)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("last", ["is not called", "is frozen", "has no gradient"])
def test_nothing_is_kept_of_a_forward_and_no_gradient_is_none(last):
    layers = _pair("11")
    if last == "is frozen":
        layers[1].mora_M.requires_grad_(False)
    for _ in range(2):  # the second forward finds what the first has left
        x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True) * 1
        seen = weakref.ref(x)
        y = layers[0](x)
        unused = None if last == "is not called" else layers[1](x)
        y.sum().backward()
        assert layers[1].mora_M.grad is None
        if last != "is not called":
            assert layers[0].shared_input.seen is None
            del x, y, unused
            assert seen() is None


def test_layers_are_freed_with_the_last_name_that_they_have():
    layers = _pair("11")
    layers[1](x := torch.randn(5, 12, dtype=torch.float64)), layers[0](x), layers[1](x)
    freed = [weakref.ref(layer) for layer in layers]
    gc.disable()
    try:
        del layers
        assert [layer() for layer in freed] == [None, None]  # no cycle
    finally:
        gc.enable()


def test_layers_with_one_input_make_their_gradients_in_one_product(monkeypatch):
    """Those with the same maps, whichever of them are called and however often."""
    asked = []
    make = GroupingOperator.square_gradients
    monkeypatch.setattr(
        GroupingOperator, "square_gradients", lambda op, *given: asked.append(len(given[1])) or make(op, *given)
    )
    grouped = tiny_llama(num_key_value_heads=1)
    for model_config, pattern, expected in (
        (tiny_llama(), {}, [1, 1, 2, 3]),
        (grouped, {}, [1, 1, 1, 2, 2]),
        (tiny_llama(), {"k_proj": 2}, [1, 1, 1, 1, 1, 2]),
    ):
        config = tiny_config(method={"name": "mora", "operators": [1], "form": "merged", "rank_pattern": pattern})
        model = build_model(model_config, seed=0)
        inject(model, config.method, seed=0)
        set_trainable(model, config.method)
        model(torch.arange(10).view(1, 10)).logits.sum().backward()
        assert sorted(asked) == sorted(expected * model_config.num_hidden_layers)
        assert all(layer.mora_M.grad is not None for _, layer in adapter_layers(model))
        asked.clear()
