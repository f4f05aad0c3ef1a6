"""DeepSpeed's own settings: our defaults, the keys that a user may set, and faults in ``train.deepspeed``."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from relora_mora.config.schema import Config
from relora_mora.config.types import LARGEST, Fault, Strict, Whole, as_whole

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


DERIVED = {
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
_ITS_OWN: Any = None  # DeepSpeed's default


class Zero(Strict):
    """Tested with engine/engine.py's view of masters and state; offloading, quantized weights and the like were not."""

    allgather_bucket_size: Annotated[Whole, Field(multiple_of=2)] = _ITS_OWN  # aligned to 4 bytes of bf16
    allgather_partitions: bool = _ITS_OWN
    contiguous_gradients: bool = _ITS_OWN
    overlap_comm: bool = _ITS_OWN
    reduce_bucket_size: Whole = _ITS_OWN
    reduce_scatter: bool = _ITS_OWN
    round_robin_gradients: bool = _ITS_OWN
    stage3_max_live_parameters: _Threshold = _ITS_OWN
    stage3_max_reuse_distance: _Threshold = _ITS_OWN
    stage3_param_persistence_threshold: _Threshold = _ITS_OWN
    stage3_prefetch_bucket_size: _Threshold = _ITS_OWN
    sub_group_size: Whole = _ITS_OWN
    use_multi_rank_bucket_allreduce: bool = _ITS_OWN


class DeepSpeed(Strict):
    """The keys of ``train.deepspeed``."""

    zero_optimization: Zero = _ITS_OWN
    communication_data_type: Literal["bf16", "fp32"] = _ITS_OWN


def deepspeed_faults(config: Config) -> Iterator[Fault]:
    try:
        DeepSpeed.model_validate(config.train.deepspeed)
    except ValidationError as error:
        for each in error.errors():
            name = ".".join(map(str, each["loc"]))
            if name in DERIVED:
                text = f"{name} is derived from {DERIVED[name]}; set that instead"
            elif each["type"] == "extra_forbidden":
                model = DeepSpeed if len(each["loc"]) == 1 else Zero
                text = f"{name}: not supported; the supported keys are {', '.join(model.model_fields)}"
            else:
                text = f"{name} is {each['input']!r}; {each['msg'][:1].lower()}{each['msg'][1:]}"
            yield Fault(("train.deepspeed",), text)
