"""A run's plan, from its settings and the cluster it is to run on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from relora_mora.config.checks.combinations import remarks
from relora_mora.config.registry import METHODS, is_own, split_rule
from relora_mora.config.schema import Config
from relora_mora.experiments.planner.cluster import Cluster, StepTime, step_time
from relora_mora.experiments.planner.network import Traffic, traffic
from relora_mora.optim.groups import Parameters, count_parameters
from relora_mora.sizing.fit import USABLE, choose_forms, uneven_widths
from relora_mora.sizing.memory import Memory, peak_memory
from relora_mora.sizing.setup import Setup
from relora_mora.sizing.work import Flops, flops_of, meta_model, passes_bytes, product_flops
from relora_mora.system.devices import WITHOUT_FP8, Device

STAGES = (0, 1, 2, 3)
ASSUMED_UTILIZATION = 0.4  # share of the peak while devices compute; no GPU has confirmed it
# resident in a rank's process on a CPU next to its tensors: Python, torch, DeepSpeed, tokenizer (measured)
PROCESS_BYTES = 0.45 * 2**30
FRAGMENTATION = 1.1  # glibc's malloc held 3 to 17 % more than the parts in tiny runs (measured on two cores)


@dataclass(frozen=True)
class Time:
    """``steps``: one step at each ZeRO stage. ``assumption``: in words, where the rate comes from."""

    steps: dict[int, StepTime]
    tokens: int  # of all steps
    tokens_per_second: float
    assumption: str

    @property
    def seconds(self) -> float:
        """Time of all steps, without evaluations, checkpoints and merges."""
        return self.tokens / self.tokens_per_second


@dataclass(frozen=True)
class Plan:
    """All numbers of one planned run.

    ``memory`` and ``network``, [method][stage], compare the methods with the same settings.
    """

    config: Config
    cluster: Cluster
    bf16: bool
    on_cpu: bool
    parameters: Parameters
    flops: Flops  # of a token
    optimizer_flops: float  # matrix products of the optimizer in a step, over all ranks
    memory: dict[str, dict[int, Memory]]
    network: dict[str, dict[int, Traffic]]
    time: Time
    notes: list[str]  # on what the time leaves out, fp8, and the model's widths

    @property
    def method(self) -> str:
        return self.config.method.name

    @property
    def zero_stage(self) -> int:
        return self.config.train.zero_stage

    @property
    def merge_every(self) -> int:
        """Steps between merges; 0 if there are none."""
        method = self.config.method
        return method.merge_every if method.merges and method.merge_every < self.config.train.steps else 0

    @property
    def savings(self) -> list[str]:
        """Changes that would need less memory."""
        return [
            *(["lower train.micro_batch_size"] if self.config.train.micro_batch_size > 1 else []),
            *([] if self.config.model.activation_checkpointing else ["set model.activation_checkpointing"]),
            "take more or larger devices",
        ]

    @property
    def resident(self) -> float | None:
        """Bytes of the first rank's process on a CPU, in training or at its start; None on other devices.

        In training a tenth of them is for malloc's fragmentation. The initial weights come in a few large pieces.
        """
        if not self.on_cpu:
            return None
        chosen = self.memory[self.method][self.zero_stage]
        at_start = PROCESS_BYTES + chosen.weights + chosen.masters + chosen.host_base + chosen.host_start
        in_training = PROCESS_BYTES + chosen.device + chosen.host_base + chosen.host_checkpoint
        return max(at_start, FRAGMENTATION * in_training)

    def fits(self, stage: int, method: str | None = None) -> bool | None:
        """Whether a rank's memory, by default that of the run, fits into a device; None if its memory is unknown."""
        available = self.cluster.device.memory_gb * 1e9
        needed = self.memory[method or self.method][stage].device
        return needed <= USABLE * available if available else None

    @property
    def sends_less_at_one(self) -> bool:
        """Whether stage 1 is better than the chosen stage 2.

        Stage 1 must send less (gradients once a step, not once per micro-batch), take no longer, and not be known to be
        too large.
        """
        moved = self.network[self.method]
        steps = self.time.steps
        sends_less = self.zero_stage == 2 and moved[1].sent < moved[2].sent
        return sends_less and steps[1].total <= steps[2].total and self.fits(1) is not False

    def as_dict(self) -> dict[str, Any]:
        """All numbers for JSON; sizes in bytes, times in seconds."""
        return {
            "parameters": asdict(self.parameters),
            "flops": _with(self.flops, "total", "performed"),
            "matrices": self.config.optim.matrices,
            "others": self.config.optim.others,
            "optimizer_flops": self.optimizer_flops,
            "memory": {
                method: {
                    str(stage): {**_with(memory, "device"), "fits": self.fits(stage, method)}
                    for stage, memory in stages.items()
                }
                for method, stages in self.memory.items()
            },
            "network": {
                method: {str(stage): _with(moved, "sent", "sent_in_merge") for stage, moved in stages.items()}
                for method, stages in self.network.items()
            },
            "steps": {str(stage): _with(step, "total") for stage, step in self.time.steps.items()},
            "method": self.method,
            "zero_stage": self.zero_stage,
            "cluster": asdict(self.cluster),
            "bf16": self.bf16,
            "on_cpu": self.on_cpu,
            "merge_every": self.merge_every,
            "tokens_per_step": self.config.tokens_per_step,
            "tokens": self.time.tokens,
            "tokens_per_second": self.time.tokens_per_second,
            "assumption": self.time.assumption,
            "notes": self.notes,
            "savings": self.savings,
            "world_size": self.cluster.world_size,
            "seconds": self.time.seconds,
            "resident": self.resident,
        }


def _with(numbers: Flops | Memory | Traffic | StepTime, *totals: str) -> dict[str, Any]:
    """The fields, and these properties."""
    return asdict(numbers) | {name: getattr(numbers, name) for name in totals}


@dataclass(frozen=True)
class _Needs:
    """What a run with one method needs at one ZeRO stage."""

    setup: Setup
    memory: Memory
    network: Traffic


def make_plan(
    model_config: PreTrainedConfig,
    config: Config,
    *,
    cluster: Cluster,
    bf16: bool,
    on_cpu: bool,
    peak: tuple[float, str],
    tokens_per_second: float | None = None,
    utilization: float | None = None,
) -> Plan:
    """Plans a run on a cluster.

    ``peak`` is the FLOP/s of one device and the source of that number; ``log.peak_tflops`` overrides it.
    ``tokens_per_second`` is a measured rate over all devices. Without it the time follows from the arithmetic at
    ``utilization`` of the peak (None: 0.4), the optimizer's memory traffic, and the network.
    Raises ValueError if the utilization is not above 1e-6 and at most 1, or if the rate is not positive.
    """
    if utilization is not None and not 1e-6 < utilization <= 1:
        raise ValueError(f"utilization must be above 1e-6 and at most 1, got {utilization:g}")
    if tokens_per_second is not None and not tokens_per_second > 0:
        raise ValueError(f"tokens_per_second must be positive, got {tokens_per_second:g}")
    if config.log.peak_tflops is not None:
        peak = config.log.peak_tflops * 1e12, "log.peak_tflops"
    model = meta_model(model_config, config.method)
    flops = flops_of(model, model_config, config)
    needs = _needs(model_config, config, cluster, bf16=bf16, on_cpu=on_cpu)
    return Plan(
        config,
        cluster,
        bf16,
        on_cpu,
        count_parameters(model),
        flops,
        product_flops(model, config.optim),
        memory={name: {stage: each.memory for stage, each in stages.items()} for name, stages in needs.items()},
        network={name: {stage: each.network for stage, each in stages.items()} for name, stages in needs.items()},
        time=_time(needs[config.method.name], model, cluster, flops, peak, tokens_per_second, utilization),
        notes=[
            *remarks(config),
            *_rule_notes(config),
            *([] if on_cpu else [*_fp8_notes(config, cluster.device), *uneven_widths(model_config)]),
        ],
    )


def _rule_notes(config: Config) -> list[str]:
    """What is not known of a rule of one's own."""
    if not is_own(config.optim.matrices):
        return []
    rule = split_rule(config.optim.matrices)[1]
    return [
        f"the memory of {rule} is what its state_shapes say, and its work is counted only if it has flops and "
        "workspace_bytes; measure some steps"
    ]


def _fp8_notes(config: Config, device: Device) -> list[str]:
    """What the start of a run on this device would say about its products in fp8."""
    method = config.method
    if method.eight_bits != "fp8" or method.base_products is not True or device.name not in WITHOUT_FP8:
        return []
    return [
        f"a run with method.base=fp8 is refused here: {device.name} has no fp8 products; "
        "use method.base=int8, or method.base_products=false"
    ]


def _needs(
    model_config: PreTrainedConfig,
    config: Config,
    cluster: Cluster,
    *,
    bf16: bool,
    on_cpu: bool,
) -> dict[str, dict[int, _Needs]]:
    """[method][stage] for the run's method and for every other method that works with its settings."""
    available = cluster.device.memory_gb * 1e9 or None
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
            choose_forms(model, setup, available)
            found[name][stage] = _Needs(setup, peak_memory(model, setup), traffic(model, setup))
    return found


def _time(
    own: Mapping[int, _Needs],
    model: PreTrainedModel,
    cluster: Cluster,
    flops: Flops,
    peak: tuple[float, str],
    tokens_per_second: float | None,
    utilization: float | None,
) -> Time:
    """The time of a run whose needs at each stage are ``own``."""
    config = own[0].setup.config
    used = utilization or ASSUMED_UTILIZATION
    of_peak = f"of {peak[0] / 1e12:.4g} TFLOP/s a device ({peak[1]})"
    cluster_peak = cluster.world_size * peak[0]
    assumption = f"{'at' if utilization else 'assuming'} {used:.0%} {of_peak}"
    if utilization is None and own[0].setup.on_gpu:
        assumption += ", which no GPU has confirmed"
    steps = {
        stage: step_time(
            cluster,
            needs.setup,
            needs.network,
            compute=flops.performed * config.tokens_per_step / (cluster_peak * used),
            trainable=count_parameters(model).trainable,
            passes=passes_bytes(model, config.optim),
            products=product_flops(model, config.optim) / (peak[0] * used),
        )
        for stage, needs in own.items()
    }
    if tokens_per_second is None:
        tokens_per_second = config.tokens_per_step / steps[config.train.zero_stage].total
    else:
        assumption = f"the measured rate, which is {tokens_per_second * flops.total / cluster_peak:.1%} {of_peak}"
    return Time(steps, config.tokens_per_step * config.train.steps, tokens_per_second, assumption)
