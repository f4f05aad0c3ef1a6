"""Layers with the same input compute its compressed form once and keep nothing afterwards."""

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
from relora_mora.model.causal import build_model
from relora_mora.operators import GroupingOperator
from relora_mora.optim.groups import set_trainable
from tests.adapters.tools import layers_of
from tests.tools.tiny import tiny_config, tiny_llama


class Pair(nn.Module):
    """Two layers that see the same input, called in an order that a test may change."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers_of("1", 12, 20, 6, torch.float64)[0] for _ in range(2))
        self.order = [0, 1]
        MoRALinear.share_input(self, list(self.layers))

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One input for both layers, or one for each."""
        return tuple(self.layers[index](x) for index, x in zip(self.order, inputs * (3 - len(inputs)), strict=False))


def decoupled(pair: Pair) -> Pair:
    reference = copy.deepcopy(pair)
    for layer in reference.layers:
        layer.form = "decoupled"
    return reference


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


def written_to(layer: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor) -> None:
    inputs[0].detach().add_(1)  # which raises its _version


# what happens between the calls of two layers, and how often C x is computed
BETWEEN = {
    "x is written to": 2,
    "another x": 2,
    "another operator": 2,
    "M does not train": 1,
    "order": 1,
    "recomputed": 2,
    "recomputed, reentrant": 1,
}


@pytest.mark.parametrize("between", BETWEEN)
def test_no_layer_uses_a_compressed_input_of_another_call(between, compressions):
    pair = Pair()
    gradients = []
    for module in (pair, decoupled(pair)):
        first, second = module.layers
        x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_() * 1
        inputs = (x, x * 2) if between == "another x" else (x,)
        if between == "x is written to":
            first.register_forward_hook(written_to)
        elif between == "another operator":
            second.set_operator(2)
        elif between == "M does not train":
            second.mora_M.requires_grad_(False)
        elif between == "order":
            module.order = [1, 0]
        if between.startswith("recomputed"):
            outputs = checkpoint(module, *inputs, use_reentrant="reentrant" in between)
        else:
            outputs = module(*inputs)
        if between == "x is written to":
            outputs = outputs[1:]  # autograd cannot go back through the other
        torch.stack([y.square().sum() for y in outputs]).sum().backward()
        gradients.append([layer.mora_M.grad for layer in module.layers])
    assert len(compressions) == BETWEEN[between]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ends", ["as it should", "by an error"])
def test_nothing_is_kept_after_a_forward(ends, compressions):
    pair = Pair()
    if ends == "by an error":
        pair.layers[1].register_forward_pre_hook(lambda layer, inputs: torch.zeros(3))
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True) * 1
    layers = [weakref.ref(layer) for layer in pair.layers]
    inputs = weakref.ref(x)
    try:
        outputs = pair(x)
    except RuntimeError:
        assert ends == "by an error"
    else:
        assert compressions[0]() is not None
        del outputs
    copy.deepcopy(pair)  # tensors of a forward cannot be copied
    gc.disable()
    try:
        del x
        assert inputs() is None
        assert not any(each() is not None for each in compressions)
        del pair
        assert [layer() for layer in layers] == [None, None]  # no cycle
    finally:
        gc.enable()


def test_the_layers_of_a_model_with_one_input_compress_it_once(compressions):
    """This holds for layers with the same maps."""
    grouped = tiny_llama(num_key_value_heads=1)
    for model_config, pattern, expected in (
        (tiny_llama(), {}, 4),  # attention, o_proj, mlp, down_proj
        (grouped, {}, 5),  # k_proj and v_proj have an R of their own
        (tiny_llama(), {"k_proj": 2}, 6),  # it is called between the others
    ):
        config = tiny_config(method={"name": "mora", "operators": [1], "form": "merged", "rank_pattern": pattern})
        model = build_model(model_config, seed=0)
        inject(model, config.method, seed=0)
        set_trainable(model, config.method)
        compressions.clear()
        model(torch.arange(10).view(1, 10)).logits.sum().backward()
        assert len(compressions) == expected * model_config.num_hidden_layers
        assert all(layer.mora_M.grad is not None for _, layer in adapter_layers(model))
