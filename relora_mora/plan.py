"""What a run needs: parameters, memory of a device for each method and ZeRO stage, arithmetic, tokens and time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import LlamaConfig

from relora_mora.config import Config
from relora_mora.flops import Flops, flops_per_token, meta_model
from relora_mora.memory import PARTS, Memory, Parameters, count_parameters, peak_memory

METHODS = ("full", "lora", "mora", "relora", "remora")
STAGES = (0, 1, 2, 3)
ASSUMED_UTILISATION = 0.4
PROCESS_BYTES = 0.45 * 2**30  # resident in a rank's process on a CPU next to its tensors: Python, torch, DeepSpeed, tokenizer (measured)
FRAGMENTATION = 1.1  # glibc's malloc held 3 to 17 % more than the parts in tiny runs (measured on two cores)


@dataclass(frozen=True)
class Plan:
    """Everything about one run; ``memory[method][stage]`` compares the methods, at the same settings."""

    parameters: Parameters
    flops: Flops
    memory: dict[str, dict[int, Memory]]
    method: str
    zero_stage: int
    world_size: int
    bf16: bool
    on_cpu: bool
    tokens_per_step: int
    tokens: int
    tokens_per_second: float
    assumption: str

    @property
    def seconds(self) -> float:
        """Time of all steps, without evaluations, checkpoints and merges."""
        return self.tokens / self.tokens_per_second

    @property
    def resident(self) -> float | None:
        """Bytes of a rank's process where the device is a CPU, None elsewhere; a tenth is added for malloc's fragmentation."""
        chosen = self.memory[self.method][self.zero_stage]
        return FRAGMENTATION * (PROCESS_BYTES + chosen.device + chosen.host_base) if self.on_cpu else None

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["flops"] |= {"total": self.flops.total, "performed": self.flops.performed}
        values["memory"] = {
            method: {str(stage): {**asdict(memory), "device": memory.device} for stage, memory in stages.items()}
            for method, stages in self.memory.items()
        }
        return {**values, "seconds": self.seconds, "resident": self.resident}


def make_plan(
    model_config: LlamaConfig,
    config: Config,
    *,
    world_size: int,
    bf16: bool,
    on_cpu: bool,
    peak: tuple[float, str],
    tokens_per_second: float | None = None,
    utilisation: float | None = None,
) -> Plan:
    """What the run needs on ``world_size`` devices.

    ``peak`` is the FLOP/s of one device and where the number comes from; ``log.peak_tflops`` goes first.
    ``tokens_per_second`` is a measured rate over all devices; without it the time follows from the arithmetic, the peak and
    ``utilisation``. Raises ValueError for a utilisation that is not between 0 and 1 and for a rate that is not positive.
    """
    if utilisation is not None and not 0 < utilisation <= 1:
        raise ValueError(f"utilisation must be above 0 and at most 1, got {utilisation:g}")
    if tokens_per_second is not None and not tokens_per_second > 0:
        raise ValueError(f"tokens_per_second must be positive, got {tokens_per_second:g}")
    flops = flops_per_token(model_config, config)
    memory = {}
    for name in METHODS:
        other = config.model_copy(update={"method": config.method.model_copy(update={"name": name})})
        memory[name] = {stage: peak_memory(model_config, other, stage, world_size, bf16=bf16) for stage in STAGES}
    if config.log.peak_tflops is not None:
        peak = config.log.peak_tflops * 1e12, "log.peak_tflops"
    speed, assumption = _speed(flops, world_size, peak, tokens_per_second, utilisation)
    return Plan(
        parameters=count_parameters(meta_model(model_config, config)),
        flops=flops,
        memory=memory,
        method=config.method.name,
        zero_stage=config.train.zero_stage,
        world_size=world_size,
        bf16=bf16,
        on_cpu=on_cpu,
        tokens_per_step=config.tokens_per_step,
        tokens=config.tokens_per_step * config.train.steps,
        tokens_per_second=speed,
        assumption=assumption,
    )


def _speed(flops: Flops, world_size: int, peak: tuple[float, str], measured: float | None, utilisation: float | None) -> tuple[float, str]:
    """Tokens per second over all devices, and in words what that rests on"""
    device = f"{peak[0] / 1e12:.4g} TFLOP/s a device ({peak[1]})"
    if measured is not None:
        return measured, f"the measured rate, which is {measured * flops.total / (world_size * peak[0]):.1%} of {device}"
    used = ASSUMED_UTILISATION if utilisation is None else utilisation
    return world_size * peak[0] * used / flops.performed, f"{'assuming' if utilisation is None else 'at'} {used:.0%} of {device}"


def render(plan: Plan) -> str:
    """The plan as text for a terminal."""
    counts, flops = plan.parameters, plan.flops
    precision = "bf16" if plan.bf16 else "fp32"
    own = plan.memory[plan.method]
    parts = [
        f"parameters     {counts.total:,} in the model; {plan.method} trains {counts.trainable:,}, of them {counts.adapters:,} in adapters",
        f"arithmetic     {flops.total / 1e9:.4g} GFLOP a token: "
        + ", ".join(f"{name} {getattr(flops, name) / flops.total:.0%}" for name in ("linears", "adapters", "attention", "head"))
        + (f"; {flops.recomputed / 1e9:.4g} more for activation checkpointing" if flops.recomputed else ""),
        f"data           {plan.tokens_per_step:,} tokens a step, {plan.tokens:,} in all, {flops.total * plan.tokens:.3g} FLOP",
        f"time           {duration(plan.seconds)} at {plan.tokens_per_second:,.0f} tokens/s on {plan.world_size} "
        f"device{'s' if plan.world_size > 1 else ''}, {plan.assumption}",
        "",
        f"memory of a device ({plan.world_size} in all) in GiB, {plan.method} in {precision}, when a step needs most (* the stage in the settings)",
        _table(
            ["stage", *PARTS, "all", "at", "host, fp32 base"],
            [
                [
                    f"{stage}{'*' if stage == plan.zero_stage else ''}",
                    *(_gib(getattr(memory, part)) for part in PARTS),
                    _gib(memory.device),
                    memory.moment,
                    _gib(memory.host_base),
                ]
                for stage, memory in own.items()
            ],
        ),
        "",
        "the same for each method, all parts together",
        _table(
            ["stage", *plan.memory],
            [[str(stage), *(_gib(stages[stage].device) for stages in plan.memory.values())] for stage in own],
        ),
        "",
        "not counted: the CUDA context, fragmentation, Python itself; evaluations, checkpoints and merges in the time",
    ]
    if plan.resident is not None:
        parts.insert(
            -5,
            f"resident memory of a rank: {_gib(plan.resident)} GiB, of them {_gib(PROCESS_BYTES)} for Python, torch and DeepSpeed; "
            "a tenth is for malloc's fragmentation",
        )
    return "\n".join(parts)


def duration(seconds: float) -> str:
    """3 d 4 h, 4 h 5 min, 5 min 6 s or 6.1 s"""
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.1f} s"
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    hours = minutes / 60
    return f"{int(hours)} h {int(minutes % 60)} min" if hours < 48 else f"{int(hours // 24)} d {int(hours % 24)} h"


def _gib(size: float) -> str:
    return "-" if size == 0 else f"{size / 2**30:.3g}" if size < 2**30 else f"{size / 2**30:.1f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows])
