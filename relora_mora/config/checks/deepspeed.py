"""DeepSpeed's own settings: our defaults, and the keys that a user may set."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from typing_extensions import TypedDict

from relora_mora.config.types import LARGEST, Whole, as_whole

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


Threshold = Annotated[int, Field(ge=0, le=LARGEST), BeforeValidator(as_whole)]


class Zero(TypedDict, total=False):
    """Tested with engine/engine.py's view of masters and state; offloading, quantized weights and the like were not."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[misc]

    allgather_bucket_size: Annotated[Whole, Field(multiple_of=2)]  # aligned to 4 bytes of bf16
    allgather_partitions: bool
    contiguous_gradients: bool
    overlap_comm: bool
    reduce_bucket_size: Whole
    reduce_scatter: bool
    round_robin_gradients: bool
    stage3_max_live_parameters: Threshold
    stage3_max_reuse_distance: Threshold
    stage3_param_persistence_threshold: Threshold
    stage3_prefetch_bucket_size: Threshold
    sub_group_size: Whole
    use_multi_rank_bucket_allreduce: bool


class DeepSpeed(TypedDict, total=False):
    """The keys of ``train.deepspeed``; the others of DeepSpeed follow from settings of ours."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[misc]

    zero_optimization: Zero
    communication_data_type: Literal["bf16", "fp32"]
