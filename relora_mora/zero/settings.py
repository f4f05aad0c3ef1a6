"""DeepSpeed's configuration."""

from __future__ import annotations

from typing import Any

from relora_mora.config import TrainConfig

REDUCE_BUCKET_SIZE = 500_000_000  # elements, DeepSpeed's default


def deepspeed_settings(train: TrainConfig, *, clip: float, bf16: bool, trainable: int) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from ours; ``train.deepspeed`` adds what we have no setting for.

    DeepSpeed allocates a whole bucket for reductions; one as large as the ``trainable`` parameters holds all gradients.
    """
    zero_optimization = {
        "reduce_bucket_size": min(REDUCE_BUCKET_SIZE, trainable),
        **train.deepspeed.get("zero_optimization", {}),
        "stage": train.zero_stage,
    }
    plain = train.zero_stage == 0 and not bf16  # no optimizer of DeepSpeed's around ours
    settings: dict[str, Any] = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_clipping": 0.0 if plain else clip,  # plain: see ZeroEngine.step
        "bf16": {"enabled": bf16, "check_grad_overflow": False},  # ZeroEngine.step does
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice at every micro-batch
        "zero_optimization": zero_optimization,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }
    if bf16 and train.zero_stage > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return {**train.deepspeed, **settings}
