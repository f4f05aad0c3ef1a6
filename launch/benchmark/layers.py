"""Forward and backward of the linears of a decoder layer: frozen, trained, and with adapters in each form.

python -m launch.benchmark layers configs/model/llama_130m.json [--tokens=4096] [--dtype=bf16] [--threads=2]
    [--operator=1] [--device=cuda]
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from launch.benchmark.device import chosen_device, seconds_of
from launch.benchmark.turns import medians, say, take_turns
from relora_mora import kernels
from relora_mora.adapters.inject import storage_of
from relora_mora.adapters.layers import AdapterLinear
from relora_mora.adapters.lora import LoRALinear
from relora_mora.adapters.mora import MoRALinear, layer_square_size
from relora_mora.cli.arguments import PositiveInt
from relora_mora.config.registry import OPERATORS
from relora_mora.config.schema import MethodConfig, ModelConfig
from relora_mora.model.config import read_model_config
from relora_mora.model.widths import head_width
from relora_mora.operators import MORA_TYPES
from relora_mora.sizing.fit import check_adapters
from relora_mora.system.hardware import device_name

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
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
    dtype: str = "bf16",
    threads: PositiveInt | None = None,
    rank: PositiveInt = 128,
    operator: int = 1,
    repetitions: PositiveInt = 7,
    device: str | None = None,
) -> None:
    """Prints milliseconds of each variant, its ratio to the frozen linears, and the same as one line of JSON.

    Variants take turns, and the median of each counts, so that other work on the machine affects all of them. Resident
    variants do not build W + delta again, which a step does once. "merged int8" is only stored in 8 bits.

    Args:
        model: a model's JSON file such as configs/model/llama_130m.json
        tokens: rows of the inputs
        dtype: bf16 or fp32
        threads: threads of torch and of the compiled kernels; default: torch's choice
        rank: LoRA's r; the square matrices have as many parameters
        operator: the type of MoRA's operators, 1, 2, 3, 4, 6 or 7
        repetitions: turns of each variant, after one that does not count
        device: cpu or cuda; default: the device that a run would use here
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: got {dtype}, expected {' or '.join(DTYPES)}")
    if operator not in MORA_TYPES:
        raise ValueError(f"--operator: got {operator}, expected one of {', '.join(map(str, MORA_TYPES))}")
    if threads:
        torch.set_num_threads(threads)
    place = chosen_device(device)
    method = MethodConfig(rank=rank)
    model_config = read_model_config(ModelConfig(config=model))
    check_adapters(model_config, method)
    layers = linears(model_config)
    variants = {name: Variant(name, layers, method, operator, tokens, DTYPES[dtype], place) for name in VARIANTS}
    measures = {name: variant.milliseconds for name, variant in variants.items()}
    milliseconds = medians(list(take_turns(measures, rounds=repetitions, warmup=1, note=say)))
    ratios = {name: value / milliseconds["frozen"] for name, value in milliseconds.items()}
    print(
        f"{device_name()}: {tokens:,} tokens, {dtype}, {torch.get_num_threads()} threads, r={rank}, "
        f"operator {operator}; kernels: {kernels.describe(place.type)}"
    )
    for name in VARIANTS:
        print(f"{name:20}{milliseconds[name]:10.3f} ms {ratios[name]:8.3f}")
    print(json.dumps({"device": device_name(), "milliseconds": milliseconds, "ratio_to_frozen": ratios}))


def linears(model_config: PreTrainedConfig) -> list[tuple[int, tuple[int, ...]]]:
    """(in, outs) of the linears that share an input: q, k, v; o; gate, up; down."""
    shared = getattr(model_config, "num_key_value_heads", None) or model_config.num_attention_heads
    queries, keys = (head_width(model_config) * heads for heads in (model_config.num_attention_heads, shared))
    hidden = model_config.hidden_size
    wide = model_config.intermediate_size
    return [(hidden, (queries, keys, keys)), (queries, (hidden,)), (hidden, (wide, wide)), (wide, (hidden,))]


class Variant:
    """One form of the linears; all variants start from the same weights and get the same inputs."""

    def __init__(
        self,
        name: str,
        shapes: list[tuple[int, tuple[int, ...]]],
        method: MethodConfig,
        operator: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.device = device
        self.torch_only = name.endswith("torch")
        generator = torch.Generator().manual_seed(0)
        form = next((form for form in ("decoupled", "resident") if form in name), "merged")
        settings = method.model_copy(update={"base": "int8", "base_products": form != "merged"})

        def make(linear: nn.Linear) -> nn.Module:
            if name.startswith("mora"):
                size = layer_square_size(method, linear.in_features, linear.out_features)
                return MoRALinear(linear, size - size % 2 if OPERATORS[operator].even_size else size, operator, form)
            if name.startswith("lora"):
                return LoRALinear(linear, method.rank, None, generator, form)
            return linear.requires_grad_(name == "full")

        self.groups: list[tuple[Tensor, _SameInput, list[Tensor]]] = []
        for inputs, outs in shapes:
            layers = _SameInput(make(nn.Linear(inputs, out, bias=False, dtype=dtype)).to(device) for out in outs)
            for layer in layers:
                if isinstance(layer, AdapterLinear):
                    if name.endswith("int8"):
                        layer.stored = storage_of(layer, settings, on_gpu=device.type == "cuda")
                        layer.pack()
                    layer.keep_merged()
            MoRALinear.share_input(layers, [layer for layer in layers if isinstance(layer, MoRALinear)])
            x, *gradients = (
                torch.randn(tokens, width, generator=generator).to(device, dtype) for width in (inputs, *outs)
            )
            self.groups.append((x.requires_grad_(), layers, gradients))

    def milliseconds(self) -> float:
        """The time of one forward and backward."""
        seconds = 0.0
        with kernels.disabled() if self.torch_only else contextlib.nullcontext():
            for x, layers, gradients in self.groups:
                output = x.clone()  # another module's output, as in a model
                seconds += seconds_of(partial(_forward_and_backward, layers, output, gradients), self.device)
                x.grad = None
                for parameter in layers.parameters():
                    parameter.grad = None
        return 1000 * seconds


class _SameInput(nn.ModuleList):
    """Layers of a module that calls all of them with the same input."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self]


def _forward_and_backward(layers: _SameInput, x: Tensor, gradients: Sequence[Tensor]) -> None:
    torch.autograd.backward(layers(x), gradients)
