"""Whether settings go with a model: adapters beside their weights, the state of training in the memory there is."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import LlamaConfig

from relora_mora.config import Config, ConfigError, MethodConfig
from relora_mora.methods.inject import layer_square_size
from relora_mora.plan.flops import attention_widths, meta_model
from relora_mora.plan.memory import state_memory


def linear_shapes(model_config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear of a decoder layer."""
    hidden, intermediate = model_config.hidden_size, model_config.intermediate_size
    queries, keys = attention_widths(model_config)
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }


def check_adapters(model_config: LlamaConfig, config: Config) -> None:
    """Raises :class:`ConfigError` for adapters larger than the weights beside them, or a square than its layer."""
    if not config.uses_adapters:
        return
    method = config.method
    shapes = {kind: shape for kind, shape in linear_shapes(model_config).items() if kind in method.target_modules}
    faults = []
    if config.uses_squares and method.square_size is not None:
        faults = [
            f"method.square_size: {method.square_size} is more than both widths of {kind} ({inputs} -> {outputs}); "
            "lower it"
            for kind, (inputs, outputs) in shapes.items()
            if method.square_size > max(inputs, outputs)
        ]
    weights = sum(inputs * outputs for inputs, outputs in shapes.values())
    adapters = adapter_parameters(method, shapes)
    if adapters > weights and not faults:
        largest = weights // sum(inputs + outputs for inputs, outputs in shapes.values())
        by_rank = method.model_copy(update={"square_size": None})
        while adapter_parameters(by_rank.model_copy(update={"rank": largest + 1}), shapes) <= weights:
            largest += 1
        name = "method.rank" if method.square_size is None or not config.uses_squares else "method.square_size"
        faults.append(
            f"{name}: the adapters of a layer have {adapters:,} parameters, more than the {weights:,} of the weights "
            "beside them; "
            f"use method.rank={largest} at most, or method.name=full"
        )
    if faults:
        raise ConfigError(faults, "the settings")


def adapter_parameters(method: MethodConfig, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Parameters of the adapters of one decoder layer, whose linears have these (in, out)."""
    if method.name in ("lora", "relora"):
        return sum(method.rank * (inputs + outputs) for inputs, outputs in shapes.values())
    return sum(layer_square_size(method, inputs, outputs) ** 2 for inputs, outputs in shapes.values())


def check_memory(model_config: LlamaConfig, config: Config, world_size: int, available: int, *, bf16: bool) -> None:
    """Raises :class:`ConfigError` when weights, masters and optimizer state alone are more than ``available`` bytes."""
    state = state_memory(meta_model(model_config, config), config, config.train.zero_stage, world_size, bf16=bf16)
    needed = state.weights + state.masters + state.optimizer
    if needed > available:
        fault = (
            f"model: weights and optimizer state need {needed / 2**30:,.1f} GiB on each of {world_size} ranks, and "
            "there are "
            f"{available / 2**30:,.1f}; take a smaller model, more ranks, or a stage higher than train.zero_stage="
            f"{config.train.zero_stage}: launch/plan.py says what a run needs"
        )
        raise ConfigError([fault], "the settings")
