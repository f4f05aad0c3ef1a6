"""What this trainer sets of DeepSpeed's ``zero_optimization``; ``train.deepspeed`` goes first."""

from __future__ import annotations

from typing import Any

BUCKET = 500_000_000  # elements that are reduced at once; DeepSpeed's default
GPU_BUCKET = 50_000_000  # small enough for the first to be on its way while backward goes on


def zero_defaults(stage: int, world_size: int, trainable: int, *, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed allocates whole buckets for reductions; one as large as the ``trainable`` parameters holds all.

    On GPUs stage 2 reduces beside backward, with two buckets: one is filled while the other is reduced. Stage 3 does so
    by DeepSpeed's default. Stage 1 in bf16 has no such way.
    """
    defaults: dict[str, Any] = {"reduce_bucket_size": min(GPU_BUCKET if on_gpu else BUCKET, trainable)}
    if on_gpu and stage == 2 and world_size > 1:
        defaults["overlap_comm"] = True
    return defaults
