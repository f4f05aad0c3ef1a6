"""Combinations of settings that cannot work, each with its remedy. Pure functions of the settings."""

from collections.abc import Iterator, Mapping
from typing import Any

from relora_mora.config.checks.data import data_faults, generation_faults, length_faults, record_faults
from relora_mora.config.checks.deepspeed import deepspeed_faults
from relora_mora.config.checks.method import merge_remarks, method_faults
from relora_mora.config.registry import (
    MATRIX_OPTIMIZERS,
    METHODS,
    RULE_SETTINGS,
    is_own,
    optimizer_named,
    settings_of_others,
)
from relora_mora.config.schema import SETTINGS, Config
from relora_mora.config.types import Fault
from relora_mora.system.logs import counted

BESIDE_ADAPTERS = ("method.train_linears", "method.train_embeddings", "method.train_norms", "method.train_head")
SIZE_SETTINGS = ("method.rank", "method.rank_pattern", "method.square_rounding", "method.square_multiple")

# how a run is executed and watched; its result does not depend on these settings
OPERATIONAL = {
    "data.max_bad_fraction",  # decides whether the run continues, not what it reads
    "data.prefetch_batches",
    "data.timeout_seconds",
    "data.workers",
    "train.allow_changes",
    "train.max_bad_steps",
    "train.max_rollbacks",
    "train.peer_timeout_seconds",
    "train.resume",
    "train.run_dir",
}


def unused_by(config: Config) -> dict[str, str]:
    """The settings with a value other than their default that have no effect, each with what makes them unused."""
    settings = config.by_name
    unused = unused_settings(settings)
    return {
        name: unused[name]
        for name, setting in SETTINGS.items()
        if name in unused and settings[name] != setting.get_default()
    }


def unused_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings that have no effect, given all others; each with what makes it unused.

    ``settings`` are all settings of a run, by dotted name. An unknown method or optimizer is assumed to use all.
    """
    matrices, others, method = (settings[name] for name in ("optim.matrices", "optim.others", "method.name"))
    record = METHODS.get(method)
    unused: dict[str, str] = {}
    if settings["method.reset"] not in ("magnitude", "random"):
        unused["method.reset_ratio"] = f"method.reset={settings['method.reset']}"
    if settings["optim.restart_warmup_steps"] == 0:
        unused["optim.rewarm"] = "optim.restart_warmup_steps=0"
    if settings["optim.schedule"] == "constant":
        unused["optim.min_ratio"] = "optim.schedule=constant"
    if not (settings["method.train_embeddings"] or settings["method.train_head"]):
        unused["optim.others"] = "a run that trains neither embeddings nor head"
        others = "adamw"
    if settings["method.base"] not in ("int8", "fp8"):
        unused["method.base_products"] = f"method.base={settings['method.base'] or 'null'}"
    if record is not None and record.adapter is not None:
        if not any(settings[name] for name in BESIDE_ADAPTERS):
            unused["optim.lr_other"] = "a run that trains only adapters"
        if record.adapter.has_square and settings["method.square_size"] is not None:
            unused |= dict.fromkeys(SIZE_SETTINGS, "method.square_size")
    cause = f"optim.matrices={matrices}" + ("" if others == "adamw" else f" with optim.others={others}")
    unused |= dict.fromkeys(settings_of_others(MATRIX_OPTIMIZERS, *map(optimizer_named, (matrices, others))), cause)
    if not is_own(matrices):
        unused |= dict.fromkeys(RULE_SETTINGS, f"optim.matrices={matrices}")
    return unused | dict.fromkeys(settings_of_others(METHODS, record), f"method {method}")


def faults(config: Config, world_size: int | None) -> Iterator[Fault]:
    """Every combination that cannot work: what was given, what was expected, the remedy. world_size None: unknown."""
    for setting, value in (("model.config", config.model.config), ("tokenizer.path", config.tokenizer.path)):
        if value is None and config.model.init_from is None:
            yield Fault(
                (setting, "model.init_from"),
                "must be given, unless model.init_from names a model to start from, whose own is then used",
            )
    yield from length_faults(config)
    yield from data_faults(config)
    yield from record_faults(config.data)
    yield from generation_faults(config)
    yield from method_faults(config)
    yield from _optimizer_faults(config)
    yield from _batch_faults(config, world_size)
    yield from deepspeed_faults(config)
    yield from _other_faults(config)


def remarks(config: Config) -> Iterator[str]:
    """What a run does about settings that its length leaves no room for, such as those of a quick try."""
    optim = config.optim
    steps = config.train.steps
    length = f"the run of {counted(steps, 'step')}"
    if optim.warmup_steps >= steps:
        yield (
            f"optim.warmup_steps: {length} ends within the warmup of {counted(optim.warmup_steps, 'step')}, at "
            f"{steps / optim.warmup_steps:.0%} of the peak rates"
        )
    elif optim.schedule == "wsd" and optim.decay_of(steps) < (optim.decay_steps or 0):
        yield (
            f"optim.decay_steps: {length} has no room for {optim.decay_steps} after the warmup: the decay has "
            f"{counted(optim.decay_of(steps), 'step')}"
        )
    yield from merge_remarks(config)
    for number, stage in enumerate(config.data.stages):
        if stage.from_step > steps:
            yield f"data.stages.{number}.from_step: {length} ends before this stage, which begins at {stage.from_step}"


def _optimizer_faults(config: Config) -> Iterator[Fault]:
    optim = config.optim
    if optim.schedule != "wsd" and optim.decay_steps is not None:
        yield Fault(
            ("optim.decay_steps", "optim.schedule"),
            f"only the schedule wsd uses it, got {optim.schedule}; remove it or set optim.schedule=wsd",
        )


def _batch_faults(config: Config, world_size: int | None) -> Iterator[Fault]:
    batch = config.train.batch_size
    micro = config.train.micro_batch_size
    lanes = config.lanes
    if batch % lanes:
        yield Fault(
            ("data.lanes", "train.batch_size"),
            f"every global batch takes the same number of sequences from each lane, but train.batch_size {batch} / "
            f"{lanes} lanes is not a whole number; use a divisor of {batch}",
        )
    if batch % micro:
        yield Fault(
            ("train.micro_batch_size", "train.batch_size"),
            f"{micro} does not divide train.batch_size {batch}; use a divisor",
        )
    if world_size is None:
        return
    if batch % (micro * world_size) and not batch % micro:
        yield Fault(
            ("train.batch_size", "train.micro_batch_size"),
            f"{batch} is not a multiple of train.micro_batch_size {micro} x {counted(world_size, 'rank')}; "
            f"use a multiple of {micro * world_size}, or smaller micro-batches",
        )
    if lanes % world_size:
        # the smallest divisor of the batch that suits all ranks, but not fewer lanes than now if possible
        suitable = [number for number in range(world_size, batch + 1, world_size) if batch % number == 0]
        remedy = f"a multiple of {world_size} that divides train.batch_size"
        if suitable:
            remedy = f"data.lanes={next((number for number in suitable if number >= lanes), suitable[-1])}, {remedy}"
        yield Fault(
            ("data.lanes", "train.batch_size"),
            f"{counted(lanes, 'lane')} cannot be split evenly among {world_size} ranks; set {remedy}. A run can never "
            "change its lanes, so allow for the largest number of ranks that it may move to",
        )


def _other_faults(config: Config) -> Iterator[Fault]:
    if config.data.masks_documents and config.model.attention == "flash_attention_2":
        masked_by = "data.document_mask" if config.data.document_mask else "data.packing"
        yield Fault(
            (masked_by, "model.attention", "data.records", "data.train"),
            "flash_attention_2 does not support a mask between documents; use model.attention=sdpa",
        )
    if config.model.attention == "flash_attention_2" and config.train.precision == "fp32":
        yield Fault(
            ("model.attention", "train.precision"),
            "flash_attention_2 computes only in bf16; use model.attention=sdpa or train.precision=bf16",
        )
    if config.model.compile is True and config.train.zero_stage == 3:
        yield Fault(
            ("model.compile", "train.zero_stage"),
            "torch.compile cannot trace through ZeRO-3's hooks around each module; use train.zero_stage=2, "
            "or leave it at auto",
        )
    unknown = [name for name in config.train.allow_changes if name not in {*SETTINGS, "tokenizer", "data"}]
    if unknown:
        yield Fault(
            ("train.allow_changes",),
            f"{', '.join(unknown)}: unknown setting; give names such as optim.lr, or tokenizer or data",
        )
