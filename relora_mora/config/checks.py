"""Combinations of settings that cannot work, each with its remedy. Pure: nothing is read but the settings."""

from __future__ import annotations

from collections.abc import Iterator

from relora_mora.config.schema import DECODER_LINEARS, Config

DERIVED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_size",
    "gradient_clipping": "optim.clip",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "data_types": "train.precision",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "zero_optimization.stage": "train.zero_stage",
    "steps_per_print": "log.every_steps",
    "activation_checkpointing": "model.activation_checkpointing",
}

_ONLY = {
    "method.rank": ("lora", "mora", "relora", "remora"),
    "method.square_size": ("mora", "remora"),
    "method.square_multiple": ("mora", "remora"),
    "method.operators": ("mora", "remora"),
    "method.lora_alpha": ("lora", "relora"),
    "method.form": ("lora", "mora", "relora", "remora"),
    "method.target_modules": ("lora", "mora", "relora", "remora"),
    "method.merge_every": ("relora", "remora"),
    "method.reset": ("relora", "remora"),
    "method.reset_ratio": ("relora", "remora"),
    "optim.restart_warmup_steps": ("relora", "remora"),
    "optim.rewarm": ("relora", "remora"),
}


def unused_settings(config: Config) -> list[str]:
    """Settings that were given but belong to other methods, so that the trainer can say that it does not use them."""
    unused = []
    for name, methods in _ONLY.items():
        section, key = name.split(".")
        if config.method.name not in methods and key in getattr(config, section).model_fields_set:
            unused.append(name)
    return unused


def faults(config: Config, world_size: int | None) -> Iterator[str]:
    """Each combination that cannot work: what was given, what was expected, the remedy. world_size None: unknown."""
    yield from _method_faults(config)
    yield from _schedule_faults(config)
    yield from _batch_faults(config, world_size)
    yield from _deepspeed_faults(config)


def _method_faults(config: Config) -> Iterator[str]:
    method = config.method
    unknown = [name for name in method.target_modules if name not in DECODER_LINEARS]
    if unknown and config.uses_adapters:
        yield f"method.target_modules: {', '.join(unknown)} is not a linear of the decoder; use some of {', '.join(DECODER_LINEARS)}"
    if len(set(method.target_modules)) < len(method.target_modules):
        yield "method.target_modules: a name stands there twice; name each once"
    if config.uses_squares and method.square_size is not None:
        if method.square_size % method.square_multiple:
            yield (
                f"method.square_size: {method.square_size} is no multiple of method.square_multiple {method.square_multiple}; "
                "drop one of them"
            )
        if 6 in method.operators and method.square_size % 2:
            yield f"method.square_size: operator 6 needs an even size, got {method.square_size}; take {method.square_size - 1 or 2}"
    elif config.uses_squares and 6 in method.operators and method.square_multiple % 2:
        yield (
            f"method.square_multiple: operator 6 needs an even R, and with a multiple of {method.square_multiple} it may be odd; "
            f"set method.square_multiple={2 * method.square_multiple}"
        )
    if config.merges and method.name == "remora" and len(method.operators) > 1:
        cycle = method.operators
        if any(a == b for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True)):
            yield f"method.operators: the cycle {cycle} repeats an operator across a merge, which cannot raise the rank; alternate them"
    if method.reset in ("magnitude", "random") and method.reset_ratio == 0 and config.merges:
        yield f"method.reset_ratio: 0 with method.reset={method.reset} resets nothing; use method.reset=none"


def _schedule_faults(config: Config) -> Iterator[str]:
    optim, steps = config.optim, config.train.steps
    if optim.warmup_steps >= steps:
        yield f"optim.warmup_steps: {optim.warmup_steps} warmup steps leave nothing of a run of {steps} steps; lower it or raise train.steps"
    if config.merges:
        every = config.method.merge_every
        if every < optim.warmup_steps:
            yield f"method.merge_every: the first merge (step {every}) comes before the warmup ends (step {optim.warmup_steps}); raise it"
        if every < optim.restart_warmup_steps:
            yield (
                f"method.merge_every: {every} steps between merges are fewer than optim.restart_warmup_steps "
                f"({optim.restart_warmup_steps}); raise it or lower those"
            )
        if every >= steps:
            yield f"method.merge_every: {every} means no merge in a run of {steps} steps; lower it, or use method.name={config.method.name[2:]}"
    if optim.decay_steps is not None and optim.schedule != "wsd":
        yield f"optim.decay_steps: only the schedule wsd has it, got {optim.schedule}; drop it or set optim.schedule=wsd"
    if optim.decay_steps is not None and optim.warmup_steps + optim.decay_steps > steps:
        yield f"optim.decay_steps: warmup and decay together are longer than the run of {steps} steps; shorten them"


def _batch_faults(config: Config, world_size: int | None) -> Iterator[str]:
    batch, micro, lanes = config.train.batch_size, config.train.micro_batch_size, config.lanes
    if batch % lanes:
        yield f"data.lanes: every global batch takes as many sequences from each lane, but train.batch_size {batch} / {lanes} lanes is no whole number; use a divisor of {batch}"
    if batch % micro:
        yield f"train.micro_batch_size: {micro} does not divide train.batch_size {batch}; use a divisor"
    if world_size is None:
        return
    if batch % (micro * world_size) and not batch % micro:
        yield (
            f"train.batch_size: {batch} is no multiple of train.micro_batch_size {micro} x {world_size} ranks; "
            f"use a multiple of {micro * world_size}, or smaller micro-batches"
        )
    if lanes % world_size:
        yield f"data.lanes: {lanes} lanes cannot be shared evenly by {world_size} ranks; use a multiple of {world_size} that divides train.batch_size"


def _deepspeed_faults(config: Config) -> Iterator[str]:
    for key, value in config.train.deepspeed.items():
        names = [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else []
        for name in [key, *names]:
            if name in DERIVED_DEEPSPEED_KEYS:
                yield f"train.deepspeed: {name} is derived from {DERIVED_DEEPSPEED_KEYS[name]}; set that instead"
