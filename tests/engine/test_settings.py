"""DeepSpeed's settings on GPUs and on CPUs."""

from __future__ import annotations

from typing import Any

from tests.tools.each import each
from tests.tools.tiny import tiny_config

TRAINABLE = 200_000_000


def settings(stage: int, *, on_gpu: bool, world_size: int = 2, **own: Any) -> dict[str, Any]:
    from relora_mora.engine.start import deepspeed_settings

    train = tiny_config(world_size, train={"zero_stage": stage, "deepspeed": {"zero_optimization": own}}).train
    result = deepspeed_settings(train, world_size, clip=1.0, bf16=True, trainable=TRAINABLE, on_gpu=on_gpu)
    zero: dict[str, Any] = result["zero_optimization"]
    return zero


@each("stage", [0, 1, 2, 3])
def test_on_cpus_one_bucket_holds_all_gradients(stage: int) -> None:
    assert settings(stage, on_gpu=False) == {"stage": stage, "reduce_bucket_size": TRAINABLE}


@each("stage", [0, 1, 2, 3])
def test_on_gpus_buckets_are_small_and_stage_2_reduces_during_backward(stage: int) -> None:
    small = {"stage": stage, "reduce_bucket_size": 50_000_000}
    assert settings(stage, on_gpu=True) == (small | {"overlap_comm": True} if stage == 2 else small)
    assert settings(stage, on_gpu=True, world_size=1) == small


def test_settings_of_the_user_take_precedence() -> None:
    given = {"overlap_comm": False, "reduce_bucket_size": 1000}
    assert settings(2, on_gpu=True, **given) == {"stage": 2, **given}
