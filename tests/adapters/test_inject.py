"""Injected adapters: the model's output does not change at first, and exactly the method's parameters train."""

from typing import Any

import torch
from torch import nn

from relora_mora.adapters.inject import inject
from relora_mora.adapters.layers import adapter_layers
from relora_mora.config.registry import METHODS
from relora_mora.model.causal import build_model
from relora_mora.optim.groups import parameter_groups, set_trainable
from tests.tools.adapter_tools import ADAPTERS_ONLY
from tests.tools.each import each
from tests.tools.tiny import tiny_config, tiny_llama


@each("method", METHODS)
def test_trainable_is_exactly_what_the_method_says(method):
    config = tiny_config(method={"name": method}, optim={"weight_decay": 0.1})
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
    assert len(linears) == 14
    assert bool(adapters) == (method != "full")
    groups = parameter_groups(model, config.optim)
    assert sorted(name for group in groups for name in group.parameters) == sorted(trains)
    main = "linears" if method == "full" else "adapters"
    for group in groups:
        assert group.weight_decay == (0.0 if group.name == "norms" else 0.1)
        assert group.peak_lr == (config.optim.lr if group.name == main else config.optim.lr_other)
    ids = torch.arange(12).view(1, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    for _, layer in adapter_layers(model):  # if A and B both started at zero, all gradients would stay zero
        assert any(layer.get_parameter(name).grad.any() for name in layer.adapter_names)


@each(
    ("method", "groups"),
    [
        (ADAPTERS_ONLY, ["adapters"]),
        (ADAPTERS_ONLY | {"target_modules": ["q_proj"]}, ["adapters"]),
        (ADAPTERS_ONLY | {"target_modules": ["q_proj"], "train_linears": True}, ["adapters", "linears"]),
        (ADAPTERS_ONLY | {"target_modules": ["q_proj"], "train_norms": True}, ["adapters", "linears", "norms"]),
        ({"target_modules": ["q_proj"], "train_linears": False}, ["adapters", "embeddings", "norms"]),
        (ADAPTERS_ONLY | {"name": "lora", "target_modules": ["q_proj"]}, ["adapters"]),
    ],
)
def test_everything_except_the_adapters_can_be_frozen(method: dict[str, Any], groups: list[str]):
    config = tiny_config(method=method)
    model = build_model(tiny_llama(), seed=0)
    inject(model, config.method, seed=0)
    set_trainable(model, config.method)
    assert [group.name for group in parameter_groups(model, config.optim)] == groups
    adapters_only = config.optim.model_copy(update={"rewarm": "adapters"})
    assert [group.name for group in parameter_groups(model, adapters_only) if group.rewarms] == ["adapters"]
