"""A run's plan, from its settings and the cluster it is to run on, and one step: what its ranks send, and how long it
takes.

What a step sends is computed from shapes after the sources of DeepSpeed 0.19; a test counts the bytes of two-rank
steps. Merges, which are rare, and latencies are not counted. docs/clusters.md has the bytes of each stage in a table.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from relora_mora.adapters.inject import decoder_layers
from relora_mora.adapters.stored import with_products
from relora_mora.config.checks.combinations import remarks
from relora_mora.config.checks.deepspeed import zero_defaults
from relora_mora.config.registry import is_own, split_rule
from relora_mora.config.schema import Config
from relora_mora.experiments.planner.given import read_run
from relora_mora.optim.groups import count_parameters
from relora_mora.optim.own import with_rule
from relora_mora.sizing.fit import USABLE, check_adapters, choose_forms, uneven_widths
from relora_mora.sizing.measure import Pass, measure
from relora_mora.sizing.memory import Memory, peak_memory, weight_bytes
from relora_mora.sizing.setup import MAX_REUSE_DISTANCE, Setup
from relora_mora.sizing.work import exchanged_bytes, meta_model, passes_bytes, product_flops
from relora_mora.system.devices import CPU, Device
from relora_mora.system.hardware import device_here, fast_bf16, peak_flops

STAGES = (0, 1, 2, 3)
UTILIZATION = 0.4  # share of the peak while devices compute; no GPU has confirmed it
# resident in a rank's process on a CPU next to its tensors: Python, torch, DeepSpeed, tokenizer (measured)
PROCESS_BYTES = 0.45 * 2**30
FRAGMENTATION = 1.1  # glibc's malloc held 3 to 17 % more than the parts in tiny runs (measured on two cores)
LAYER_SECONDS = 1e-4  # 28 launches or more of some microseconds each (docs/performance.md)
Plan = dict[str, Any]
BACKWARD_SHARE = 2 / 3  # of compute
_WIDTHS = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Cluster:
    """Hosts with equal devices. ``link_gbits``: the network of one host, all its cards together; None: the vendor's."""

    nodes: int
    devices_per_node: int
    device: Device
    link_gbits: float | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def on_cpu(self) -> bool:
        return self.device.name == CPU.name

    @property
    def node_gbits(self) -> float:
        return self.device.node_gbits * self.devices_per_node if self.link_gbits is None else self.link_gbits

    def seconds_to_send(self, size: float) -> float:
        """Seconds for ``size`` bytes that each device of a ring sends; 0 if no bandwidth is known.

        The slowest part of the ring decides: between devices of a host, or between hosts, of which each sends as many
        bytes as a device.
        """
        rates = [self.device.peer_gbytes_per_s * 1e9] if self.devices_per_node > 1 else []
        rates += [self.node_gbits * 1e9 / 8] if self.nodes > 1 else []
        return max([0.0, *(size / rate for rate in rates if rate)])


@dataclass(frozen=True)
class Step:
    """Bytes that a rank passes to collectives in a step, bytes that it ``sent`` in a ring for them, and seconds.

    ``all_reduced``: gradients whose sum every rank gets. ``reduced``: gradients whose sum only its owner gets.
    ``gathered``: weights that training waits for, after the step or, at stage 3, in forward and backward.
    ``exchanged``: the pieces of matrices that an optimizer needs whole, to their owners and back.
    ``hidden``: the seconds of ``network`` in which devices compute.
    """

    all_reduced: float
    reduced: float
    gathered: float
    exchanged: float
    sent: float
    compute: float
    optimizer: float
    network: float
    hidden: float

    @property
    def seconds(self) -> float:
        return self.compute + self.optimizer + self.network - self.hidden


def step_of(model: PreTrainedModel, setup: Setup, cluster: Cluster, flops_per_token: float, rate: float) -> Step:
    """A step without evaluations and checkpoints; ``rate``: FLOP/s of a device while it computes.

    The model may be on the meta device. In a ring of N ranks a device sends 2 (N - 1) / N of the all-reduced bytes, and
    (N - 1) / N of the others.
    """
    stage, ranks = setup.stage, setup.world_size
    trained = count_parameters(model).trainable
    in_transit = _WIDTHS.get(str(setup.config.train.deepspeed.get("communication_data_type")), setup.width)
    gradients = in_transit * trained * (setup.micro_batches if stage >= 2 else 1)
    gathered = _gathered_at_stage_3(model, setup) if stage == 3 else setup.width * trained if stage else 0
    exchanged = exchanged_bytes(model, setup)
    in_ring = (ranks - 1) / ranks
    sent_gradients = in_ring * gradients * (1 if stage == 3 else 2)
    sent = sent_gradients + in_ring * (gathered + exchanged)

    compute = flops_per_token * setup.config.tokens_per_step / (ranks * rate)
    # element-wise passes at the memory's bandwidth, and products at the rate of the arithmetic
    passes = passes_bytes(model, setup.config.optim) + trained * setup.width
    bandwidth = cluster.device.memory_gbytes_per_s * 1e9
    optimizer = product_flops(model, setup.config.optim) / rate + (passes / bandwidth if bandwidth else 0.0)
    hidden = 0.0
    defaults = zero_defaults(stage, ranks, trained, on_gpu=setup.on_gpu)
    if stage == 3 and setup.zero("overlap_comm", True):
        hidden = min(cluster.seconds_to_send(sent_gradients + in_ring * gathered), compute)
    if stage == 2 and setup.zero("overlap_comm", defaults.get("overlap_comm", False)):
        hidden = min(cluster.seconds_to_send(sent_gradients), BACKWARD_SHARE * compute)
    return Step(
        all_reduced=0 if stage == 3 else gradients,
        reduced=gradients if stage == 3 else 0,
        gathered=gathered,
        exchanged=exchanged,
        sent=sent,
        compute=compute,
        optimizer=optimizer / setup.sharers,
        network=cluster.seconds_to_send(sent),
        hidden=hidden,
    )


def _gathered_at_stage_3(model: PreTrainedModel, setup: Setup) -> float:
    """Bytes of weights: all in every forward, and in backward those again that are not used again soon.

    Small parameters are gathered once a step.
    """
    every = sum(parameter.numel() for parameter in model.parameters())
    persistent = setup.persistent(model)
    again = max(0, every - setup.zero("stage3_max_reuse_distance", MAX_REUSE_DISTANCE) / 2)
    of_micro_batch = weight_bytes(model, setup) / every * (every - persistent + again)
    return setup.micro_batches * of_micro_batch + setup.width * persistent


def plan_of(
    given: str,
    overrides: Mapping[str, str],
    cluster: Cluster,
    *,
    finetune: bool = False,
    measured: float | None = None,
    utilization: float | None = None,
    every_stage: bool = False,
) -> Plan:
    """All numbers of a run, as ``relora-mora plan --json`` prints them: sizes in bytes, times in seconds.

    ``memory`` and ``steps`` are by ZeRO stage: only the one in the settings, or all with ``every_stage``, or if that
    one does not fit. ``measured`` is a rate in tokens/s over all devices. Without it the time follows from the
    arithmetic at ``utilization`` of the peak, the optimizer's memory traffic, and the network. Raises
    :class:`ConfigError`.
    """
    config, model_config, notes = read_run(given, overrides, world_size=cluster.world_size, finetune=finetune)
    check_adapters(model_config, config.method)
    config, bf16, peak, source = _on_device(with_rule(config), cluster)
    model = meta_model(model_config, config.method)
    available = cluster.device.memory_gb * 1e9
    share = utilization or UTILIZATION

    def at(stage: int) -> tuple[Memory, Step, Pass]:
        setup = Setup(config, stage, cluster.world_size, bf16=bf16, on_gpu=not cluster.on_cpu)
        choose_forms(model, setup, available or None)
        seen = measure(model, setup)
        step = step_of(model, setup, cluster, seen.flops + seen.recomputed, peak * share)
        return peak_memory(model, setup), step, seen

    own = config.train.zero_stage
    stages = {own: at(own)}
    memory, step, arithmetic = stages[own]
    too_large = bool(available) and memory.device > USABLE * available
    if every_stage or too_large:
        stages = {stage: stages.get(stage) or at(stage) for stage in STAGES}
    fits = {stage: each.device <= USABLE * available if available else None for stage, (each, *_) in stages.items()}
    tokens = config.tokens_per_step * config.train.steps
    tokens_per_second = measured or config.tokens_per_step / step.seconds
    if measured:
        share = measured * arithmetic.flops / (cluster.world_size * peak)
    found = "the peak measured now" if source.startswith("measured") else "the peak"
    unconfirmed = "" if measured or utilization or cluster.on_cpu else ", which no GPU has confirmed"
    notes += remarks(config)
    if too_large and not any(fits.values()):
        notes.append(
            "to make it fit: lower train.micro_batch_size, set model.activation_checkpointing or method.base=int8 "
            "(with adapters), or take more or larger devices"
        )
    if is_own(config.optim.matrices):
        notes.append(
            f"the memory of {split_rule(config.optim.matrices)[1]} is what its state_shapes say, and its work is "
            "counted only if it has flops and workspace_bytes; measure some steps"
        )
    if not cluster.on_cpu:
        notes += uneven_widths(model_config)
        layer_seconds = step.compute / config.accumulation_steps(cluster.world_size) / len(decoder_layers(model))
        if measured is None and layer_seconds < LAYER_SECONDS:
            notes.append(
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
        "matrices": config.optim.matrices,
        "others": config.optim.others,
        "optimizer_flops": product_flops(model, config.optim),  # of a step, over all ranks
        "memory": {
            stage: asdict(each) | {"device": each.device, "fits": fits[stage]} for stage, (each, *_) in stages.items()
        },
        "steps": {stage: asdict(each) | {"seconds": each.seconds} for stage, (_, each, _) in stages.items()},
        "resident": _resident(memory) if cluster.on_cpu else None,
        "tokens_per_step": config.tokens_per_step,
        "tokens": tokens,
        "tokens_per_second": tokens_per_second,
        "seconds": tokens / tokens_per_second,
        "basis": "as measured" if measured else f"at {share:.0%} of {found}",
        "assumption": f"{share:.1%} of {peak / 1e12:.4g} TFLOP/s a device ({source}){unconfirmed}",
        "notes": notes,
    }


def _on_device(config: Config, cluster: Cluster) -> tuple[Config, bool, float, str]:
    """The settings with the products in 8 bits that the device decides, whether it computes in bf16, and its FLOP/s
    with the source of that number.
    """
    device, on_cpu = cluster.device, cluster.on_cpu
    is_here = device == device_here()
    bf16 = config.train.precision == "bf16"
    if config.train.precision == "auto":
        bf16 = fast_bf16() if is_here else not on_cpu
    capability = None if on_cpu else torch.cuda.get_device_capability() if is_here else device.capability
    method, _ = with_products(config.method, bf16=bf16, capability=capability, vnni=torch.cpu._is_vnni_supported())
    config = config.model_copy(update={"method": method})
    if config.log.peak_tflops is not None:
        return config, bf16, config.log.peak_tflops * 1e12, "log.peak_tflops"
    if not (on_cpu or is_here):
        name = "bf16" if bf16 else "the peak of bf16; float32 is slower, so give log.peak_tflops"
        return config, bf16, device.tflops * 1e12, f"{name}, {device.source}"
    rate, source = peak_flops(bf16=bf16, on_cpu=on_cpu)
    sharers = cluster.devices_per_node if on_cpu else 1  # a host's ranks share its cores
    return config, bf16, rate / sharers, source


def _resident(memory: Memory) -> float:
    """Bytes of the first rank's process on a CPU, in training or at its start.

    In training a tenth of them is for malloc's fragmentation. The initial weights come in a few large pieces.
    """
    at_start = PROCESS_BYTES + memory.weights + memory.masters + memory.host_base + memory.host_start
    in_training = PROCESS_BYTES + memory.device + memory.host_base + memory.host_checkpoint
    return max(at_start, FRAGMENTATION * in_training)
