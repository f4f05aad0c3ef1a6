"""A run's plan, from its settings and the cluster it is to run on."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig

from relora_mora.config.checks.combinations import remarks
from relora_mora.config.registry import is_own, split_rule
from relora_mora.config.schema import Config
from relora_mora.experiments.planner.step import Cluster, StepTime, Traffic, step_time, traffic
from relora_mora.optim.groups import count_parameters
from relora_mora.sizing.fit import USABLE, choose_forms, uneven_widths
from relora_mora.sizing.measure import measure
from relora_mora.sizing.memory import Memory, peak_memory
from relora_mora.sizing.setup import Setup
from relora_mora.sizing.work import meta_model, product_flops
from relora_mora.system.devices import WITHOUT_FP8

STAGES = (0, 1, 2, 3)
ASSUMED_UTILIZATION = 0.4  # share of the peak while devices compute; no GPU has confirmed it
# resident in a rank's process on a CPU next to its tensors: Python, torch, DeepSpeed, tokenizer (measured)
PROCESS_BYTES = 0.45 * 2**30
FRAGMENTATION = 1.1  # glibc's malloc held 3 to 17 % more than the parts in tiny runs (measured on two cores)


@dataclass(frozen=True)
class AtStage:
    """What the run needs at one ZeRO stage."""

    memory: Memory
    network: Traffic
    step: StepTime


@dataclass(eq=False)
class Plan:
    """All numbers of one planned run. Most are computed when they are first read.

    ``peak`` is the FLOP/s of one device and the source of that number; ``log.peak_tflops`` overrides it. ``measured``
    is a rate in tokens/s over all devices. Without it the time follows from the arithmetic at ``utilization`` of the
    peak (None: 0.4), the optimizer's memory traffic, and the network. ``notes`` come before the plan's own.
    Raises ValueError if the settings do not fit the model.
    """

    model_config: PreTrainedConfig
    config: Config
    _: KW_ONLY
    cluster: Cluster
    bf16: bool
    peak: tuple[float, str]
    measured: float | None = None
    utilization: float | None = None
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        config = self.config
        if config.log.peak_tflops is not None:
            self.peak = config.log.peak_tflops * 1e12, "log.peak_tflops"
        self.method = config.method.name
        self.zero_stage = config.train.zero_stage
        self.model = meta_model(self.model_config, config.method)
        self.parameters = count_parameters(self.model)
        self.optimizer_flops = product_flops(self.model, config.optim)  # of a step, over all ranks
        self._stages: dict[int, AtStage] = {}
        self.flops = measure(self.model, self._setup(self.zero_stage)).flops  # of a token
        self.notes = [*self.notes, *remarks(config), *self._notes()]

    def _notes(self) -> list[str]:
        """What is not known of a rule of one's own, and what the start of a run on these devices would say."""
        notes = []
        method = self.config.method
        device = self.cluster.device
        if is_own(self.config.optim.matrices):
            rule = split_rule(self.config.optim.matrices)[1]
            notes.append(
                f"the memory of {rule} is what its state_shapes say, and its work is counted only if it has flops and "
                "workspace_bytes; measure some steps"
            )
        if method.eight_bits == "fp8" and method.base_products is True and device.name in WITHOUT_FP8:
            notes.append(
                f"a run with method.base=fp8 is refused here: {device.name} has no fp8 products; "
                "use method.base=int8, or method.base_products=false"
            )
        return notes if self.cluster.on_cpu else notes + uneven_widths(self.model_config)

    def at(self, stage: int) -> AtStage:
        """What the run needs at a stage. Raises ValueError if its settings refuse that."""
        if stage not in self._stages:
            setup = self._setup(stage)
            sent = traffic(self.model, setup)
            rate = self.peak[0] * (self.utilization or ASSUMED_UTILIZATION)
            step = step_time(self.model, setup, self.cluster, sent, self.flops.performed, rate)
            self._stages[stage] = AtStage(peak_memory(self.model, setup), sent, step)
        return self._stages[stage]

    def _setup(self, stage: int) -> Setup:
        """The setup at a stage, for which the model's layers get their forms."""
        setup = Setup(self.config, stage, self.cluster.world_size, bf16=self.bf16, on_gpu=not self.cluster.on_cpu)
        choose_forms(self.model, setup, self.cluster.device.memory_gb * 1e9 or None)
        return setup

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return self.config.tokens_per_step * self.config.train.steps

    @property
    def tokens_per_second(self) -> float:
        return self.measured or self.config.tokens_per_step / self.at(self.zero_stage).step.total

    @property
    def seconds(self) -> float:
        """The time of all steps."""
        return self.tokens / self.tokens_per_second

    @property
    def assumption(self) -> str:
        """Where the rate comes from, in words."""
        peak, source = self.peak
        of_peak = f"of {peak / 1e12:.4g} TFLOP/s a device ({source})"
        if self.measured is not None:
            used = self.measured * self.flops.total / (self.cluster.world_size * peak)
            return f"the measured rate, which is {used:.1%} {of_peak}"
        if self.utilization is not None:
            return f"at {self.utilization:.0%} {of_peak}"
        unconfirmed = "" if self.cluster.on_cpu else ", which no GPU has confirmed"
        return f"assuming {ASSUMED_UTILIZATION:.0%} {of_peak}{unconfirmed}"

    @property
    def savings(self) -> list[str]:
        """Changes that would need less memory."""
        return [
            *(["lower train.micro_batch_size"] if self.config.train.micro_batch_size > 1 else []),
            *([] if self.config.model.activation_checkpointing else ["set model.activation_checkpointing"]),
            *(["set method.base=int8"] if self.config.method.uses_adapters and self.config.method.base is None else []),
            "take more or larger devices",
        ]

    @property
    def resident(self) -> float | None:
        """Bytes of the first rank's process on a CPU, in training or at its start; None on other devices.

        In training a tenth of them is for malloc's fragmentation. The initial weights come in a few large pieces.
        """
        if not self.cluster.on_cpu:
            return None
        chosen = self.at(self.zero_stage).memory
        at_start = PROCESS_BYTES + chosen.weights + chosen.masters + chosen.host_base + chosen.host_start
        in_training = PROCESS_BYTES + chosen.device + chosen.host_base + chosen.host_checkpoint
        return max(at_start, FRAGMENTATION * in_training)

    def fits(self, stage: int) -> bool | None:
        """Whether a rank's memory fits into a device; None if the device's memory is unknown."""
        available = self.cluster.device.memory_gb * 1e9
        return self.at(stage).memory.device <= USABLE * available if available else None

    def as_dict(self) -> dict[str, Any]:
        """All numbers for JSON, those of a stage by its number; sizes in bytes, times in seconds."""
        stages = {stage: self.at(stage) for stage in STAGES}
        alike = (
            "method",
            "zero_stage",
            "bf16",
            "optimizer_flops",
            "tokens",
            "tokens_per_second",
            "seconds",
            "resident",
        )
        return {
            "parameters": asdict(self.parameters),
            "flops": _with(self.flops, "total", "performed"),
            "matrices": self.config.optim.matrices,
            "others": self.config.optim.others,
            "memory": {
                stage: _with(each.memory, "device") | {"fits": self.fits(stage)} for stage, each in stages.items()
            },
            "network": {stage: _with(each.network, "sent") for stage, each in stages.items()},
            "steps": {stage: _with(each.step, "total") for stage, each in stages.items()},
            "cluster": asdict(self.cluster),
            "world_size": self.cluster.world_size,
            "tokens_per_step": self.config.tokens_per_step,
            **{name: getattr(self, name) for name in (*alike, "assumption", "notes", "savings")},
        }


def _with(numbers: Any, *totals: str) -> dict[str, Any]:
    """The fields of a record, and these properties."""
    return asdict(numbers) | {name: getattr(numbers, name) for name in totals}
