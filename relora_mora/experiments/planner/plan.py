"""A run's plan, from its settings and the cluster it is to run on."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedConfig

from relora_mora.adapters.inject import decoder_layers
from relora_mora.config.checks.combinations import remarks
from relora_mora.config.registry import is_own, split_rule
from relora_mora.config.schema import Config
from relora_mora.experiments.planner.step import Cluster, Step, step_of
from relora_mora.optim.groups import count_parameters
from relora_mora.sizing.fit import USABLE, choose_forms, uneven_widths
from relora_mora.sizing.measure import measure
from relora_mora.sizing.memory import Memory, peak_memory
from relora_mora.sizing.setup import Setup
from relora_mora.sizing.work import meta_model, product_flops

STAGES = (0, 1, 2, 3)
UTILIZATION = 0.4  # share of the peak while devices compute; no GPU has confirmed it
# resident in a rank's process on a CPU next to its tensors: Python, torch, DeepSpeed, tokenizer (measured)
PROCESS_BYTES = 0.45 * 2**30
FRAGMENTATION = 1.1  # glibc's malloc held 3 to 17 % more than the parts in tiny runs (measured on two cores)
LAYER_SECONDS = 1e-4  # 28 launches or more of some microseconds each (docs/performance.md)

Plan = dict[str, Any]


def make_plan(
    model_config: PreTrainedConfig,
    config: Config,
    cluster: Cluster,
    *,
    bf16: bool,
    peak: tuple[float, str],
    measured: float | None = None,
    utilization: float | None = None,
    notes: Sequence[str] = (),
    every_stage: bool = False,
) -> Plan:
    """All numbers of a run, as ``relora-mora plan --json`` prints them: sizes in bytes, times in seconds.

    ``memory`` and ``steps`` are by ZeRO stage: only the one in the settings, or all with ``every_stage``, or if that
    one does not fit. ``peak`` is the FLOP/s of one device and the source of that number; ``log.peak_tflops`` overrides
    it. ``measured`` is a rate in tokens/s over all devices. Without it the time follows from the arithmetic at
    ``utilization`` of the peak, the optimizer's memory traffic, and the network. Raises ValueError if the settings do
    not fit the model.
    """
    if config.log.peak_tflops is not None:
        peak = config.log.peak_tflops * 1e12, "log.peak_tflops"
    model = meta_model(model_config, config.method)
    available = cluster.device.memory_gb * 1e9
    rate = peak[0] * (utilization or UTILIZATION)

    def setup_at(stage: int) -> Setup:
        setup = Setup(config, stage, cluster.world_size, bf16=bf16, on_gpu=not cluster.on_cpu)
        choose_forms(model, setup, available or None)
        return setup

    def at(stage: int) -> tuple[Memory, Step]:
        setup = setup_at(stage)
        return peak_memory(model, setup), step_of(model, setup, cluster, flops, rate)

    own = config.train.zero_stage
    arithmetic = measure(model, setup_at(own))
    flops = arithmetic.flops + arithmetic.recomputed
    memory, step = at(own)
    stages = {own: (memory, step)}
    too_large = bool(available) and memory.device > USABLE * available
    if every_stage or too_large:
        stages = {stage: stages.get(stage) or at(stage) for stage in STAGES}
    fits = {stage: each.device <= USABLE * available if available else None for stage, (each, _) in stages.items()}
    tokens = config.tokens_per_step * config.train.steps
    tokens_per_second = measured or config.tokens_per_step / step.seconds
    optim = config.optim
    own_notes = list(remarks(config))
    if too_large and not any(fits.values()):
        own_notes.insert(
            0,
            "to make it fit: lower train.micro_batch_size, set model.activation_checkpointing or method.base=int8 "
            "(with adapters), or take more or larger devices",
        )
    if is_own(optim.matrices):
        own_notes.append(
            f"the memory of {split_rule(optim.matrices)[1]} is what its state_shapes say, and its work is counted only "
            "if it has flops and workspace_bytes; measure some steps"
        )
    if not cluster.on_cpu:
        own_notes += uneven_widths(model_config)
        layer_seconds = step.compute / config.accumulation_steps(cluster.world_size) / len(decoder_layers(model))
        if measured is None and layer_seconds < LAYER_SECONDS:
            own_notes.append(
                f"the time is too short: at this rate a decoder layer takes {layer_seconds * 1000:.2g} ms for a "
                "micro-batch, and its launches take longer; measure some steps, and give --tokens_per_second"
            )
    return {
        "method": config.method.name,
        "bf16": bf16,
        "zero_stage": own,
        "world_size": cluster.world_size,
        "cluster": asdict(cluster),
        "parameters": asdict(count_parameters(model)),
        "flops": {"total": arithmetic.flops, "recomputed": arithmetic.recomputed},
        "matrices": optim.matrices,
        "others": optim.others,
        "optimizer_flops": product_flops(model, optim),  # of a step, over all ranks
        "memory": {
            stage: asdict(each) | {"device": each.device, "fits": fits[stage]} for stage, (each, _) in stages.items()
        },
        "steps": {stage: asdict(each) | {"seconds": each.seconds} for stage, (_, each) in stages.items()},
        "resident": _resident(memory) if cluster.on_cpu else None,
        "tokens_per_step": config.tokens_per_step,
        "tokens": tokens,
        "tokens_per_second": tokens_per_second,
        "seconds": tokens / tokens_per_second,
        "basis": "as measured" if measured else f"at {utilization or UTILIZATION:.0%} of the peak",
        "assumption": _assumption(cluster, peak, arithmetic.flops, measured, utilization),
        "notes": [*notes, *own_notes],
    }


def _assumption(
    cluster: Cluster, peak: tuple[float, str], flops: float, measured: float | None, utilization: float | None
) -> str:
    """Where the rate comes from, in words."""
    rate, source = peak
    of_peak = f"of {rate / 1e12:.4g} TFLOP/s a device ({source})"
    if measured is not None:
        return f"the measured rate, which is {measured * flops / (cluster.world_size * rate):.1%} {of_peak}"
    if utilization is not None:
        return f"at {utilization:.0%} {of_peak}"
    unconfirmed = "" if cluster.on_cpu else ", which no GPU has confirmed"
    return f"assuming {UTILIZATION:.0%} {of_peak}{unconfirmed}"


def _resident(memory: Memory) -> float:
    """Bytes of the first rank's process on a CPU, in training or at its start.

    In training a tenth of them is for malloc's fragmentation. The initial weights come in a few large pieces.
    """
    at_start = PROCESS_BYTES + memory.weights + memory.masters + memory.host_base + memory.host_start
    in_training = PROCESS_BYTES + memory.device + memory.host_base + memory.host_checkpoint
    return max(at_start, FRAGMENTATION * in_training)
