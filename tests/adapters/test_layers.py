"""Adapter layers: their deltas, three forms with one result, the memory they keep, dropout, sizes and draws."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from relora_mora.adapters.inject import layer_class
from relora_mora.adapters.layers import AdapterLinear, effective_rank, layer_generator
from relora_mora.adapters.mora import layer_square_size
from relora_mora.adapters.stored import PLAIN, EightBits
from relora_mora.config.schema import MethodConfig
from relora_mora.kernels import cpu, ops
from tests.adapters.tools import layers_of, made_resident
from tests.tools.each import each

KINDS = ["lora", "1", "2", "3", "4", "6"]
SHAPES = [(12, 20, 7), (20, 12, 6), (16, 16, 8), (5, 7, 12), (9, 9, 4)]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2}


def _values(layer: AdapterLinear) -> list[torch.Tensor]:
    return [layer.get_parameter(key).detach() for key in layer.adapter_names]


@each("kind", KINDS)
def test_singular_values_and_lora_factors_match_the_delta(kind):
    layer, _ = layers_of(kind, 12, 20, 6, torch.float64)
    delta, found = layer.delta_of(*_values(layer)), layer.singular_values(*_values(layer))
    expected = torch.linalg.svdvals(delta)
    torch.testing.assert_close(found, expected[: len(found)])
    assert (expected[len(found) :] < 1e-12).all()
    A, B = layer.as_lora(*_values(layer))
    torch.testing.assert_close(getattr(layer, "scale", 1.0) * B @ A, delta)


@each("kind", KINDS)
def test_it_starts_with_a_delta_of_zero_even_if_the_weight_has_no_values_yet(kind):
    """A run adds the adapters to a model on meta; whatever is still on meta then is drawn as a weight of the model."""
    method = MethodConfig(name="lora", rank=3) if kind == "lora" else MethodConfig(operators=[int(kind)], square_size=6)
    linear = nn.Linear(12, 20, bias=False, device="meta")
    layer = layer_class(method)(linear, method, torch.Generator().manual_seed(1))
    fresh = [layer.fresh(key, torch.Generator().manual_seed(2)) for key in layer.adapter_names]
    for values in (_values(layer), fresh):
        assert not any(value.is_meta for value in values)
        assert not layer.delta_of(*values).any()
    assert [value.shape for value in fresh] == [value.shape for value in _values(layer)]
    with torch.device("meta"):  # the way a resume and an export build it
        assert all(value.is_meta for value in _values(layers_of(kind, 12, 20, 6, torch.float32)[0]))


@each("dtype", TOLERANCE)
@each("kind", KINDS)
@each("inputs,outputs,size", SHAPES)
def test_all_forms_agree(kind, inputs, outputs, size, dtype, device):
    size += size % 2 if kind == "6" else 0
    merged, decoupled = (layer.to(device) for layer in layers_of(kind, inputs, outputs, size, dtype))
    resident = made_resident(copy.deepcopy(merged))
    x = torch.randn(3, 5, inputs, dtype=dtype).to(device)
    dy = torch.linspace(-1, 1, 15 * outputs, dtype=dtype).view(3, 5, outputs).to(device)
    weight = merged.weight + merged.delta_of(*_values(merged))
    results = [[x @ weight.T, dy @ weight]]
    for layer in (merged, decoupled, resident):
        own_x = x.clone().requires_grad_()
        y = layer(own_x)
        y.backward(dy)
        results.append([y.detach(), own_x.grad, *(layer.get_parameter(name).grad for name in layer.adapter_names)])
        assert layer.weight.grad is None
    explicit, *results = results
    for index, (a, b, c) in enumerate(zip(*results, strict=True)):
        for expected in (b, *explicit[index : index + 1]):
            assert float((a - expected).abs().max()) <= TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
        assert torch.equal(a, c)  # the same operations on the same W + delta


def test_autocast_gives_what_an_input_of_its_type_gives():
    for layer in layers_of("1", 24, 16, 8, torch.float32):
        results = []
        for casts in (True, False):
            x = torch.linspace(-1, 1, 144).view(6, 24).requires_grad_()
            layer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=casts):
                y = layer(x if casts else x.bfloat16())
            y.backward(torch.ones_like(y))
            results.append([y.detach(), x.grad, *(layer.get_parameter(name).grad for name in layer.adapter_names)])
        assert results[0][0].dtype == torch.bfloat16
        assert all(torch.equal(cast, plain) for cast, plain in zip(*results, strict=True)), layer.form


def test_the_merged_form_keeps_the_compressed_input_only():
    layer, _ = layers_of("1", 64, 48, 8, torch.float32)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(torch.randn(100, 64, requires_grad=True))
    assert torch.Size([100, 8]) in kept
    assert torch.Size([100, 64]) not in kept
    assert torch.Size([48, 64]) in kept  # the weight itself, no copy of it
    assert len(kept) == 3


@pytest.mark.more
@pytest.mark.skipif(not cpu.available(), reason=f"kernels are {ops.describe()}")
@pytest.mark.parametrize("kind", ["1", "lora"])
@pytest.mark.parametrize("form", ["merged", "decoupled"])
@pytest.mark.parametrize("stored", [PLAIN, EightBits("int8", 32, 24, multiplies=False, on_gpu=False)])
def test_a_compiled_layer_keeps_no_weight_for_backward(stored, form, kind):
    """Forward and backward compute W + delta, or W, with equal calls, which a compiler could merge into one."""
    layer, _ = layers_of(kind, 24, 32, 10, torch.float32)
    layer.form = form
    layer.stored = stored
    layer.pack()
    kept = []

    def forward(graph, inputs):
        output = next(node for node in graph.graph.nodes if node.op == "output")
        kept.extend(node.meta["val"] for node in output.args[0] if node.op != "placeholder")
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    x = torch.randn(9, 24, requires_grad=True)
    torch.compile(layer, backend=backend, fullgraph=True)(x).sum().backward()
    if kind == "lora":
        return  # it may keep them; that it compiles at all is tested here
    assert any(value.shape[-1] == 10 for value in kept)
    assert not any(value.shape == (32, 24) and value.dtype.is_floating_point for value in kept)


@each("kind,tokens", [("1", 7), ("lora", 42)])
def test_auto_builds_the_weight_if_there_are_enough_tokens(kind, tokens):
    layer, _ = layers_of(kind, 64, 48, 8, torch.float32)
    layer.form = "auto"
    assert layer.uses_merged_form(tokens)
    assert not layer.uses_merged_form(tokens - 1)


@each("kind", KINDS)
@each("stored", [PLAIN, EightBits("int8", 20, 12, multiplies=False, on_gpu=False)])
def test_dropout_applies_only_to_the_adapters_input_in_training(stored, kind):
    layer, _ = layers_of(kind, 12, 20, 6, torch.float64)
    layer.form = "auto"
    layer.dropout = 0.25
    layer.stored = stored
    layer.pack()
    weight, delta = layer.stored.dense(layer.base_weight, torch.float64), layer.delta_of(*_values(layer))
    x = torch.randn(400, 12, dtype=torch.float64)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.25)
    torch.manual_seed(0)
    torch.testing.assert_close(layer.train()(x), x @ weight.T + dropped @ delta.T)
    torch.testing.assert_close(layer.eval()(x), x @ (weight + delta).T)


def test_sizes_and_draws():
    method = MethodConfig(rank=8, square_multiple=16)
    assert layer_square_size(method, 64, 64) == 32
    with pytest.raises(ValueError, match=r"method.square_multiple: 16 is more than R of a 8 -> 8 layer"):
        layer_square_size(MethodConfig(rank=1, square_multiple=16), 8, 8)
    for inputs, outputs, rank in ((24, 24, 4), (576, 192, 8), (4096, 11008, 7), (1, 2, 1), (50, 50, 1)):
        nearest = int(math.sqrt((inputs + outputs) * rank) + 0.5)  # as the released code
        assert layer_square_size(MethodConfig(rank=rank, square_rounding="nearest"), inputs, outputs) == nearest
        assert layer_square_size(MethodConfig(rank=rank), inputs, outputs) in (nearest, nearest - 1)
    draws = [
        torch.rand(3, generator=layer_generator(*key)).tolist()
        for key in [(0, "a", 0), (0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0)]
    ]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 4


def test_effective_rank():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0
    assert effective_rank(torch.tensor([[1.0, 1.0], [0.0, 0.0], [2.0, 0.0]])).tolist() == pytest.approx([2, 0, 1])
