"""A run's plan, from its settings and the cluster it is to run on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from relora_mora.config.checks.combinations import remarks
from relora_mora.config.registry import METHODS, Adapter, is_own, split_rule
from relora_mora.config.schema import Config
from relora_mora.experiments.planner.cluster import Cluster, StepTime, step_time
from relora_mora.experiments.planner.network import Traffic, traffic
from relora_mora.optim.groups import Parameters, count_parameters
from relora_mora.sizing.fit import USABLE, choose_forms, uneven_widths
from relora_mora.sizing.measured import Flops, flops_of, meta_model
from relora_mora.sizing.memory import Memory, peak_memory
from relora_mora.sizing.setup import Setup
from relora_mora.sizing.work import passes_bytes, product_flops
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
        names: tuple[str, ...] = (
            "parameters",
            "flops",
            "optimizer_flops",
            "memory",
            "network",
            "cluster",
            "bf16",
            "on_cpu",
            "notes",
        )
        names += ("method", "zero_stage", "merge_every", "savings", "resident")
        found = {name: _plain(getattr(self, name)) for name in names}
        for method, stages in self.memory.items():
            for stage in stages:
                found["memory"][method][str(stage)]["fits"] = self.fits(stage, method)
        return found | {
            "matrices": self.config.optim.matrices,
            "others": self.config.optim.others,
            "tokens_per_step": self.config.tokens_per_step,
            "world_size": self.cluster.world_size,
            "seconds": self.time.seconds,
            **_plain(self.time),
            "steps": _plain(self.time.steps),
        }


def _plain(value: Any) -> Any:
    """A value for JSON: a dataclass as its fields and its totals."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if not is_dataclass(value) or isinstance(value, type):
        return value
    totals = ("total", "performed", "device", "sent", "sent_in_merge")
    return {name: getattr(value, name) for name in totals if hasattr(value, name)} | asdict(value)


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
    method = config.method.name
    memory: dict[str, dict[int, Memory]] = {}
    network: dict[str, dict[int, Traffic]] = {}
    models: dict[Adapter | None, PreTrainedModel] = {}
    for name, record in METHODS.items():
        other = config.model_copy(update={"method": config.method.model_copy(update={"name": name})})
        try:
            model = models.get(record.adapter) or meta_model(model_config, other.method)
        except ValueError:  # the settings do not fit the model with this method
            continue
        models[record.adapter] = model
        memory[name], network[name] = {}, {}
        for stage in STAGES:
            setup = Setup(other, stage, cluster.world_size, bf16=bf16, on_gpu=not on_cpu)
            choose_forms(model, setup, cluster.device.memory_gb * 1e9 or None)
            memory[name][stage] = peak_memory(model, setup)
            network[name][stage] = traffic(model, setup)
    model = models[config.method.record.adapter]
    setup = Setup(config, config.train.zero_stage, cluster.world_size, bf16=bf16, on_gpu=not on_cpu)
    choose_forms(model, setup, cluster.device.memory_gb * 1e9 or None)
    flops = flops_of(model, setup)
    notes = [*remarks(config), *_rule_notes(config)]
    if not on_cpu:
        notes += [*_fp8_notes(config, cluster.device), *uneven_widths(model_config)]
    return Plan(
        config,
        cluster,
        bf16,
        on_cpu,
        count_parameters(model),
        flops,
        product_flops(model, config.optim),
        memory,
        network,
        _time(network[method], model, setup, cluster, flops, peak, tokens_per_second, utilization),
        notes,
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


def _time(
    network: Mapping[int, Traffic],
    model: PreTrainedModel,
    setup: Setup,
    cluster: Cluster,
    flops: Flops,
    peak: tuple[float, str],
    tokens_per_second: float | None,
    utilization: float | None,
) -> Time:
    """The time of a run; ``network`` is its traffic at each stage."""
    config = setup.config
    used = utilization or ASSUMED_UTILIZATION
    of_peak = f"of {peak[0] / 1e12:.4g} TFLOP/s a device ({peak[1]})"
    cluster_peak = cluster.world_size * peak[0]
    steps = {
        stage: step_time(
            cluster,
            replace(setup, stage=stage),
            moved,
            compute=flops.performed * config.tokens_per_step / (cluster_peak * used),
            trainable=count_parameters(model).trainable,
            passes=passes_bytes(model, config.optim),
            products=product_flops(model, config.optim) / (peak[0] * used),
        )
        for stage, moved in network.items()
    }
    if tokens_per_second is not None:
        assumption = f"the measured rate, which is {tokens_per_second * flops.total / cluster_peak:.1%} {of_peak}"
    else:
        tokens_per_second = config.tokens_per_step / steps[setup.stage].total
        assumption = f"{'at' if utilization else 'assuming'} {used:.0%} {of_peak}"
        if utilization is None and setup.on_gpu:
            assumption += ", which no GPU has confirmed"
    return Time(steps, config.tokens_per_step * config.train.steps, tokens_per_second, assumption)
