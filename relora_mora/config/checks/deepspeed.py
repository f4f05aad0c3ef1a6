"""DeepSpeed's own settings: our defaults, the keys that a user may set, and faults in ``train.deepspeed``."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from relora_mora.config.schema import Config
from relora_mora.config.types import LARGEST, Fault, Whole, as_whole

BUCKET = 500_000_000  # elements reduced at once; DeepSpeed's default
GPU_BUCKET = 50_000_000  # small enough to send the first bucket while the backward pass continues


def zero_defaults(stage: int, world_size: int, trainable: int, *, on_gpu: bool) -> dict[str, Any]:
    """Defaults for ``zero_optimization``. DeepSpeed allocates a whole bucket, so it is not larger than ``trainable``.

    On GPUs, stage 2 overlaps reductions with the backward pass: it fills one bucket while it reduces another. Stage 3
    does so by DeepSpeed's default, and stage 1 in bf16 cannot.
    """
    defaults: dict[str, Any] = {"reduce_bucket_size": min(GPU_BUCKET if on_gpu else BUCKET, trainable)}
    if on_gpu and stage == 2 and world_size > 1:
        defaults["overlap_comm"] = True
    return defaults


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

_Threshold = Annotated[int, Field(ge=0, le=LARGEST), BeforeValidator(as_whole)]

# tested with engine/engine.py's view of masters and state; offloading, quantized weights and the like were not
DEEPSPEED_ZERO_KEYS: dict[str, Any] = {
    "allgather_bucket_size": Annotated[Whole, Field(multiple_of=2)],  # aligned to 4 bytes of bf16
    "allgather_partitions": bool,
    "contiguous_gradients": bool,
    "overlap_comm": bool,
    "reduce_bucket_size": Whole,
    "reduce_scatter": bool,
    "round_robin_gradients": bool,
    "stage3_max_live_parameters": _Threshold,
    "stage3_max_reuse_distance": _Threshold,
    "stage3_param_persistence_threshold": _Threshold,
    "stage3_prefetch_bucket_size": _Threshold,
    "sub_group_size": Whole,
    "use_multi_rank_bucket_allreduce": bool,
}
DEEPSPEED_KEYS: dict[str, Any] = {
    "zero_optimization": DEEPSPEED_ZERO_KEYS,
    "communication_data_type": Literal["bf16", "fp32"],
    "comms_logger": {"enabled": bool, "verbose": bool, "prof_all": bool, "debug": bool, "prof_ops": list[str]},
}


def deepspeed_faults(config: Config) -> Iterator[Fault]:
    for text in _texts(config.train.deepspeed, DEEPSPEED_KEYS, ""):
        yield Fault(("train.deepspeed",), text)


def _texts(settings: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in settings.items():
        name = prefix + key
        kind = known.get(key)
        if name in DERIVED_DEEPSPEED_KEYS:
            yield f"{name} is derived from {DERIVED_DEEPSPEED_KEYS[name]}; set that instead"
        elif kind is None:
            yield f"{name}: not supported; the supported keys are {', '.join(sorted(known))}"
        elif not isinstance(kind, dict):
            try:
                TypeAdapter(kind).validate_python(value, strict=True)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                yield f"{name} is {value!r}; {reason[:1].lower()}{reason[1:]}"
        elif isinstance(value, dict):
            yield from _texts(value, kind, f"{name}.")
        else:
            yield f"{name} is {value!r}, expected a mapping with some of the keys {', '.join(sorted(kind))}"
