"""Layers with the same input compute its compressed form once and keep nothing afterwards."""

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
def test_layers_with_one_input_get_the_right_gradients(kinds, run):
    """In every way to run them, over two micro-batches and a switch of operators."""
    torch.compiler.reset()  # otherwise programs of other cases count as recompilations
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
    """A list with a weak reference to every C x that is computed."""
    references = []
    compress = GroupingOperator.compress_for_gradient
    monkeypatch.setattr(
        GroupingOperator,
        "compress_for_gradient",
        lambda op, x: references.append(weakref.ref(y := compress(op, x))) or y,
    )
    return references


def test_the_compressed_input_is_computed_once_and_freed_with_the_graph(compressions):
    layers = _pair("11")
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True) * 1
    alias = x.view_as(x)  # ZeRO-3 gives each layer an alias
    outputs = [layers[0](x), layers[1](alias)]
    assert len(compressions) == 1
    assert compressions[0]() is not None
    with torch.no_grad():
        outputs += [layers[0](x), layers[1](x)]
    assert len(compressions) == 1
    del outputs
    assert compressions[0]() is None


@pytest.mark.parametrize(
    "between", ["x is written to", "another x", "another operator", "M does not train", "the first is called again"]
)
def test_no_layer_uses_a_compressed_input_of_another_call(between, compressions):
    layers = _pair("11")
    reference = copy.deepcopy(layers)
    for layer in reference:
        layer.form = "decoupled"
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    gradients = []
    for first, second in (layers, reference):
        shared = x * 1
        outputs = [first(shared)]
        if between == "x is written to":
            outputs.clear()  # autograd could not go back through it
            with torch.no_grad():
                shared.add_(1)
        elif between == "another x":
            shared = x * 2
        elif between == "another operator":
            second.set_operator(2)
        elif between == "M does not train":
            second.mora_M.requires_grad_(False)
        else:  # before the second has been called
            outputs = [first(shared)]
        outputs.append(second(shared))
        torch.stack([y.square().sum() for y in outputs]).sum().backward()
        gradients.append([layer.mora_M.grad for layer in (first, second)])
    assert len(compressions) == (1 if between == "M does not train" else 2)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("last", ["is not called", "is frozen", "has no gradient"])
def test_a_forward_leaves_nothing_and_a_missing_gradient_stays_none(last):
    layers = _pair("11")
    if last == "is frozen":
        layers[1].mora_M.requires_grad_(False)
    for _ in range(2):  # the second forward would find anything that the first left
        x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True) * 1
        reference = weakref.ref(x)
        y = layers[0](x)
        unused = None if last == "is not called" else layers[1](x)
        y.sum().backward()
        assert layers[1].mora_M.grad is None
        if last != "is not called":
            assert layers[0].shared_input.pending is None
            del x, y, unused
            assert reference() is None


def test_layers_are_freed_with_their_last_reference():
    layers = _pair("11")
    layers[1](x := torch.randn(5, 12, dtype=torch.float64)), layers[0](x), layers[1](x)
    references = [weakref.ref(layer) for layer in layers]
    gc.disable()
    try:
        del layers
        assert [layer() for layer in references] == [None, None]  # no cycle
    finally:
        gc.enable()


def test_layers_with_one_input_compute_their_gradients_in_one_product(monkeypatch):
    """This holds for layers with the same maps, whichever of them are called and however often."""
    counts = []
    square_gradients = GroupingOperator.square_gradients
    monkeypatch.setattr(
        GroupingOperator,
        "square_gradients",
        lambda op, compressed, dys: counts.append(len(dys)) or square_gradients(op, compressed, dys),
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
        assert sorted(counts) == sorted(expected * model_config.num_hidden_layers)
        assert all(layer.mora_M.grad is not None for _, layer in adapter_layers(model))
        counts.clear()
