"""Adapter layers: three forms with one result, injection, and what trains."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from relora_mora import kernels
from relora_mora.config import MethodConfig
from relora_mora.methods.inject import inject
from relora_mora.methods.layers import AdapterLinear, adapter_layers, effective_rank, layer_generator
from relora_mora.methods.lora import LoRALinear
from relora_mora.methods.mora import MoRALinear, layer_square_size
from relora_mora.model.llama import build_model
from relora_mora.model.shapes import linear_shapes
from relora_mora.operators import GroupingOperator, square_size
from relora_mora.optim import parameter_groups, set_trainable
from relora_mora.plan.fit import adapter_parameters
from relora_mora.registry import METHODS
from tests.tools.tiny import tiny_config, tiny_llama

SHAPES = [(12, 20, 7), (20, 12, 6), (16, 16, 8), (5, 7, 12), (9, 9, 4)]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2}


def _layers(kind: str, inputs: int, outputs: int, size: int, dtype: torch.dtype) -> tuple[AdapterLinear, AdapterLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    layer: AdapterLinear
    if kind == "lora":
        layer = LoRALinear(linear, 3, 6.0, torch.Generator().manual_seed(1), "merged")
    else:
        layer = MoRALinear(linear, size, int(kind), "merged")
    for name in layer.adapter_names:
        nn.init.normal_(layer.get_parameter(name), std=0.3)
    other = copy.deepcopy(layer)
    other.form = "decoupled"
    return layer, other


def _made_resident(layer: AdapterLinear) -> AdapterLinear:
    layer.form = "resident"
    layer.resident = True
    layer.keep_merged()
    return layer


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["lora", "1", "2", "3", "4", "6"])
@pytest.mark.parametrize("inputs,outputs,size", SHAPES)
def test_all_forms_agree(kind, inputs, outputs, size, dtype, device):
    size += size % 2 if kind == "6" else 0
    merged, decoupled = (layer.to(device) for layer in _layers(kind, inputs, outputs, size, dtype))
    resident = _made_resident(copy.deepcopy(merged))
    x = torch.randn(3, 5, inputs, dtype=dtype).to(device)
    results = []
    for layer in (merged, decoupled, resident):
        given = x.clone().requires_grad_()
        y = layer(given)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y).to(device))
        results.append([y.detach(), given.grad, *(layer.get_parameter(name).grad for name in layer.adapter_names)])
        assert layer.weight.grad is None
    for a, b, c in zip(*results, strict=True):
        scale = max(1.0, float(b.abs().max()))
        assert float((a - b).abs().max()) <= TOLERANCE[dtype] * scale
        assert torch.equal(a, c)  # the same operations on the same W + delta


@pytest.mark.parametrize("kind", ["lora", "1", "2", "6"])
def test_the_delta_is_what_the_layer_adds(kind):
    layer, _ = _layers(kind, 12, 20, 6, torch.float64)
    x = torch.randn(4, 12, dtype=torch.float64)
    delta = layer.delta_of(*(layer.get_parameter(name) for name in layer.adapter_names))
    torch.testing.assert_close(layer(x), x @ (layer.weight + delta).T, rtol=0, atol=1e-12)
    values = layer.singular_values(*(layer.get_parameter(name) for name in layer.adapter_names))
    expected = torch.linalg.svdvals(delta)
    torch.testing.assert_close(values, expected[: len(values)], rtol=0, atol=1e-12)
    assert bool((expected[len(values) :] < 1e-10).all())


def test_the_merged_form_keeps_the_compressed_input_only():
    layer, _ = _layers("1", 64, 48, 8, torch.float32)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(torch.randn(100, 64, requires_grad=True))
    assert torch.Size([100, 8]) in kept
    assert torch.Size([100, 64]) not in kept and torch.Size([48, 64]) in kept  # the weight itself, no copy of it
    assert len(kept) == 3


def _pair(kinds: str) -> nn.ModuleList:
    pair = [_layers(kind, 12, 20, 6, torch.float64)[0] for kind in kinds]
    MoRALinear.share_input(pair)
    return nn.ModuleList(pair)


def _use(norm: nn.Module, pair: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    x = norm(x)
    return pair[0](x) * pair[1](x)


@pytest.mark.parametrize(
    "run", ["plain", "recomputed", "recomputed, reentrant", "compiled", "resident", "resident, compiled"]
)
@pytest.mark.parametrize("kinds", ["11", "12", "24", "66"])
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
                    _made_resident(layer)
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


@pytest.mark.skipif(not kernels.available(), reason=f"kernels are {kernels.describe()}")
def test_a_compiled_layer_keeps_no_weight_for_backward():
    """W + delta of forward and of backward are equal calls, and a compiler would merge them."""
    layer, _ = _layers("1", 24, 32, 10, torch.float32)
    kept = []

    def forward(graph, inputs):
        output = next(node for node in graph.graph.nodes if node.op == "output")
        kept.extend(tuple(node.meta["val"].shape) for node in output.args[0] if node.op != "placeholder")
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    x = torch.randn(9, 24, requires_grad=True)
    torch.compile(layer, backend=backend, fullgraph=True)(x).sum().backward()
    assert (9, 10) in kept and (32, 24) not in kept


@pytest.mark.parametrize("kind,tokens", [("1", 7), ("lora", 42)])
def test_auto_builds_the_weight_where_tokens_outweigh_it(kind, tokens):
    layer, _ = _layers(kind, 64, 48, 8, torch.float32)
    layer.form = "auto"
    assert layer.uses_merged_form(tokens) and not layer.uses_merged_form(tokens - 1)


@pytest.mark.parametrize("kind", ["lora", "1", "2", "6"])
def test_dropout_is_of_the_adapters_input_alone(kind):
    """Its mean is the layer without dropout; W sees the whole x; in evaluation there is none."""
    layer, _ = _layers(kind, 12, 20, 6, torch.float64)
    layer.form = "auto"
    layer.dropout = 0.25
    x = torch.randn(1, 12, dtype=torch.float64)
    plain = x @ layer.weight.T
    whole = layer.eval()(x)
    layer.train()
    torch.manual_seed(0)
    draws = torch.stack([layer(x) for _ in range(4000)])
    delta = layer.delta_of(*(layer.get_parameter(name) for name in layer.adapter_names))
    added = (draws - plain)[:, 0]
    spread = ((delta * x) ** 2).sum(-1).mul(0.25 / 0.75).sqrt()  # of one draw: elements of x drop independently
    assert bool(((draws.mean(0) - whole)[0].abs() <= 5 * spread / 4000**0.5 + 1e-12).all())
    torch.testing.assert_close(added.std(0), spread, rtol=0.1, atol=1e-9)
    assert not layer.uses_merged_form(10**6) and layer.eval().uses_merged_form(10**6)


@pytest.mark.parametrize("method", ["lora", "mora"])
def test_what_dropout_drops_is_the_same_where_a_layer_is_recomputed(method):
    config = tiny_config(method={"name": method, "dropout": 0.5, "operators": [1]})
    gradients = []
    for recomputes in (False, True):
        model = build_model(tiny_llama(), seed=0)
        inject(model, config.method, seed=0)
        for _, layer in adapter_layers(model):
            for name in layer.adapter_names:
                nn.init.normal_(layer.get_parameter(name), std=0.3, generator=torch.Generator().manual_seed(1))
        if recomputes:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        torch.manual_seed(7)
        model(input_ids=torch.arange(12).view(1, 12), labels=torch.arange(12).view(1, 12)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    first, second = gradients
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_injection_changes_nothing_at_the_start(method):
    config = tiny_config(method={"name": method})
    plain, adapted = build_model(tiny_llama(), seed=3), build_model(tiny_llama(), seed=3)
    found = inject(adapted, config.method, seed=3)
    assert found.layers == 14 and {kind: len(names) for kind, names in found.by_kind.items()} == dict.fromkeys(
        config.method.target_modules, 2
    )
    ids = torch.arange(10).view(1, 10)
    torch.testing.assert_close(adapted(ids).logits, plain(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_trainable_is_exactly_what_the_method_says(method):
    config = tiny_config(method={"name": method})
    model = build_model(tiny_llama(), seed=0)
    linears = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    if config.method.uses_adapters:
        inject(model, config.method, seed=0)
    set_trainable(model, config.method)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    others = {
        name for name, _ in model.named_parameters() if "norm" in name or "embed" in name or name == "lm_head.weight"
    }
    adapters = {f"{name}.{key}" for name, layer in adapter_layers(model) for key in layer.adapter_names}
    assert trains == others | (linears if method == "full" else adapters)
    assert len(linears) == 14 and bool(adapters) == (method != "full")
    groups = parameter_groups(model, config.optim)
    assert sorted(name for group in groups for name in group.parameters) == sorted(trains)
    rates = {group.name: group.peak_lr for group in groups}
    assert rates.pop("linears" if method == "full" else "adapters") == config.optim.lr
    assert set(rates.values()) == {config.optim.lr_other}


@pytest.mark.parametrize("method", ["lora", "mora"])
def test_a_projection_may_have_a_rank_of_its_own(method):
    config = tiny_config(method={"name": method, "rank": 3, "rank_pattern": {"down_proj": 5}})
    model = build_model(tiny_llama(), seed=0)
    found = inject(model, config.method, seed=0)
    shapes = linear_shapes(tiny_llama())
    for name, layer in adapter_layers(model):
        kind = name.rpartition(".")[2]
        rank = 5 if kind == "down_proj" else 3
        if method == "lora":
            assert layer.lora_A.shape == (rank, shapes[kind][0]) and layer.lora_B.shape == (shapes[kind][1], rank)
        else:
            assert layer.mora_M.shape == (square_size(*shapes[kind], rank),) * 2
    assert found.parameters == 2 * adapter_parameters(config.method, shapes)  # two decoder layers, as planned


ALONE = {"train_embeddings": False, "train_norms": False, "train_head": False}


@pytest.mark.parametrize(
    ("method", "groups"),
    [
        (ALONE, ["adapters"]),
        (ALONE | {"target_modules": ["q_proj"]}, ["adapters"]),
        (ALONE | {"target_modules": ["q_proj"], "train_linears": True}, ["adapters", "linears"]),
        (ALONE | {"target_modules": ["q_proj"], "train_norms": True}, ["adapters", "linears", "norms"]),
        ({"target_modules": ["q_proj"], "train_linears": False}, ["adapters", "embeddings", "norms"]),
        (ALONE | {"name": "lora", "target_modules": ["q_proj"]}, ["adapters"]),
    ],
)
def test_everything_beside_the_adapters_can_be_frozen(method: dict[str, Any], groups: list[str]):
    config = tiny_config(method=method)
    model = build_model(tiny_llama(), seed=0)
    inject(model, config.method, seed=0)
    set_trainable(model, config.method)
    assert [group.name for group in parameter_groups(model, config.optim)] == groups


def test_targets_that_match_nothing_are_an_error():
    with pytest.raises(ValueError, match=r"no linear of the decoder is named experts; it has down_proj, gate_proj"):
        inject(build_model(tiny_llama(), seed=0), MethodConfig(target_modules=["q_proj", "experts"]), seed=0)


def test_after_one_step_every_adapter_has_moved():
    """A = 0 and B = 0 at the start, as in a predecessor, would leave all gradients zero."""
    for method in ("lora", "mora"):
        config = tiny_config(method={"name": method})
        model = build_model(tiny_llama(), seed=0)
        inject(model, config.method, seed=0)
        model(input_ids=torch.arange(12).view(1, 12), labels=torch.arange(12).view(1, 12)).loss.backward()
        for _, layer in adapter_layers(model):
            assert any(layer.get_parameter(name).grad.abs().max() > 0 for name in layer.adapter_names)


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
    assert draws[0] == draws[1] and len({tuple(draw) for draw in draws}) == 4


def test_effective_rank():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0
    assert effective_rank(torch.tensor([[1.0, 1.0], [0.0, 0.0], [2.0, 0.0]])).tolist() == pytest.approx([2, 0, 1])
