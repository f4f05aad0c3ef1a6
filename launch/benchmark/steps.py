"""Training steps of several methods side by side: ``python -m launch.benchmark steps configs/model/llama_130m.json``.

Started by torchrun or DeepSpeed's launcher, it measures a job of several ranks.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any, Literal

import pandas as pd

from relora_mora.cli.arguments import PositiveInt
from relora_mora.config.load import ConfigError
from relora_mora.config.schema import ModelConfig

DEFAULT = "full,remora,remora_decoupled,relora"


def main(
    model: str,
    *,
    methods: str = DEFAULT,
    tokens: PositiveInt = 4096,
    sequence_length: PositiveInt = 512,
    accumulation: PositiveInt = 1,
    zero_stage: Literal[0, 1, 2, 3] = 1,
    rank: PositiveInt = 128,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    layers: PositiveInt | None = None,
    vocab_size: PositiveInt | None = None,
    finetune: bool = False,
    repeats: PositiveInt = 7,
    warmup: PositiveInt = 2,
    device: Literal["cpu", "cuda"] | None = None,
) -> int:
    """Measures whole optimizer steps, in turns, and prints tables and finally a line of JSON.

    Returns 1 if a loss is not finite, because the figures of such steps mean nothing.

    Args:
        model: a LlamaConfig JSON file
        methods: separated by commas; ratios are relative to the first. full, lora, mora, relora, remora; frozen (the
            decoder's linears do not train: no adapter method can be faster); plain (transformers in a loop of torch),
            peft_lora. Options follow the name: remora_resident, remora_int8_decoupled, full_compiled
        tokens: tokens of a micro-batch on one rank
        sequence_length: tokens of a sequence
        accumulation: micro-batches of a step
        zero_stage: DeepSpeed ZeRO stage of this trainer's methods
        rank: LoRA's r, which also decides the size of MoRA's square matrix
        precision: bf16, fp32, or auto: bf16 if the hardware is fast with it
        layers: decoder layers; default: as many as the model has
        vocab_size: default: the model's
        finetune: train only adapters, with the defaults of launch/finetune.py; try --methods=peft_lora,lora,mora
        repeats: measured steps of each method
        warmup: steps of each method before the measured ones
        device: cpu or cuda; default: the device that a run would use here
    """
    if tokens % sequence_length:
        fault = f"--tokens: {tokens} is not a multiple of --sequence_length {sequence_length}"
        raise ConfigError([fault], "the command line")
    overrides = {"num_hidden_layers": layers, "vocab_size": vocab_size}
    settings = ModelConfig(config=model, overrides={key: value for key, value in overrides.items() if value})
    import torch

    from launch.benchmark.turns import chosen_device, device_of_rank

    chosen_device(device)
    from launch.benchmark.contenders import Setting, chosen
    from launch.benchmark.measure import run as measure
    from relora_mora.engine.start import init_distributed
    from relora_mora.model.config import read_model_config
    from relora_mora.system.hardware import device_name, fast_bf16, peak_flops
    from relora_mora.system.process import say

    names = chosen([name for name in methods.split(",") if name], int(os.environ.get("WORLD_SIZE", "1")))
    model_config = read_model_config(settings)
    model_config.max_position_embeddings = max(model_config.max_position_embeddings, sequence_length)
    my_rank, world_size = init_distributed()
    bf16 = fast_bf16() if precision == "auto" else precision == "bf16"
    sizes = (tokens, sequence_length, accumulation)
    setting = Setting(model_config, *sizes, zero_stage, rank, bf16, device_of_rank(), finetune)
    peak, _ = peak_flops(bf16=bf16)
    note = say if my_rank == 0 else lambda text: None
    found = measure(names, setting, repeats=repeats, warmup=warmup, peak=peak, note=note)
    if my_rank == 0:
        machine = {
            "device": device_name(),
            "threads": torch.get_num_threads(),
            "world_size": world_size,
            "precision": "bf16" if bf16 else "fp32",
            "torch": torch.__version__,
            "matrix_product_tflops": peak / 1e12,
        }
        print(
            f"{model_config.num_hidden_layers} layers, hidden {model_config.hidden_size}, vocabulary "
            f"{model_config.vocab_size}; {tokens} tokens x {accumulation} x {world_size} ranks, "
            f"{machine['precision']}, ZeRO-{zero_stage}, r = {rank}; {machine['device']}, "
            f"{machine['threads']} threads a rank: {machine['matrix_product_tflops']:.2f} TFLOP/s"
        )
        print(table(found))
        print(json.dumps({"command": sys.argv[1:], **machine, "methods": found}))
    lost = [name for name, fields in found.items() if not math.isfinite(fields["loss"])]
    if lost:
        print(f"the loss is not finite: {', '.join(lost)}; try --precision=fp32", file=sys.stderr)
    return int(bool(lost))


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


RATIOS = ("step_seconds", "trainable_parameters", "bytes_held", "bytes_at_peak", "bytes_sent")
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "step s": ("step_seconds", "{:.3f}".format),
    "+-": ("spread", "{:.1%}".format),
    "tok/s": ("tokens_per_second", "{:,.0f}".format),
    "use": ("utilization", "{:.0%}".format),
    "merge": ("merge_steps", "{:.2f}x".format),
    "trains": ("trainable_parameters", "{:,}".format),
    "state MiB": ("bytes_held", _mib),
    "peak MiB": ("bytes_at_peak", _mib),
    "sent MiB": ("bytes_sent", _mib),
}


def table(found: dict[str, dict[str, Any]]) -> str:
    """A line for each method, with ratios to the first; bytes are those of one rank."""
    shown = pd.DataFrame(index=[*found])
    for title, (key, show) in COLUMNS.items():
        values = [fields[key] for fields in found.values()]
        shown[title] = ["" if value is None else show(value) for value in values]
        if key in RATIOS and values[0]:
            shown[f"{title.split()[0]} ratio"] = [f"{value / values[0]:.3f}" for value in values]
    return shown.to_string()
