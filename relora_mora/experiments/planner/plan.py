"""A run's plan, from its settings and the cluster it is to run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig

from relora_mora.adapters.layers import adapter_layers
from relora_mora.config.registry import METHODS
from relora_mora.config.schema import Config
from relora_mora.experiments.planner.cluster import Cluster, StepTime, step_time
from relora_mora.experiments.planner.compute import PRODUCTS_RATE, compute_time
from relora_mora.experiments.planner.network import Traffic, traffic
from relora_mora.optim.groups import Parameters, count_parameters
from relora_mora.sizing.fit import USABLE, choose_resident, uneven_widths
from relora_mora.sizing.flops import Flops, flops_of, meta_model
from relora_mora.sizing.memory import Memory, peak_memory
from relora_mora.sizing.optimizer import passes_bytes, product_flops
from relora_mora.sizing.setup import Setup

STAGES = (0, 1, 2, 3)
ASSUMED_UTILISATION = 0.4  # of a CPU; for a GPU it is calculated
PROCESS_BYTES = (
    0.45 * 2**30
)  # resident in a rank's process on a CPU next to its tensors: Python, torch, DeepSpeed, tokenizer (measured)
FRAGMENTATION = 1.1  # glibc's malloc held 3 to 17 % more than the parts in tiny runs (measured on two cores)


@dataclass(frozen=True)
class Plan:
    """All numbers of one planned run.

    ``memory`` and ``network``, [method][stage], compare the methods with the same settings; ``steps``, [stage], is the
    time of one step of this run.
    """

    parameters: Parameters
    flops: Flops
    matrices: str  # optim.matrices
    optimizer_flops: float  # its matrix products in a step, over all ranks
    memory: dict[str, dict[int, Memory]]
    network: dict[str, dict[int, Traffic]]
    steps: dict[int, StepTime]
    method: str
    zero_stage: int
    cluster: Cluster
    bf16: bool
    on_cpu: bool
    merge_every: int
    tokens_per_step: int
    tokens: int
    tokens_per_second: float
    assumption: str
    notes: list[str]  # on the model's widths
    savings: list[str]  # changes that would need less memory

    @property
    def world_size(self) -> int:
        return self.cluster.world_size

    @property
    def seconds(self) -> float:
        """Time of all steps, without evaluations, checkpoints and merges."""
        return self.tokens / self.tokens_per_second

    @property
    def resident(self) -> float | None:
        """Bytes of the first rank's process on a CPU, in training or at its start; None on other devices.

        In training a tenth of them is for malloc's fragmentation. What a run begins with comes in few large pieces.
        """
        if not self.on_cpu:
            return None
        chosen = self.memory[self.method][self.zero_stage]
        at_start = PROCESS_BYTES + chosen.weights + chosen.masters + chosen.host_base + chosen.host_start
        in_training = PROCESS_BYTES + chosen.device + chosen.host_base + chosen.host_checkpoint
        return max(at_start, FRAGMENTATION * in_training)

    def fits(self, stage: int, method: str | None = None) -> bool | None:
        """Whether a rank's memory fits into a device; None if the device's memory is unknown."""
        available = self.cluster.device.memory_gb * 1e9
        return self.memory[method or self.method][stage].device <= USABLE * available if available else None

    @property
    def sends_less_at_one(self) -> bool:
        """Whether stage 1 is better than the chosen stage 2: it sends less (gradients once a step, not once per
        micro-batch), takes no longer, and is not known to be too large."""
        moved = self.network[self.method]
        sends_less = self.zero_stage == 2 and moved[1].sent < moved[2].sent
        return sends_less and self.steps[1].total <= self.steps[2].total and self.fits(1) is not False

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["flops"] |= {"total": self.flops.total, "performed": self.flops.performed}
        values["memory"] = {
            method: {
                str(stage): {**asdict(memory), "device": memory.device, "fits": self.fits(stage, method)}
                for stage, memory in stages.items()
            }
            for method, stages in self.memory.items()
        }
        values["network"] = {
            method: {
                str(stage): {**asdict(moved), "sent": moved.sent, "sent_in_merge": moved.sent_in_merge}
                for stage, moved in stages.items()
            }
            for method, stages in self.network.items()
        }
        values["steps"] = {str(stage): {**asdict(time), "total": time.total} for stage, time in self.steps.items()}
        return {**values, "world_size": self.world_size, "seconds": self.seconds, "resident": self.resident}


@dataclass(frozen=True)
class _Needs:
    """What a run with one method needs at one ZeRO stage."""

    setup: Setup
    memory: Memory
    network: Traffic
    resident: bool
    performed: float  # FLOPs of a token


def make_plan(
    model_config: PreTrainedConfig,
    config: Config,
    *,
    cluster: Cluster,
    bf16: bool,
    on_cpu: bool,
    peak: tuple[float, str],
    tokens_per_second: float | None = None,
    utilisation: float | None = None,
) -> Plan:
    """Plans a run on a cluster.

    ``peak`` is the FLOP/s of one device and the source of that number; ``log.peak_tflops`` overrides it.
    ``tokens_per_second`` is a measured rate over all devices. Without it the time follows from the arithmetic, the
    peak, memory and network: on a GPU as in ``compute.py``, or at ``utilisation`` of the peak if that is given.
    Raises ValueError if the utilisation is not above 1e-6 and at most 1, or if the rate is not positive.
    """
    if utilisation is not None and not 1e-6 < utilisation <= 1:
        raise ValueError(f"utilisation must be above 1e-6 and at most 1, got {utilisation:g}")
    if tokens_per_second is not None and not tokens_per_second > 0:
        raise ValueError(f"tokens_per_second must be positive, got {tokens_per_second:g}")
    if config.log.peak_tflops is not None:
        peak = config.log.peak_tflops * 1e12, "log.peak_tflops"
    model = meta_model(model_config, config.method)
    methods = _methods(model_config, config, cluster, bf16=bf16, on_cpu=on_cpu)
    own = methods[config.method.name]
    flops = flops_of(model, model_config, config)
    compute, assumption = _compute(own, model_config, cluster, flops, peak, utilisation)
    optimizer_flops = product_flops(model, config.optim)
    counts = count_parameters(model)
    rate = utilisation or (ASSUMED_UTILISATION if on_cpu else PRODUCTS_RATE)
    steps = {
        stage: step_time(
            cluster,
            needs.setup,
            needs.network,
            compute=compute[stage],
            trainable=counts.trainable,
            passes=passes_bytes(model, config.optim),
            products=optimizer_flops / (peak[0] * rate),
        )
        for stage, needs in own.items()
    }
    if tokens_per_second is None:
        speed = config.tokens_per_step / steps[config.train.zero_stage].total
    else:
        speed = tokens_per_second
        reached = f"{speed * flops.total / (cluster.world_size * peak[0]):.1%} of {_of_a_device(peak)}"
        assumption = f"the measured rate, which is {reached}"
    return Plan(
        parameters=counts,
        flops=flops,
        matrices=config.optim.matrices,
        optimizer_flops=optimizer_flops,
        memory={name: {stage: needs.memory for stage, needs in each.items()} for name, each in methods.items()},
        network={name: {stage: needs.network for stage, needs in each.items()} for name, each in methods.items()},
        steps=steps,
        method=config.method.name,
        zero_stage=config.train.zero_stage,
        cluster=cluster,
        bf16=bf16,
        on_cpu=on_cpu,
        merge_every=config.method.merge_every if config.method.merges else 0,
        tokens_per_step=config.tokens_per_step,
        tokens=config.tokens_per_step * config.train.steps,
        tokens_per_second=speed,
        assumption=assumption,
        notes=[] if on_cpu else uneven_widths(model_config),
        savings=[
            *(["lower train.micro_batch_size"] if config.train.micro_batch_size > 1 else []),
            *([] if config.model.activation_checkpointing else ["set model.activation_checkpointing"]),
            "take more or larger devices",
        ],
    )


def _methods(
    model_config: PreTrainedConfig, config: Config, cluster: Cluster, *, bf16: bool, on_cpu: bool
) -> dict[str, dict[int, _Needs]]:
    """[method][stage] for the run's method and for every other method that works with its settings."""
    found: dict[str, dict[int, _Needs]] = {}
    for name in METHODS:
        other = config.model_copy(update={"method": config.method.model_copy(update={"name": name})})
        try:
            model = meta_model(model_config, other.method)
        except ValueError:  # the settings do not fit the model with this method
            continue
        found[name] = {}
        for stage in STAGES:
            setup = Setup(other, stage, cluster.world_size, bf16=bf16, on_gpu=not on_cpu)
            choose_resident(model, setup, cluster.device.memory_gb * 1e9 or None)
            found[name][stage] = _Needs(
                setup,
                peak_memory(model, setup),
                traffic(model, setup),
                resident=any(layer.resident for _, layer in adapter_layers(model)),
                performed=flops_of(model, model_config, other).performed,
            )
    return found


def _compute(
    own: Mapping[int, _Needs],
    model_config: PreTrainedConfig,
    cluster: Cluster,
    flops: Flops,
    peak: tuple[float, str],
    utilisation: float | None,
) -> tuple[dict[int, float], str]:
    """Seconds of a step's arithmetic, by stage, and the assumption behind them in words."""
    config = own[0].setup.config
    arithmetic = flops.performed * config.tokens_per_step / (cluster.world_size * peak[0])  # seconds at the peak
    device = _of_a_device(peak)
    if utilisation is not None or not cluster.device.memory_gbytes_per_s:
        used = ASSUMED_UTILISATION if utilisation is None else utilisation
        said = "assuming" if utilisation is None else "at"
        return dict.fromkeys(STAGES, arithmetic / used), f"{said} {used:.0%} of {device}"
    times = {
        stage: compute_time(
            model_config,
            needs.setup,
            cluster.device,
            peak=peak[0],
            flops_per_token=needs.performed,
            resident=needs.resident,
        )
        for stage, needs in own.items()
    }
    compute = {stage: time.total * own[stage].setup.micro_batches for stage, time in times.items()}
    chosen = config.train.zero_stage
    reached = f"{arithmetic / compute[chosen]:.0%} of {device}"
    return compute, f"calculated, {reached} while it computes ({times[chosen]})"


def _of_a_device(peak: tuple[float, str]) -> str:
    return f"{peak[0] / 1e12:.4g} TFLOP/s a device ({peak[1]})"
