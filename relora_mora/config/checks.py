"""Combinations of settings that cannot work, each with its remedy. Pure: nothing is read but the settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from relora_mora.config.data_checks import data_faults, length_faults
from relora_mora.config.fault import Fault
from relora_mora.config.record_checks import generation_faults, record_faults
from relora_mora.config.schema import DECODER_LINEARS, Config, MethodConfig
from relora_mora.config.secrets import secrets_in
from relora_mora.config.types import LARGEST, Whole, as_whole
from relora_mora.registry import MATRIX_OPTIMIZERS, METHODS, OPERATORS, is_drawn

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

_Elements = Whole
_Threshold = Annotated[int, Field(ge=0, le=LARGEST), BeforeValidator(as_whole)]

# tried with the view of masters and state in zero/engine.py; offloading, quantized weights and the like were not
DEEPSPEED_ZERO_KEYS: dict[str, Any] = {
    "allgather_bucket_size": Annotated[_Elements, Field(multiple_of=2)],  # aligned to 4 bytes of bf16
    "allgather_partitions": bool,
    "contiguous_gradients": bool,
    "overlap_comm": bool,
    "reduce_bucket_size": _Elements,
    "reduce_scatter": bool,
    "round_robin_gradients": bool,
    "stage3_max_live_parameters": _Threshold,
    "stage3_max_reuse_distance": _Threshold,
    "stage3_param_persistence_threshold": _Threshold,
    "stage3_prefetch_bucket_size": _Threshold,
    "sub_group_size": _Elements,
    "use_multi_rank_bucket_allreduce": bool,
}
DEEPSPEED_KEYS: dict[str, Any] = {
    "zero_optimization": DEEPSPEED_ZERO_KEYS,
    "communication_data_type": Literal["fp16", "bf16", "fp32"],
    "comms_logger": {"enabled": bool, "verbose": bool, "prof_all": bool, "debug": bool, "prof_ops": list[str]},
    "flops_profiler": {
        "enabled": bool,
        "profile_step": _Elements,
        "module_depth": Annotated[int, Field(ge=-1, le=1000)],
        "top_modules": Annotated[int, Field(ge=1, le=1000)],
        "detailed": bool,
        "output_file": str | None,
        "recompute_fwd_factor": Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)],
    },
    "prescale_gradients": bool,
}


def unused_settings(config: Config) -> list[str]:
    """Settings that were given but belong to other methods or optimizers, so that the trainer can say so."""
    given = [
        f"{section}.{key}"
        for section in Config.model_fields
        for key in type(getattr(config, section)).model_fields
        if key in getattr(config, section).model_fields_set
    ]
    of_some = {setting for method in METHODS.values() for setting in method.settings}
    of_some |= {setting for optimizer in MATRIX_OPTIMIZERS.values() for setting in optimizer.settings}
    used = {*config.method.record.settings, *config.optim.record.settings}
    return [setting for setting in given if setting in of_some - used]


def secret_faults(tree: Mapping[str, Any]) -> Iterator[Fault]:
    """Tokens and passwords anywhere in the settings, which go to config.yaml, to logs and into checkpoints."""
    for name, text in secrets_in(tree):
        yield Fault((name,), text)


def faults(config: Config, world_size: int | None) -> Iterator[Fault]:
    """Each combination that cannot work: what was given, what was expected, the remedy. world_size None: unknown."""
    yield from _start_faults(config)
    yield from length_faults(config)
    yield from data_faults(config)
    yield from record_faults(config.data)
    yield from generation_faults(config)
    yield from _target_faults(config)
    yield from _pattern_faults(config)
    yield from _form_faults(config)
    yield from _square_faults(config)
    yield from _adapter_faults(config)
    yield from _merge_faults(config)
    yield from _schedule_faults(config)
    yield from _batch_faults(config, world_size)
    yield from _deepspeed_faults(config)
    yield from _other_faults(config)


def _start_faults(config: Config) -> Iterator[Fault]:
    for setting, given in (("model.config", config.model.config), ("tokenizer.path", config.tokenizer.path)):
        if given is None and config.model.init_from is None:
            yield Fault(
                (setting, "model.init_from"),
                "must be given, or model.init_from, a model to begin with, of which it is taken then",
            )


def _target_faults(config: Config) -> Iterator[Fault]:
    names = config.method.target_modules
    unknown = [name for name in names if name not in DECODER_LINEARS]
    if unknown and config.method.uses_adapters:
        yield Fault(
            ("method.target_modules", "method.name"),
            f"{', '.join(unknown)} is not a linear of the decoder; use some of {', '.join(DECODER_LINEARS)}",
        )
    if len(set(names)) < len(names):
        yield Fault(("method.target_modules",), "a name stands there twice; name each once")


def _pattern_faults(config: Config) -> Iterator[Fault]:
    method = config.method
    if not method.rank_pattern or not method.uses_adapters:
        return
    unknown = [name for name in method.rank_pattern if name not in method.target_modules]
    if unknown:
        yield Fault(
            ("method.rank_pattern", "method.target_modules", "method.name"),
            f"{', '.join(unknown)} is none of method.target_modules ({', '.join(method.target_modules)})",
        )
    if method.uses_squares and method.square_size is not None:
        yield Fault(
            ("method.rank_pattern", "method.square_size", "method.name"),
            f"ranks change nothing with method.square_size={method.square_size}, R of every layer; drop one of them",
        )


def _form_faults(config: Config) -> Iterator[Fault]:
    form = config.method.form
    if config.method.dropout and form in ("merged", "resident") and config.method.uses_adapters:
        yield Fault(
            ("method.dropout", "method.form", "method.name"),
            f"dropout acts on what an adapter sees beside its weight, and the form {form} makes one weight of both; "
            "use method.form=auto, or method.dropout=0",
        )


def _square_faults(config: Config) -> Iterator[Fault]:
    method = config.method
    size = method.square_size
    multiple = method.square_multiple
    if not method.uses_squares:
        return
    even = [operator for operator in method.cycle if OPERATORS[operator].even_size]
    if size is None:
        if even and multiple % 2:
            yield Fault(
                ("method.square_multiple", "method.operators", "method.name", "method.square_size"),
                f"operator {even[0]} needs an even R, and with a multiple of {multiple} it may be odd; "
                f"set method.square_multiple={2 * multiple}",
            )
        return
    if size % multiple:
        yield Fault(
            ("method.square_size", "method.square_multiple", "method.name"),
            f"{size} is no multiple of method.square_multiple {multiple}; drop one of them",
        )
    if even and size % 2:
        yield Fault(
            ("method.square_size", "method.operators", "method.name"),
            f"operator {even[0]} needs an even size, got {size}; take {size - 1 or 2}",
        )


def _adapter_faults(config: Config) -> Iterator[Fault]:
    if config.model.adapter is None:
        return
    if not config.method.uses_adapters:
        yield Fault(
            ("model.adapter", "method.name"),
            f"{config.method.name} has no adapters that it could give values to; drop it, or set method.name",
        )
    if config.model.init_from is None:
        yield Fault(
            ("model.adapter", "model.init_from"), "an adapter belongs to a trained model; name that in model.init_from"
        )


def _merge_faults(config: Config) -> Iterator[Fault]:
    method = config.method
    optim = config.optim
    if not method.merges:
        return
    cycle = method.cycle
    if any(a == b and not is_drawn(a) for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True)):
        yield Fault(
            ("method.operators", "method.name"),
            f"the cycle {list(cycle)} repeats an operator across a merge, which cannot raise the rank; "
            "alternate two or more",
        )
    if method.reset in ("magnitude", "random") and method.reset_ratio == 0:
        yield Fault(
            ("method.reset_ratio", "method.reset", "method.name"),
            f"0 with method.reset={method.reset} resets nothing; use method.reset=none",
        )
    if method.reset not in ("full", "none") and not optim.record.moments:
        yield Fault(
            ("method.reset", "optim.matrices", "method.name"),
            f"{method.reset} changes moments element by element, and those of {optim.matrices} are not of elements; "
            "use method.reset=full or none",
        )
    yield from _carry_faults(method)
    every = method.merge_every
    if every < optim.warmup_steps and optim.restart_warmup_steps:
        yield Fault(
            ("method.merge_every", "optim.warmup_steps", "method.name"),
            f"the first merge (step {every}) comes before the warmup ends (step {optim.warmup_steps}); raise it, "
            "or set optim.restart_warmup_steps=0",
        )
    if every < optim.restart_warmup_steps:
        yield Fault(
            ("method.merge_every", "optim.restart_warmup_steps", "method.name"),
            f"{every} steps between merges are fewer than optim.restart_warmup_steps ({optim.restart_warmup_steps}); "
            "raise it or lower those",
        )
    if every >= config.train.steps:
        yield Fault(
            ("method.merge_every", "train.steps", "method.name"),
            f"{every} means no merge in a run of {config.train.steps} steps; lower it, "
            f"or use method.name={method.record.without_merges}",
        )
    if method.merge_until_step is not None and method.merge_until_step < every:
        yield Fault(
            ("method.merge_until_step", "method.merge_every", "method.name"),
            f"{method.merge_until_step} comes before the first merge (step {every}); raise it, "
            f"or use method.name={method.record.without_merges}",
        )


def _carry_faults(method: MethodConfig) -> Iterator[Fault]:
    if method.reset != "carry":
        return
    if not method.cycle:
        yield Fault(
            ("method.reset", "method.name"),
            f"carry moves the state of square matrices to their next operator, and {method.name} has none; "
            "use method.reset=full",
        )
    for operator in sorted(set(method.cycle)):
        if not OPERATORS[operator].groupings:
            yield Fault(
                ("method.reset", "method.operators", "method.name"),
                f"carry needs operators that group features, and {operator} rotates them; use method.reset=full",
            )


def _schedule_faults(config: Config) -> Iterator[Fault]:
    optim = config.optim
    steps = config.train.steps
    if optim.warmup_steps >= steps:
        yield Fault(
            ("optim.warmup_steps", "train.steps"),
            f"{optim.warmup_steps} warmup steps leave nothing of a run of {steps} steps; lower it or raise train.steps",
        )
    if optim.decay_steps is None:
        return
    if optim.schedule != "wsd":
        yield Fault(
            ("optim.decay_steps", "optim.schedule"),
            f"only the schedule wsd has it, got {optim.schedule}; drop it or set optim.schedule=wsd",
        )
    elif optim.warmup_steps + optim.decay_steps > steps:
        yield Fault(
            ("optim.decay_steps", "optim.warmup_steps", "train.steps", "optim.schedule"),
            f"{optim.decay_steps} steps of decay and {optim.warmup_steps} of warmup are longer "
            f"than the run of {steps} steps; shorten them",
        )


def _batch_faults(config: Config, world_size: int | None) -> Iterator[Fault]:
    batch = config.train.batch_size
    micro = config.train.micro_batch_size
    lanes = config.lanes
    if batch % lanes:
        yield Fault(
            ("data.lanes", "train.batch_size"),
            f"every global batch takes as many sequences from each lane, but train.batch_size {batch} / {lanes} lanes "
            f"is no whole number; use a divisor of {batch}",
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
            f"{batch} is no multiple of train.micro_batch_size {micro} x {world_size} ranks; "
            f"use a multiple of {micro * world_size}, or smaller micro-batches",
        )
    if lanes % world_size:
        # of the divisors of the batch the smallest that serves all ranks, and not fewer lanes than by default
        enough = [number for number in range(world_size, batch + 1, world_size) if batch % number == 0]
        remedy = f"a multiple of {world_size} that divides train.batch_size"
        if enough:
            remedy = f"data.lanes={next((number for number in enough if number >= lanes), enough[-1])}, {remedy}"
        yield Fault(
            ("data.lanes", "train.batch_size"),
            f"{lanes} lanes cannot be shared evenly by {world_size} ranks; set {remedy}. A run keeps its lanes for "
            "good, so count the most ranks that it may move to",
        )


def _deepspeed_faults(config: Config) -> Iterator[Fault]:
    for text in _deepspeed_texts(config.train.deepspeed, DEEPSPEED_KEYS, ""):
        yield Fault(("train.deepspeed",), text)
    zero = config.train.deepspeed.get("zero_optimization")
    scatters = zero.get("reduce_scatter", True) if isinstance(zero, dict) else True
    if config.train.deepspeed.get("prescale_gradients") is True and scatters and config.train.zero_stage > 0:
        yield Fault(
            ("train.deepspeed", "train.zero_stage"),
            f"prescale_gradients does not go with reduce_scatter on ZeRO-{config.train.zero_stage}; leave it out, "
            "or set zero_optimization.reduce_scatter=false",
        )


def _deepspeed_texts(given: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in given.items():
        name = prefix + key
        kind = known.get(key)
        if name in DERIVED_DEEPSPEED_KEYS:
            yield f"{name} is derived from {DERIVED_DEEPSPEED_KEYS[name]}; set that instead"
        elif kind is None:
            yield f"{name}: not supported here; use some of {', '.join(sorted(known))}"
        elif not isinstance(kind, dict):
            try:
                TypeAdapter(kind).validate_python(value, strict=True)
            except ValidationError as error:
                said = error.errors()[0]["msg"]
                yield f"{name} is {value!r}; {said[:1].lower()}{said[1:]}"
        elif isinstance(value, dict):
            yield from _deepspeed_texts(value, kind, f"{name}.")
        else:
            yield f"{name} is {value!r}, expected its keys, some of {', '.join(sorted(kind))}"


def _other_faults(config: Config) -> Iterator[Fault]:
    if config.data.masks_documents and config.model.attention == "flash_attention_2":
        masked_by = "data.document_mask" if config.data.document_mask else "data.packing"
        yield Fault(
            (masked_by, "model.attention", "data.records", "data.train"),
            "flash_attention_2 takes no mask between documents; use model.attention=sdpa",
        )
    if config.model.compile is True and config.train.zero_stage == 3:
        yield Fault(
            ("model.compile", "train.zero_stage"),
            "torch.compile cannot look through what ZeRO-3 does around each module; use train.zero_stage=2, "
            "or leave it at auto",
        )
    sections = {name: getattr(config, name) for name in Config.model_fields}
    known = {f"{name}.{key}" for name, section in sections.items() for key in type(section).model_fields} | {
        "tokenizer",
        "data",
    }
    unknown = [name for name in config.train.allow_changes if name not in known]
    if unknown:
        yield Fault(
            ("train.allow_changes",),
            f"{', '.join(unknown)}: no such setting; names have the form optim.lr, or are tokenizer or data",
        )
