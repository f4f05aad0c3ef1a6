"""Forward and backward of the linears of a decoder layer: frozen, trained, and with adapters in each form."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Literal
from unittest import mock

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from launch.benchmark.turns import chosen_device, seconds_of, take_turns
from relora_mora.adapters.inject import choose_storage, decoder_linears, replace_linears
from relora_mora.adapters.layers import adapter_layers
from relora_mora.cli.arguments import PositiveInt
from relora_mora.config.registry import METHODS, OPERATORS
from relora_mora.config.schema import MethodConfig, ModelConfig
from relora_mora.kernels import ops
from relora_mora.model.causal import empty_model
from relora_mora.model.config import read_model_config
from relora_mora.sizing.fit import check_adapters
from relora_mora.system.hardware import device_name

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARING_AN_INPUT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
VARIANTS = (
    "frozen",
    "full",
    "lora merged",
    "lora decoupled",
    "lora resident int8",
    "mora merged",
    "mora merged, torch",
    "mora decoupled",
    "mora resident",
    "mora resident int8",
    "mora decoupled int8",
    "mora merged int8",
)


def main(
    model: str,
    *,
    tokens: PositiveInt = 4096,
    dtype: Literal["bf16", "fp32"] = "bf16",
    rank: PositiveInt = 128,
    operator: Literal[1, 2, 3, 4, 6] = 1,
    repetitions: PositiveInt = 7,
    device: Literal["cpu", "cuda"] | None = None,
) -> None:
    """Prints milliseconds of each variant, its ratio to the frozen linears, and the same as one line of JSON.

    Variants take turns, and the median of each counts. Resident variants do not build W + delta again, which a step
    does once. "merged int8" is only stored in 8 bits.

    Args:
        model: a model's JSON file such as configs/model/llama_130m.json
        tokens: rows of the inputs
        dtype: bf16 or fp32
        rank: LoRA's r; the square matrices have as many parameters
        operator: the type of MoRA's operators
        repetitions: turns of each variant, after one that does not count
        device: cpu or cuda; default: the device that a run would use here
    """
    place = chosen_device(device)
    method = MethodConfig(rank=rank)
    model_config = read_model_config(ModelConfig(config=model))
    check_adapters(model_config, method)
    layers = linears(model_config)
    variants = {name: Variant(name, layers, method, operator, tokens, DTYPES[dtype], place) for name in VARIANTS}
    measures = {name: variant.milliseconds for name, variant in variants.items()}
    milliseconds = pd.DataFrame(take_turns(measures, rounds=repetitions, warmup=1)).median()
    table = pd.DataFrame({"milliseconds": milliseconds, "ratio_to_frozen": milliseconds / milliseconds["frozen"]})
    print(
        f"{device_name()}: {tokens:,} tokens, {dtype}, {torch.get_num_threads()} threads, r={rank}, "
        f"operator {operator}; kernels: {ops.describe(place.type)}"
    )
    print(table.to_string(float_format="{:.3f}".format))
    print(json.dumps({"device": device_name(), **table.to_dict()}))


def linears(model_config: PreTrainedConfig) -> list[tuple[int, dict[str, int]]]:
    """The width of each input of a decoder layer, and those of the outputs of the linears that share it."""
    found = {name.rpartition(".")[2]: layer for name, layer in decoder_linears(empty_model(model_config))}
    return [
        (found[kinds[0]].in_features, {kind: found[kind].out_features for kind in kinds}) for kinds in SHARING_AN_INPUT
    ]


class Variant:
    """One form of the linears; all variants get the same inputs."""

    def __init__(
        self,
        name: str,
        shapes: list[tuple[int, dict[str, int]]],
        method: MethodConfig,
        operator: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.device = device
        self.torch_only = name.endswith("torch")
        kind = name.partition(" ")[0]
        model = nn.ModuleList(
            _SameInput({key: nn.Linear(inputs, out, bias=False, dtype=dtype) for key, out in outs.items()})
            for inputs, outs in shapes
        ).requires_grad_(kind == "full")
        if kind in METHODS and kind != "full":
            form = next((form for form in ("decoupled", "resident") if form in name), "merged")
            base = "int8" if name.endswith("int8") else None
            multiple = 2 if OPERATORS[operator].even_size else 1
            changes = {"name": kind, "form": form, "square_multiple": multiple}
            settings = method.model_copy(update=changes | {"base": base, "base_products": form != "merged"})
            names = [f"{number}.{key}" for number, (_, outs) in enumerate(shapes) for key in outs]
            replace_linears(model, names, settings, seed=0, mora_type=operator)
            choose_storage(model.to(device), settings, on_gpu=device.type == "cuda")
            for _, layer in adapter_layers(model):
                layer.pack()
                layer.keep_merged()
        generator = torch.Generator().manual_seed(0)
        self.groups: list[tuple[Tensor, nn.Module, list[Tensor]]] = []
        for layers, (inputs, outs) in zip(model.to(device), shapes, strict=True):
            x, *gradients = (
                torch.randn(tokens, width, generator=generator).to(device, dtype) for width in (inputs, *outs.values())
            )
            self.groups.append((x.requires_grad_(), layers, gradients))

    def milliseconds(self) -> float:
        """The time of one forward and backward."""
        seconds = 0.0
        with mock.patch.object(ops, "enabled", not self.torch_only):
            for x, layers, gradients in self.groups:
                output = x.clone()  # another module's output, as in a model
                seconds += seconds_of(partial(_forward_and_backward, layers, output, gradients), self.device)
                x.grad = None
                layers.zero_grad(set_to_none=True)
        return 1000 * seconds


class _SameInput(nn.ModuleDict):
    """Layers of a module that calls all of them with the same input."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.values()]


def _forward_and_backward(layers: nn.Module, x: Tensor, gradients: Sequence[Tensor]) -> None:
    torch.autograd.backward(layers(x), gradients)
