"""Training steps of several methods side by side: ``python -m launch.benchmark steps configs/model/llama_130m.json``.

Started by torchrun or DeepSpeed's launcher, it measures a job of several ranks.
"""

from __future__ import annotations

import json
import math
import os
import sys

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
    zero_stage: int = 1,
    rank: PositiveInt = 128,
    square_multiple: PositiveInt = 1,
    precision: str = "auto",
    layers: PositiveInt | None = None,
    vocab_size: PositiveInt | None = None,
    finetune: bool = False,
    repeats: PositiveInt = 7,
    warmup: PositiveInt = 2,
    profile: bool = False,
    device: str | None = None,
) -> int:
    """Measures whole optimizer steps, in turns, and prints tables and finally a line of JSON.

    Returns 1 if a loss is not finite, because the figures of such steps mean nothing.

    Args:
        model: a LlamaConfig JSON file
        methods: separated by commas; ratios are relative to the first. full, frozen (the decoder's linears do not
            train: no adapter method can be faster), remora, remora_merged, remora_resident, remora_decoupled,
            remora_released, remora_r32 (R a multiple of 32), remora_int8, remora_int8_decoupled, full_compiled,
            remora_compiled, remora_int8_compiled, remora_fp8_compiled, relora, relora_merged, relora_resident,
            relora_int8, plain, peft_lora
        tokens: tokens of a micro-batch on one rank
        sequence_length: tokens of a sequence
        accumulation: micro-batches of a step
        zero_stage: DeepSpeed ZeRO stage of this trainer's methods
        rank: LoRA's r, which also decides the size of MoRA's square matrix
        square_multiple: R is rounded down to a multiple of this number
        precision: bf16, fp32, or auto: bf16 if the hardware is fast with it
        layers: decoder layers; default: as many as the model has
        vocab_size: default: the model's
        finetune: train only adapters, with the defaults of launch/finetune.py; try --methods=peft_lora,lora,mora
        repeats: measured steps of each method
        warmup: steps of each method before the measured ones
        profile: show in which operations a step of each method spends its time
        device: cpu or cuda; default: the device that a run would use here
    """
    faults = []
    if tokens % sequence_length:
        faults.append(f"--tokens: {tokens} is not a multiple of --sequence_length {sequence_length}")
    if precision not in ("auto", "bf16", "fp32"):
        faults.append(f"--precision: got {precision}, expected auto, bf16 or fp32")
    if zero_stage not in range(4):
        faults.append(f"--zero_stage: got {zero_stage}, expected 0 to 3")
    if faults:
        raise ConfigError(faults, "the command line")
    overrides = {"num_hidden_layers": layers, "vocab_size": vocab_size}
    settings = ModelConfig(
        config=model, overrides={key: value for key, value in overrides.items() if value is not None}
    )
    from launch.benchmark.device import chosen_device, device_of_rank

    chosen_device(device)
    from launch.benchmark.contenders import Setting, chosen
    from launch.benchmark.measure import run as measure
    from launch.benchmark.report import as_json, limits, tables
    from launch.benchmark.turns import say
    from relora_mora.engine.start import init_distributed
    from relora_mora.model.config import read_model_config
    from relora_mora.system.hardware import fast_bf16

    names = chosen([name for name in methods.split(",") if name], int(os.environ.get("WORLD_SIZE", "1")))
    model_config = read_model_config(settings)
    model_config.max_position_embeddings = max(model_config.max_position_embeddings, sequence_length)
    my_rank, world_size = init_distributed()
    bf16 = fast_bf16() if precision == "auto" else precision == "bf16"
    setting = Setting(
        model_config,
        tokens,
        sequence_length,
        accumulation,
        zero_stage,
        rank,
        square_multiple,
        bf16,
        device_of_rank(),
        finetune,
    )
    note, show = (say, print) if my_rank == 0 else (lambda text: None, lambda text: None)
    results = measure(names, setting, repeats=repeats, warmup=warmup, note=note, show=show if profile else None)
    if my_rank == 0:
        machine = limits(setting)
        print(tables(results, setting, world_size, machine))
        print(json.dumps(as_json(results, setting, world_size, machine, command=sys.argv[1:])))
    lost = [result.name for result in results if not math.isfinite(result.loss)]
    if lost:
        print(f"the loss is not finite: {', '.join(lost)}; try --precision=fp32", file=sys.stderr)
    return int(bool(lost))
